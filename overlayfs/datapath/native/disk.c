// SPDX-License-Identifier: Apache-2.0
/* The disk's own requests. Sizes and offsets are bytes; errors are those of a block device. */
#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#include "datapath.h"

/* Around the page cache goes what begins and ends on blocks (direct_block()); the payload always begins on a page. */
static int descriptor(const struct worker *worker, uint64_t start, size_t length)
{
    const struct environment *environment = worker->server->environment;
    if (environment->direct >= 0 && (start | length) % worker->server->block == 0)
        return environment->direct;
    return environment->live;
}

/* A write around the page cache must not meet one through it: where it ends on pages that are dirty again, however far
 * from what was written to them, the kernel fails the next fsync with EIO (mm/filemap.c: dio_warn_stale_pagecache()).
 * So those through the cache are alone, and a page that they leave dirty is written before the next around it. */
static pthread_rwlock_t around = PTHREAD_RWLOCK_WRITER_NONRECURSIVE_INITIALIZER_NP;

static void begin_write(const struct worker *worker, const struct transfer *transfer)
{
    if (worker->server->environment->direct < 0)
        return;
    if (descriptor(worker, transfer->start, transfer->length) == worker->server->environment->direct)
        pthread_rwlock_rdlock(&around);
    else
        pthread_rwlock_wrlock(&around);
}

static void end_write(const struct worker *worker)
{
    if (worker->server->environment->direct >= 0)
        pthread_rwlock_unlock(&around);
}

struct outcome {
    int error;     /* 0 or positive */
    size_t length; /* of the answer at the worker's payload */
    uint64_t bytes; /* of the disk that were concerned */
};

static void *body(struct worker *worker)
{
    return worker_request(worker) + sizeof(struct fuse_in_header);
}

/* What a READ moves: nothing beyond the end. Returns an errno. */
static int plan_read(struct worker *worker, struct transfer *transfer)
{
    uint64_t size = worker->server->shared->size;
    const struct fuse_read_in *in = body(worker);
    faults_crash("crash", in->offset);
    *transfer = (struct transfer){.start = in->offset, .length = in->size};
    if (in->offset >= size)
        transfer->length = 0;
    else if (in->size > size - in->offset)
        transfer->length = size - in->offset;
    return transfer->length > worker->server->room - WRITE_HEAD ? EINVAL : 0;
}

/* What a WRITE moves; as on a block device what crosses the end is cut. Returns an errno. */
static int plan_write(struct worker *worker, struct transfer *transfer)
{
    const struct shared_header *shared = worker->server->shared;
    const struct fuse_write_in *in = body(worker);
    const struct fuse_in_header *head = (void *)worker_request(worker);
    faults_crash("crash", in->offset);
    if (head->len != WRITE_HEAD + in->size)
        return EIO;
    if (shared->read_only)
        return EROFS;
    if (in->offset >= shared->size)
        return ENOSPC;
    uint64_t room = shared->size - in->offset;
    *transfer = (struct transfer){
        .writes = true,
        /* The kernel passes the opener's flags and leaves O_SYNC to us. */
        .flags = in->flags & O_DSYNC ? RWF_DSYNC : 0,
        .start = in->offset,
        .length = in->size < room ? in->size : room,
    };
    return 0;
}

/* Reads on behind the first `done` bytes. */
static struct outcome read_rest(struct worker *worker, const struct transfer *transfer, size_t done)
{
    while (done < transfer->length) {
        unsigned char *to = worker_payload(worker) + done;
        uint64_t start = transfer->start + done;
        size_t length = transfer->length - done;
        ssize_t got = pread(descriptor(worker, start, length), to, length, (off_t)start);
        if (got < 0 && errno == EINTR)
            continue;
        /* The end of a file that was longer when it was opened: there is nothing true to answer. */
        if (got <= 0)
            return (struct outcome){.error = got ? errno : EIO};
        done += (size_t)got;
    }
    return (struct outcome){.length = done, .bytes = done};
}

static struct outcome write_rest(struct worker *worker, const struct transfer *transfer, size_t done)
{
    int file = descriptor(worker, transfer->start, transfer->length);
    int error = 0;
    while (done < transfer->length && !error) {
        struct iovec part = {worker_payload(worker) + done, transfer->length - done};
        uint64_t start = transfer->start + done;
        /* The rest of a short write around the page cache would go through it, and not alone: the answer is short. */
        if (done > 0 && descriptor(worker, start, part.iov_len) != file)
            break;
        ssize_t put = pwritev2(file, &part, 1, (off_t)start, transfer->flags);
        if (put < 0 && errno != EINTR)
            error = errno;
        if (put > 0)
            done += (size_t)put;
    }
    if (done == 0 && transfer->length > 0)
        return (struct outcome){.error = error};
    struct fuse_write_out out = {.size = (uint32_t)done};
    memcpy(worker_payload(worker), &out, sizeof out);
    return (struct outcome){.length = sizeof out, .bytes = done};
}

