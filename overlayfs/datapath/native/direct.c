// SPDX-License-Identifier: Apache-2.0
/* Reads and writes of a disk that is opened O_DIRECT: a thread takes many requests out of /dev/fuse, gives them to
 * the disk with io_submit(2), and answers each when it is done. What else may wait for the disk is left to others.
 *
 * A thread for each request went to sleep and woke up twice for it. 4 KiB at depth 16 on a disk of two processors:
 * 72 % of both for 68 000 requests a second then, 45 % for 72 000 now; at depth 1 0.85 of the disk, not 0.75.
 *
 * A write of a killed server that lands after the next one's answer would undo a later write. The kernel lets hardly
 * any process go before its requests (fs/aio.c: exit_aio(); io_uring's may outlive it), but one whose memory somebody
 * is just looking at (/proc/PID/mem) it does: gone after 0 s, the write ended 1.8 s later. So each server has the disk
 * open by itself and locks a byte of it. A request holds on to the open file, which holds the lock, and the next server
 * waits for that first.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <linux/stat.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "datapath.h"

/* So many are answered, taken and submitted in turn, or one of this length: the disk is at work on some while others
 * are copied. 0.70 of the disk's 4 KiB reads at depth 16, with 8 0.61, without a limit 0.56; 0.82 of its 128 KiB reads
 * at depth 4, with four of these at a time 0.54. */
#define BATCH 4
#define BATCH_LENGTH (64 * 1024)

struct flight {
    struct direct *direct;
    struct worker *worker;
    struct transfer transfer;
    struct iocb block;
};

struct direct {
    struct server *server;
    aio_context_t context;
    int landed; /* eventfd */
    int poll;   /* epoll: of `landed` and /dev/fuse */
    unsigned count, free, begun;
    long events; /* to be taken at a time, by the length of the last */
    struct flight flights[FLIGHTS];
    struct flight *unused[FLIGHTS]; /* the first `free` */
    struct iocb *batch[BATCH];      /* the first `begun`, which the disk does not know of yet */
};

/* QEMU's locks, and ours of that kind, are on bytes from 100 on (dirtymap/images/lock.py). */
#define LOCKED_BYTE ((off_t)1 << 62)

static int lock(int file, int command, short type)
{
    struct flock range = {.l_type = type, .l_whence = SEEK_SET, .l_start = LOCKED_BYTE, .l_len = 1};
    int result;
    do
        result = fcntl(file, command, &range);
    while (result && errno == EINTR);
    return result;
}

void direct_await_others(int file)
{
    /* Where there are no such locks, no server has had requests with the disk. */
    if (lock(file, F_OFD_SETLKW, F_WRLCK) == 0)
        lock(file, F_OFD_SETLK, F_UNLCK);
}

bool direct_open(struct environment *environment)
{
    char path[32];
    if (environment->shared->read_only)
        return true;
    snprintf(path, sizeof path, "/proc/self/fd/%d", environment->direct);
    int own = open(path, O_RDWR | O_DIRECT | O_CLOEXEC);
    if (own < 0)
        return false;
    if (lock(own, F_OFD_SETLK, F_WRLCK)) {
        close(own);
        return false;
    }
    environment->direct = own;
    return true;
}

size_t direct_block(int file)
{
    size_t block = 0;
#ifdef STATX_DIOALIGN /* Linux 6.1 */
    struct statx found = {0};
    if (file >= 0 && syscall(SYS_statx, file, "", AT_EMPTY_PATH, STATX_DIOALIGN, &found) == 0)
        block = found.stx_dio_offset_align;
#endif
    /* Not less: XFS lets smaller writes of a reflinked file go through the page cache. */
    return block > PAGE ? block : PAGE;
}

struct worker *direct_worker(struct direct *direct)
{
    return direct->flights[0].worker;
}

static int aio_setup(unsigned count, aio_context_t *context)
{
    return (int)syscall(SYS_io_setup, count, context);
}

static long aio_submit(aio_context_t context, long count, struct iocb **blocks)
{
    return syscall(SYS_io_submit, context, count, blocks);
}

static long aio_events(aio_context_t context, long least, long most, struct io_event *events, struct timespec *time)
{
    return syscall(SYS_io_getevents, context, least, most, events, time);
}

/* Leaves the worker's request to the disk, where that may be; for worker_serve(). */
static bool begin(struct worker *worker)
{
    struct flight *flight = worker->flight;
    struct direct *direct = flight->direct;
    const struct transfer *transfer = &flight->transfer;
    if (!disk_begin(worker, &flight->transfer))
        return disk_serve_aside(worker);
    flight->block = (struct iocb){
        .aio_data = (uintptr_t)flight,
        .aio_lio_opcode = transfer->writes ? IOCB_CMD_PWRITE : IOCB_CMD_PREAD,
        .aio_rw_flags = transfer->flags,
        .aio_fildes = (uint32_t)direct->server->environment->direct,
        .aio_buf = (uintptr_t)worker_payload(worker),
        .aio_nbytes = transfer->length,
        .aio_offset = (int64_t)transfer->start,
        .aio_flags = IOCB_FLAG_RESFD,
        .aio_resfd = (uint32_t)direct->landed,
    };
    worker->away = true;
    direct->batch[direct->begun++] = &flight->block;
    return true;
}

static unsigned take_requests(struct direct *direct)
{
    unsigned taken = 0;
    size_t length = 0;
    while (taken < BATCH && length < BATCH_LENGTH && direct->free > 0) {
        struct flight *flight = direct->unused[direct->free - 1];
        if (!worker_serve(flight->worker, begin))
            break;
        taken++;
        if (flight->worker->away) {
            length += flight->transfer.length;
            direct->free--;
        }
    }
    return taken;
}

static void end(struct flight *flight, long moved)
{
    struct direct *direct = flight->direct;
    disk_end(flight->worker, &flight->transfer, moved);
    flight->worker->away = false;
    worker_leave(flight->worker);
    direct->unused[direct->free++] = flight;
    direct->events = flight->transfer.length < BATCH_LENGTH ? BATCH : 1;
}

static void submit(struct direct *direct)
{
    unsigned given = 0;
    while (given < direct->begun) {
        long put = aio_submit(direct->context, direct->begun - given, direct->batch + given);
        if (put > 0)
            given += (unsigned)put;
        else /* refused: nothing is moved, and it is done here or fails for its true reason */
            end((struct flight *)(uintptr_t)direct->batch[given++]->aio_data, 0);
    }
    direct->begun = 0;
}

/* Ends what the disk is done with; where `patient` one at least, unless a signal comes. */
static unsigned take_events(struct direct *direct, bool patient)
{
    struct io_event events[BATCH];
    struct timespec at_once = {0};
    if (direct->free == direct->count)
        return 0;
    long got = aio_events(direct->context, patient, direct->events, events, patient ? NULL : &at_once);
    for (long i = 0; i < got; i++)
        end((struct flight *)(uintptr_t)events[i].data, (long)events[i].res);
    return got > 0 ? (unsigned)got : 0;
}

/* Until there is a request that can be taken, or one is done. */
static void rest(struct direct *direct)
{
    struct server *server = direct->server;
    struct epoll_event event;
    if (direct->free == 0) {
        take_events(direct, true);
        return;
    }
    /* In this order: read_for_others() looks at `idle` after it has left a request to others. */
    atomic_fetch_add(&server->idle, 1);
    if (queue_is_empty(server->late))
        epoll_wait(direct->poll, &event, 1, -1);
    atomic_fetch_sub(&server->idle, 1);
}

void direct_finish(struct worker *worker)
{
    struct direct *direct = worker->flight->direct;
    submit(direct);
    while (direct->free < direct->count)
        take_events(direct, true);
}

void *direct_run(void *argument)
{
    struct direct *direct = argument;
    while (!atomic_load(&direct->server->ending)) {
        unsigned done = take_events(direct, false);
        unsigned taken = take_requests(direct);
        submit(direct);
        if (done == 0 && taken == 0)
            rest(direct);
    }
    direct_finish(direct_worker(direct));
    atomic_fetch_sub(&direct->server->alive, 1);
    return NULL;
}

/* Edge-triggered: every end of a request wakes once more, and `landed` need never be read. */
static bool open_poll(struct direct *direct, int fuse)
{
    struct epoll_event landed = {.events = EPOLLIN | EPOLLET};
    struct epoll_event request = {.events = EPOLLIN | EPOLLEXCLUSIVE};
    direct->landed = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    direct->poll = epoll_create1(EPOLL_CLOEXEC);
    return direct->landed >= 0 && direct->poll >= 0
        && epoll_ctl(direct->poll, EPOLL_CTL_ADD, direct->landed, &landed) == 0
        && epoll_ctl(direct->poll, EPOLL_CTL_ADD, fuse, &request) == 0;
}

struct direct *direct_new(struct server *server, unsigned flights)
{
    struct direct *direct = calloc(1, sizeof *direct);
    if (!direct || faults_sabotage("no-aio") || !open_poll(direct, server->environment->fuse)
        || aio_setup(flights, &direct->context))
        return NULL;
    direct->server = server;
    for (unsigned i = 0; i < flights; i++) {
        struct flight *flight = &direct->flights[i];
        flight->direct = direct;
        flight->worker = server_worker(server);
        if (!flight->worker)
            return NULL; /* what there is so far is left lying: a server without memory hardly gets far */
        flight->worker->flight = flight;
        direct->unused[direct->free++] = flight;
    }
    direct->count = flights;
    direct->events = BATCH;
    return direct;
}