static struct outcome disk_read(struct worker *worker)
{
    struct transfer transfer;
    int error = plan_read(worker, &transfer);
    return error ? (struct outcome){.error = error} : read_rest(worker, &transfer, 0);
}

static struct outcome disk_write(struct worker *worker)
{
    struct shared_header *shared = worker->server->shared;
    struct transfer transfer;
    int error = plan_write(worker, &transfer);
    if (error)
        return (struct outcome){.error = error};
    begin_write(worker, &transfer);
    record_begin(shared, worker->slot, transfer.start, transfer.length);
    struct outcome outcome = write_rest(worker, &transfer, 0);
    record_end(shared, worker->slot, transfer.start, transfer.length);
    end_write(worker);
    return outcome;
}

static struct outcome disk_fsync(struct worker *worker)
{
    const struct fuse_fsync_in *in = body(worker);
    int live = worker->server->environment->live;
    int result;
    faults_delay("before-flush");
    do
        result = in->fsync_flags & FUSE_FSYNC_FDATASYNC ? fdatasync(live) : fsync(live);
    while (result && errno == EINTR);
    return (struct outcome){.error = result ? errno : 0};
}

static int change_allocation(int live, int mode, uint64_t start, uint64_t length)
{
    int result;
    do
        result = fallocate(live, mode, (off_t)start, (off_t)length);
    while (result && errno == EINTR);
    return result ? errno : 0;
}

/* QEMU zeroes a range without KEEP_SIZE, which is the same thing within the disk. */
static struct outcome disk_fallocate(struct worker *worker)
{
    struct shared_header *shared = worker->server->shared;
    const struct fuse_fallocate_in *in = body(worker);
    const int punch = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;
    const int zero = FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE;
    int mode = (int)in->mode | (in->mode & FALLOC_FL_ZERO_RANGE ? FALLOC_FL_KEEP_SIZE : 0);
    faults_crash("crash", in->offset);
    bool grows = in->length > shared->size || in->offset > shared->size - in->length;
    if (shared->read_only)
        return (struct outcome){.error = EROFS};
    if (mode != punch && mode != zero)
        return (struct outcome){.error = EOPNOTSUPP};
    if (grows && !(in->mode & FALLOC_FL_KEEP_SIZE))
        return (struct outcome){.error = EFBIG};
    if (in->length == 0 || in->offset >= shared->size)
        return (struct outcome){.error = EINVAL};
    /* Where the size is kept, a range that crosses the end ends there, as on a block device. */
    uint64_t length = grows ? shared->size - in->offset : in->length;
    int live = worker->server->environment->live;
    record_begin(shared, worker->slot, in->offset, length);
    int error = change_allocation(live, mode, in->offset, length);
    /* tmpfs has no zero range, and a hole reads as zeros too. */
    if (error == EOPNOTSUPP && mode == zero)
        error = change_allocation(live, punch, in->offset, length);
    record_end(shared, worker->slot, in->offset, length);
    return (struct outcome){.error = error, .bytes = length};
}

static struct outcome disk_lseek(struct worker *worker)
{
    uint64_t size = worker->server->shared->size;
    const struct fuse_lseek_in *in = body(worker);
    if (in->whence != SEEK_DATA && in->whence != SEEK_HOLE)
        return (struct outcome){.error = EINVAL};
    if (in->offset >= size)
        return (struct outcome){.error = ENXIO};
    off_t found = lseek(worker->server->environment->live, (off_t)in->offset, (int)in->whence);
    /* A block device knows no holes. A file without them is all data up to its end (lseek(2)). */
    if (found < 0 && errno == EINVAL)
        found = in->whence == SEEK_DATA ? (off_t)in->offset : (off_t)size;
    if (found < 0)
        return (struct outcome){.error = errno};
    if ((uint64_t)found >= size && in->whence == SEEK_DATA)
        return (struct outcome){.error = ENXIO};
    struct fuse_lseek_out out = {.offset = (uint64_t)found < size ? (uint64_t)found : size};
    memcpy(worker_payload(worker), &out, sizeof out);
    return (struct outcome){.length = sizeof out};
}

static struct outcome disk_flush(struct worker *worker)
{
    /* close() of a block device flushes nothing either; fsync is a request of its own. */
    (void)worker;
    return (struct outcome){0};
}

/* The disk's attributes as the session told them once; they never change. Answered here, because the kernel asks
 * for them anew after every write, and while it waits in lseek() or utimens() no other write can begin. */
static struct outcome disk_getattr(struct worker *worker)
{
    const struct shared_header *shared = worker->server->shared;
    memcpy(worker_payload(worker), shared->attributes, sizeof(struct fuse_attr_out));
    return (struct outcome){.length = sizeof(struct fuse_attr_out)};
}

/* As overlayfs/filesystem.py: size and access stay, times are accepted and stay what they are too. */
static struct outcome disk_setattr(struct worker *worker)
{
    const struct shared_header *shared = worker->server->shared;
    const struct fuse_setattr_in *in = body(worker);
    struct fuse_attr_out now;
    memcpy(&now, shared->attributes, sizeof now);
    if (in->valid & FATTR_SIZE && in->size != shared->size)
        return (struct outcome){.error = shared->read_only ? EROFS : EPERM};
    if ((in->valid & FATTR_MODE && (in->mode ^ now.attr.mode) & 07777)
        || (in->valid & FATTR_UID && in->uid != now.attr.uid) || (in->valid & FATTR_GID && in->gid != now.attr.gid))
        return (struct outcome){.error = EPERM};
    return disk_getattr(worker);
}

/* An open disk is nothing to the session. Answered here, because 64 unanswered ones (max_background) would hold
 * up every asynchronous read and write. */
static struct outcome disk_release(struct worker *worker)
{
    (void)worker;
    return (struct outcome){0};
}

static const struct operation {
    struct outcome (*serve)(struct worker *worker);
    int kind; /* of the statistics, -1: not counted */
    enum { QUICK, MOVING, HEAVY } weight; /* does not wait for the disk, may, may for as long as the disk likes */
} operations[] = {
    [FUSE_READ] = {disk_read, KIND_READ, MOVING},
    [FUSE_WRITE] = {disk_write, KIND_WRITE, MOVING},
    [FUSE_FSYNC] = {disk_fsync, KIND_FLUSH, HEAVY},
    [FUSE_FLUSH] = {disk_flush, -1, QUICK},
    [FUSE_FALLOCATE] = {disk_fallocate, KIND_DISCARD, HEAVY},
    [FUSE_LSEEK] = {disk_lseek, -1, HEAVY},
    [FUSE_GETATTR] = {disk_getattr, -1, QUICK},
    [FUSE_SETATTR] = {disk_setattr, -1, QUICK},
    [FUSE_RELEASE] = {disk_release, -1, QUICK},
};

/* What servers have died of is not tried again. Nobody knows how far they came, so what it would have changed is
 * marked as changed. */
static struct outcome give_up(struct worker *worker, uint32_t opcode)
{
    struct shared_header *shared = worker->server->shared;
    const struct fuse_fallocate_in *discard = body(worker);
    const struct fuse_write_in *write = body(worker);
    uint64_t start = 0, length = 0;
    if (opcode == FUSE_WRITE) {
        start = write->offset;
        length = write->size;
    } else if (opcode == FUSE_FALLOCATE) {
        start = discard->offset;
        length = discard->length;
    }
    if (start > shared->size)
        start = shared->size;
    if (length > shared->size - start)
        length = shared->size - start;
    record_begin(shared, worker->slot, start, length);
    record_end(shared, worker->slot, start, length);
    return (struct outcome){.error = EIO};
}

/* Counted before the guest can know, so that whoever has seen an answer finds it counted. */
static void answer(struct worker *worker, const struct fuse_in_header *head, uint64_t begin,
                   const struct outcome *outcome)
{
    static _Atomic uint64_t failures;
    int kind = operations[head->opcode].kind;
    faults_break_rules(worker->server->shared);
    faults_delay("before-reply");
    if (kind >= 0)
        record_account(worker->slot, (enum shared_kind)kind, outcome->bytes, outcome->error != 0,
                       clock_nanoseconds() - begin);
    if (outcome->error == EIO)
        say_sometimes(&failures, "request failed opcode=%u errno=%d", head->opcode, outcome->error);
    worker_reply(worker, head->unique, outcome->error, outcome->length);
}

static void serve(struct worker *worker, const struct operation *operation)
{
    /* The answer may be written over the request. */
    struct fuse_in_header head;
    memcpy(&head, worker_request(worker), sizeof head);
    uint64_t begin = clock_nanoseconds();
    uint64_t deaths = suspects_deaths(worker->server->shared, head.unique);
    bool given_up = deaths >= SUSPECT_LIMIT;
    struct outcome outcome = given_up ? give_up(worker, head.opcode) : operation->serve(worker);
    if (given_up)
        say("request answered with EIO opcode=%u servers=%u: died with it", head.opcode, (unsigned)deaths);
    answer(worker, &head, begin, &outcome);
}

/* Returns what serves a request, or NULL where it is the session's. */
static const struct operation *operation_of(const struct worker *worker)
{
    const struct fuse_in_header *head = (void *)worker_request(worker);
    if (head->nodeid != DISK_INODE || head->opcode >= sizeof operations / sizeof *operations)
        return NULL;
    bool of_attributes = head->opcode == FUSE_GETATTR || head->opcode == FUSE_SETATTR;
    if (of_attributes && !atomic_load(&worker->server->shared->attributes_length))
        return NULL;
    return operations[head->opcode].serve ? &operations[head->opcode] : NULL;
}

/* What pyfuse3 would say ENOSYS to for one of its files, whereupon the kernel asks it of the disk no more:
 * no hole would be made or found after a `cp` of the status. */
static bool refuse_others(struct worker *worker)
{
    const struct fuse_in_header *head = (void *)worker_request(worker);
    if (head->nodeid == DISK_INODE || (head->opcode != FUSE_FALLOCATE && head->opcode != FUSE_LSEEK))
        return false;
    worker_reply(worker, head->unique, head->opcode == FUSE_LSEEK ? EINVAL : EOPNOTSUPP, 0);
    return true;
}

bool disk_serve(struct worker *worker)
{
    const struct fuse_in_header *head = (void *)worker_request(worker);
    const struct operation *operation = operation_of(worker);
    struct server *server = worker->server;
    if (!operation)
        return refuse_others(worker);
    if (operation->weight != HEAVY) {
        serve(worker, operation);
        return true;
    }
    /* One reader stays free for reads and writes, whatever the disk makes of its flushes. (There are none beside
     * direct.c: then all of them are for the slow thread.) */
    bool free = atomic_fetch_add(&server->heavy, 1) + 1 < server->readers;
    if (free || !queue_push(server->slow, head, head->len))
        serve(worker, operation);
    atomic_fetch_sub(&server->heavy, 1);
    return true;
}

bool disk_serve_later(struct worker *worker)
{
    const struct fuse_in_header *head = (void *)worker_request(worker);
    const struct operation *operation = operation_of(worker);
    struct server *server = worker->server;
    if (!operation)
        return refuse_others(worker);
    if (!queue_push(operation->weight == HEAVY ? server->slow : server->late, head, head->len))
        serve(worker, operation);
    return true;
}

bool disk_serve_aside(struct worker *worker)
{
    const struct fuse_in_header *head = (void *)worker_request(worker);
    const struct operation *operation = operation_of(worker);
    if (!operation)
        return refuse_others(worker);
    struct queue *others = operation->weight == HEAVY ? worker->server->slow : worker->server->aside;
    if (operation->weight != QUICK && queue_push(others, head, head->len))
        return true;
    /* No memory to leave it with others: alone, for this thread's own writes would never let it begin. */
    if (operation->weight != QUICK)
        direct_finish(worker);
    serve(worker, operation);
    return true;
}

bool disk_serve_now(struct worker *worker)
{
    const struct fuse_in_header *head = (void *)worker_request(worker);
    serve(worker, &operations[head->opcode]);
    return true;
}

bool disk_begin(struct worker *worker, struct transfer *transfer)
{
    const struct fuse_in_header *head = (void *)worker_request(worker);
    const struct server *server = worker->server;
    bool writes = head->opcode == FUSE_WRITE;
    if (head->nodeid != DISK_INODE || !(writes || head->opcode == FUSE_READ))
        return false;
    /* What is refused, or moves nothing, is answered where all others are. */
    if ((writes ? plan_write : plan_read)(worker, transfer) || transfer->length == 0)
        return false;
    if (descriptor(worker, transfer->start, transfer->length) != server->environment->direct)
        return false;
    if (writes && pthread_rwlock_tryrdlock(&around))
        return false;
    transfer->begin = clock_nanoseconds();
    if (writes)
        record_begin(server->shared, worker->slot, transfer->start, transfer->length);
    return true;
}

void disk_end(struct worker *worker, const struct transfer *transfer, long moved)
{
    struct fuse_in_header head;
    memcpy(&head, worker_request(worker), sizeof head);
    struct outcome outcome;
    if (moved < 0 && moved != -EINTR)
        outcome = (struct outcome){.error = (int)-moved};
    else
        outcome = (transfer->writes ? write_rest : read_rest)(worker, transfer, moved < 0 ? 0 : (size_t)moved);
    if (transfer->writes) {
        record_end(worker->server->shared, worker->slot, transfer->start, transfer->length);
        end_write(worker);
    }
    answer(worker, &head, transfer->begin, &outcome);
}
