// SPDX-License-Identifier: Apache-2.0
/* Everything but the disk's data (forward.c: that too): to pyfuse3 in the session, over a SOCK_SEQPACKET pair (a packet is a
 * request or an answer, as a read or write of /dev/fuse would be).
 *
 *   kernel -> control_request -> row and copy -> [fifo, while the socket is full] -> session
 *   kernel <- control_pump    <- row found    <----------------------------------- session
 *
 * Sessions and servers die, a request must not. Its row, in shared memory, says which session has it:
 *   the session died      a new one is sent INIT, which it does not know to be old, then every copy; but a
 *                         command that it had may have killed it, or be done: it is answered with EIO
 *   the server died       the kernel sends the request again, with the resend bit; if the session still
 *                         has it, only the bit is noted, which the answer must carry
 *   both                  the row outlives both: the request comes again from the kernel and is sent
 *   a server in the act   of sending: nobody knows whether the session has it, and a write of the disk that it got
 *                         twice might be done again after its answer, over a later one. So it is asked to finish
 *                         everything first (forward.c): then either there is an answer, or it never had it
 *   servers died of it    again and again, on its way there or of its answer on the way back: EIO (suspects.c)
 * An answer is looked at in the socket (MSG_PEEK) and taken out of it only when the kernel has it: the
 * next server finds it there.
 */
#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "datapath.h"

#define NONE SHARED_ROWS

struct copy {
    struct packet *request;
    struct packet *answer; /* came before the kernel had sent the request again */
    unsigned next;         /* in the fifo */
    bool queued;
    bool resent;
};

struct control {
    struct server *server;
    struct shared_header *shared;
    struct shared_row *rows;
    struct queue *notifications;
    pthread_t notifier;
    unsigned char *buffer; /* for answers */
    size_t room;

    pthread_mutex_t mutex; /* of all below */
    int session;           /* -1 while there is none */
    size_t limit;          /* of a packet's data, bytes */
    unsigned first, last;  /* fifo of rows to be sent */
    unsigned high;         /* rows at or beyond this one are free */
    struct queue *releases; /* which nobody waits for, but the session holds what an opener reads until then */
    struct packet *release; /* the next of them */
    enum { IDLE, TO_BE_ASKED, ASKED } drain; /* what is in doubt waits for */
    struct copy copies[SHARED_ROWS];
};

static struct packet *packet_copy(const void *data, size_t length)
{
    struct packet *packet = malloc(sizeof *packet + length);
    if (packet) {
        packet->length = length;
        memcpy(packet->data, data, length);
    }
    return packet;
}

/* To the kernel. An unknown request (answered before, or aborted) is ENOENT and nobody's loss. */
static int answer(struct control *control, const void *data, size_t length)
{
    ssize_t put;
    do
        put = write(control->server->environment->fuse, data, length);
    while (put < 0 && errno == EINTR);
    return put < 0 ? errno : 0;
}

static void answer_error(struct control *control, uint64_t unique, int error)
{
    struct fuse_out_header out = {.len = sizeof out, .error = -error, .unique = unique};
    answer(control, &out, sizeof out);
}

static unsigned find(struct control *control, uint64_t unique)
{
    for (unsigned i = 0; i < control->high; i++)
        if (atomic_load_explicit(&control->rows[i].unique, memory_order_relaxed) == unique)
            return i;
    return NONE;
}

static void release(struct control *control, unsigned i)
{
    struct copy *copy = &control->copies[i];
    atomic_store(&control->rows[i].unique, 0);
    free(copy->request);
    free(copy->answer);
    copy->request = copy->answer = NULL;
    while (control->high > 0 && atomic_load(&control->rows[control->high - 1].unique) == 0)
        control->high--;
}

/* Returns a free row, or one whose answer nobody came for: a server died just after it had answered. */
static unsigned claim(struct control *control)
{
    unsigned i = 0;
    while (i < SHARED_ROWS && atomic_load(&control->rows[i].unique) != 0)
        i++;
    for (unsigned j = 0; i == SHARED_ROWS && j < SHARED_ROWS; j++)
        if (control->copies[j].answer)
            i = j;
    if (i == SHARED_ROWS)
        return NONE;
    if (atomic_load(&control->rows[i].unique) != 0)
        release(control, i);
    if (i >= control->high)
        control->high = i + 1;
    return i;
}

static void enqueue(struct control *control, unsigned i)
{
    struct copy *copy = &control->copies[i];
    if (copy->queued)
        return;
    copy->queued = true;
    copy->next = NONE;
    if (control->first == NONE)
        control->first = i;
    else
        control->copies[control->last].next = i;
    control->last = i;
}

static bool is_condemned(struct control *control, const struct shared_row *row)
{
    return suspects_deaths(control->shared, row->unique) >= SUSPECT_LIMIT;
}

static void say_died_with(struct control *control, const struct shared_row *row)
{
    say("control request answered with EIO opcode=%u sessions=%u servers=%u: died with it", row->opcode,
        row->deliveries, (unsigned)suspects_deaths(control->shared, row->unique));
}

/* What sessions or servers have died of goes to no other. */
static void give_up(struct control *control, unsigned i)
{
    const struct copy *copy = &control->copies[i];
    const struct shared_row *row = &control->rows[i];
    say_died_with(control, row);
    answer_error(control, row->unique | (copy->resent ? FUSE_UNIQUE_RESEND : 0), EIO);
    if (!copy->queued)
        release(control, i);
}

/* 0 or an errno. Never waits: a session that is stopped must not stop a reader. */
static int transmit(struct control *control, const void *data, size_t length)
{
    if (control->session < 0)
        return ENOTCONN;
    if (send(control->session, data, length, MSG_DONTWAIT | MSG_NOSIGNAL) >= 0)
        return 0;
    return errno;
}

/* Never the kernel's, which counts in even numbers, nor that of another server, who asked before. */
static uint64_t drain_unique(const struct control *control)
{
    return 1ULL << 62 | atomic_load(&control->shared->servers) << 1 | 1;
}

static bool ask_to_drain(struct control *control)
{
    _Alignas(8) unsigned char request[FORWARD_DRAIN];
    size_t length = forward_drain(control->shared, request, drain_unique(control));
    if (transmit(control, request, length))
        return false;
    control->drain = ASKED;
    return true;
}

/* The session has answered all that it had: what is still in doubt it never got. */
static void drained(struct control *control)
{
    control->drain = IDLE;
    for (unsigned i = 0; i < control->high; i++) {
        if (control->rows[i].sent == SENT_PERHAPS && control->copies[i].request) {
            control->rows[i].sent = SENT_NOT;
            if (is_condemned(control, &control->rows[i]))
                give_up(control, i);
            else
                enqueue(control, i);
        }
    }
}

static void send_releases(struct control *control)
{
    for (;;) {
        if (!control->release)
            control->release = queue_take(control->releases);
        if (!control->release || transmit(control, control->release->data, control->release->length))
            return;
        free(control->release);
        control->release = NULL;
    }
}

static void flush(struct control *control)
{
    send_releases(control);
    if (control->drain == TO_BE_ASKED && !ask_to_drain(control))
        return;
    while (control->first != NONE) {
        unsigned i = control->first;
        struct copy *copy = &control->copies[i];
        struct shared_row *row = &control->rows[i];
        row->epoch = (uint32_t)atomic_load(&control->shared->epoch);
        row->sent = SENT_PERHAPS;
        faults_delay("before-send");
        atomic_store(&control->shared->passing, row->unique);
        faults_crash("crash-send", row->opcode);
        int error = transmit(control, copy->request->data, copy->request->length);
        atomic_store(&control->shared->passing, 0);
        faults_delay("after-send");
        row->sent = error ? SENT_NOT : SENT_YES;
        if (error && error != EMSGSIZE)
            return;
        control->first = copy->next;
        copy->queued = false;
        if (error) {
            answer_error(control, row->unique | (copy->resent ? FUSE_UNIQUE_RESEND : 0), EFBIG);
            release(control, i);
            continue;
        }
        row->deliveries++;
        if (row->opcode == FUSE_INIT)
            atomic_store(&control->shared->init_epoch, row->epoch);
    }
}

static bool is_waiting(const struct control *control)
{
    return control->first != NONE || control->drain == TO_BE_ASKED || control->release;
}

/* Keeps INIT for the sessions to come, and takes from it what this kernel can do. */
static void note_init(struct control *control, unsigned char *request, size_t length)
{
    struct shared_header *shared = control->shared;
    struct fuse_init_in *in = (void *)(request + sizeof(struct fuse_in_header));
    size_t with_flags2 = sizeof(struct fuse_in_header) + offsetof(struct fuse_init_in, flags2) + 4;
    uint64_t mask = faults_masked_flags();
    in->flags &= ~(uint32_t)mask;
    uint64_t flags = in->flags;
    if (in->flags & FUSE_INIT_EXT && length >= with_flags2) {
        in->flags2 &= ~(uint32_t)(mask >> 32);
        flags |= (uint64_t)in->flags2 << 32;
    }
    if (atomic_load(&shared->init_length) || length > SHARED_INIT)
        return;
    atomic_store(&shared->kernel_flags, flags);
    memcpy(shared->init, request, length);
    atomic_store(&shared->init_length, length);
}

/* A packet larger than the socket takes would never arrive: the kernel is made to ask for less. */
static bool limit(struct control *control, unsigned char *request, size_t length)
{
    const struct fuse_in_header *head = (void *)request;
    struct fuse_read_in *in = (void *)(request + sizeof *head);
    bool reads = head->opcode == FUSE_READ || head->opcode == FUSE_READDIR || head->opcode == FUSE_READDIRPLUS;
    if (reads && length >= sizeof *head + sizeof *in && in->size > control->limit) {
        /* Not of the disk: a short answer would be taken for its end. INIT was patched so that none comes. */
        if (head->nodeid == DISK_INODE)
            return false;
        in->size = (uint32_t)control->limit;
    }
    return length <= control->limit + PAGE;
}

/* To how many sessions a request may go. A write that is none of the disk's is a command, which changes things and may be the death of
 * whoever obeys it: to one. Whatever else there is (opens, attributes, reads) changes nothing, and a guest's open
 * must not fail because a session was killed meanwhile: to a second one, should the first have died of it. */
static uint32_t most_deliveries(const struct shared_row *row)
{
    return row->opcode == FUSE_WRITE && row->nodeid != DISK_INODE ? 1 : 2;
}

static void accept_request(struct control *control, unsigned char *request, size_t length)
{
    const struct fuse_in_header *head = (void *)request;
    uint64_t unique = head->unique & ~FUSE_UNIQUE_RESEND;
    unsigned i = find(control, unique);
    bool known = i != NONE;
    struct packet *packet = packet_copy(request, length);
    if (!known)
        i = claim(control);
    if (i == NONE || !packet) {
        free(packet);
        answer_error(control, head->unique, EAGAIN);
        return;
    }
    struct copy *copy = &control->copies[i];
    struct shared_row *row = &control->rows[i];
    ((struct fuse_in_header *)packet->data)->unique = unique;
    free(copy->request);
    copy->request = packet;
    copy->resent = head->unique & FUSE_UNIQUE_RESEND;
    if (!known) {
        row->nodeid = head->nodeid;
        row->opcode = head->opcode;
        row->deliveries = row->sent = SENT_NOT;
        atomic_store(&row->unique, unique);
    }
    if (copy->answer) {
        if (row->opcode == FUSE_INIT)
            atomic_store(&control->shared->answered, 1);
        ((struct fuse_out_header *)copy->answer->data)->unique = head->unique;
        answer(control, copy->answer->data, copy->answer->length);
        release(control, i);
    } else if (row->sent == SENT_PERHAPS) {
        if (control->drain == IDLE)
            control->drain = TO_BE_ASKED;
    } else if (!row->sent && (row->deliveries >= most_deliveries(row) || is_condemned(control, row))) {
        give_up(control, i);
    } else if (!row->sent) {
        enqueue(control, i);
    }
}

static bool is_forget(uint32_t opcode)
{
    return opcode == FUSE_FORGET || opcode == FUSE_BATCH_FORGET;
}

static bool is_release(uint32_t opcode)
{
    return opcode == FUSE_RELEASE || opcode == FUSE_RELEASEDIR;
}

void control_request(struct control *control, unsigned char *request, size_t length)
{
    const struct fuse_in_header *head = (void *)request;
    if (head->opcode == FUSE_INTERRUPT)
        return;
    pthread_mutex_lock(&control->mutex);
    if (head->opcode == FUSE_INIT)
        note_init(control, request, length);
    if (is_forget(head->opcode)) {
        /* Nothing depends on it: lost where it cannot be sent now. */
        if (control->first == NONE)
            transmit(control, request, length);
    } else if (is_release(head->opcode)) {
        /* Answered at once, since 64 unanswered ones (max_background) would hold up the disk's asynchronous
         * requests; the session's answer to it is one to an unknown request. */
        answer_error(control, head->unique, 0);
        if (!queue_push(control->releases, request, length))
            say("out of memory: a release is lost");
        flush(control);
    } else if (!limit(control, request, length)) {
        answer_error(control, head->unique, EFBIG);
    } else {
        accept_request(control, request, length);
        flush(control);
    }
    bool waiting = is_waiting(control);
    pthread_mutex_unlock(&control->mutex);
    if (waiting)
        server_wake(control->server);
}

static void patch_init(struct control *control, unsigned char *reply, size_t length)
{
    struct shared_header *shared = control->shared;
    struct fuse_init_out *out = (void *)(reply + sizeof(struct fuse_out_header));
    if (length < sizeof(struct fuse_out_header) + sizeof *out)
        return;
    uint64_t offered = atomic_load(&shared->kernel_flags);
    uint64_t flags = out->flags | (out->flags & FUSE_INIT_EXT ? (uint64_t)out->flags2 << 32 : 0);
    flags |= (FUSE_ASYNC_DIO | FUSE_MAX_PAGES | FUSE_INIT_EXT) & offered;
    if (offered & FUSE_INIT_EXT)
        flags |= FUSE_DIRECT_IO_ALLOW_MMAP & offered;
    /* With the writeback cache the bitmap would lag behind what the client has written. */
    flags &= ~(uint64_t)FUSE_WRITEBACK_CACHE;
    out->flags = (uint32_t)flags;
    out->flags2 = (uint32_t)(flags >> 32);
    out->max_write = (uint32_t)shared->max_write;
    /* In the kernel's pages, which need not be of 4 KiB: a READ is as large as they are. */
    out->max_pages = (uint16_t)(shared->max_write / (size_t)sysconf(_SC_PAGESIZE));
    if (out->max_readahead > CONTROL_LIMIT)
        out->max_readahead = CONTROL_LIMIT;
    /* Measured: 64 is plenty, the kernel's 12 nearly enough. */
    out->max_background = 64;
    out->congestion_threshold = 48;
    atomic_store(&shared->granted_flags, flags);
}

/* Keeps the disk's attributes, which the server answers for from then on. */
static void note_attributes(struct shared_header *shared, const struct fuse_attr_out *attributes)
{
    static_assert(sizeof *attributes == SHARED_ATTRIBUTES, "struct fuse_attr_out");
    if (atomic_load(&shared->attributes_length))
        return;
    memcpy(shared->attributes, attributes, sizeof *attributes);
    atomic_store(&shared->attributes_length, sizeof *attributes);
}

static void note_entry(struct shared_header *shared, const struct fuse_entry_out *entry)
{
    const struct fuse_attr_out attributes = {
        .attr_valid = entry->attr_valid, .attr_valid_nsec = entry->attr_valid_nsec, .attr = entry->attr};
    if (entry->nodeid == DISK_INODE)
        note_attributes(shared, &attributes);
}

static void patch(struct control *control, const struct shared_row *row, unsigned char *reply, size_t length)
{
    const struct fuse_out_header *head = (void *)reply;
    if (head->error)
        return;
    if (row->opcode == FUSE_LOOKUP && length >= sizeof *head + sizeof(struct fuse_entry_out))
        note_entry(control->shared, (void *)(reply + sizeof *head));
    if (row->opcode == FUSE_GETATTR && row->nodeid == DISK_INODE
        && length >= sizeof *head + sizeof(struct fuse_attr_out))
        note_attributes(control->shared, (void *)(reply + sizeof *head));
    if (row->opcode == FUSE_INIT)
        patch_init(control, reply, length);
    if (row->opcode == FUSE_OPEN && row->nodeid == DISK_INODE && !forwards(control->server->environment)) {
        struct fuse_open_out *out = (void *)(reply + sizeof *head);
        if (length < sizeof *head + sizeof *out)
            return;
        out->open_flags &= ~(uint32_t)FOPEN_KEEP_CACHE;
        out->open_flags |= FOPEN_DIRECT_IO | FOPEN_PARALLEL_DIRECT_WRITES;
    }
}

static void accept_answer(struct control *control, unsigned char *reply, size_t length)
{
    struct fuse_out_header *head = (void *)reply;
    pthread_mutex_lock(&control->mutex);
    if (head->unique == drain_unique(control)) {
        drained(control);
        pthread_mutex_unlock(&control->mutex);
        return;
    }
    unsigned i = find(control, head->unique);
    if (i == NONE) {
        /* The answer to a replayed INIT, or one that the server before us had passed on. */
        pthread_mutex_unlock(&control->mutex);
        return;
    }
    struct copy *copy = &control->copies[i];
    struct shared_row *row = &control->rows[i];
    atomic_store(&control->shared->passing, row->unique);
    if (is_condemned(control, row)) {
        say_died_with(control, row);
        *head = (struct fuse_out_header){.len = sizeof *head, .error = -EIO, .unique = head->unique};
        length = sizeof *head;
    } else {
        faults_crash("crash-answer", row->opcode);
    }
    patch(control, row, reply, length);
    atomic_store(&control->shared->passing, 0);
    bool init = row->opcode == FUSE_INIT && head->error == 0;
    if (init && faults_sabotage("no-init-answer")) {
        pthread_mutex_unlock(&control->mutex);
        return;
    }
    if (!copy->request) {
        /* Sent by a server that died; the kernel is about to send it again, under another name. */
        free(copy->answer);
        copy->answer = packet_copy(reply, length);
        /* It is out of the socket: a server that comes after this one has to ask again. */
        row->sent = SENT_NOT;
        row->deliveries--;
    } else {
        if (copy->resent)
            head->unique |= FUSE_UNIQUE_RESEND;
        /* Before the kernel goes on: a server killed in between would never replay INIT to a new session. */
        if (init)
            atomic_store(&control->shared->answered, 1);
        int error = answer(control, reply, length);
        if (error && error != ENOENT)
            say("answer refused opcode=%u length=%zu errno=%d", row->opcode, length, error);
        release(control, i);
    }
    pthread_mutex_unlock(&control->mutex);
}

/* Passes on what the session has answered. False once the session is gone. */
static bool take_answers(struct control *control)
{
    for (;;) {
        ssize_t got = recv(control->session, control->buffer, control->room, MSG_PEEK | MSG_DONTWAIT | MSG_TRUNC);
        if (got < 0)
            return errno == EAGAIN || errno == EINTR;
        if (got == 0)
            return false;
        size_t length = (size_t)got;
        struct fuse_out_header *head = (void *)control->buffer;
        if (length > control->room) {
            *head = (struct fuse_out_header){.len = sizeof *head, .error = -EIO, .unique = head->unique};
            length = sizeof *head;
        }
        if (length >= sizeof *head && head->unique != 0)
            accept_answer(control, control->buffer, length);
        else if (length >= sizeof *head && !queue_push(control->notifications, control->buffer, length))
            say("out of memory: a notification is lost");
        recv(control->session, control->buffer, 1, MSG_DONTWAIT | MSG_TRUNC);
    }
}

static void detach(struct control *control)
{
    pthread_mutex_lock(&control->mutex);
    if (control->session >= 0)
        close(control->session);
    control->session = -1;
    pthread_mutex_unlock(&control->mutex);
}

int control_descriptor(struct control *control, short *events)
{
    pthread_mutex_lock(&control->mutex);
    *events = is_waiting(control) ? POLLIN | POLLOUT : POLLIN;
    int session = control->session;
    pthread_mutex_unlock(&control->mutex);
    return session;
}

void control_pump(struct control *control)
{
    if (control->session >= 0 && !take_answers(control))
        detach(control);
    pthread_mutex_lock(&control->mutex);
    flush(control);
    pthread_mutex_unlock(&control->mutex);
}

/* Decides what a new session gets of the requests that the former one left. */
static void sort_row(struct control *control, unsigned i, uint32_t epoch)
{
    struct shared_row *row = &control->rows[i];
    struct copy *copy = &control->copies[i];
    uint64_t unique = atomic_load(&row->unique);
    if (unique == 0 || copy->answer || (row->sent && row->epoch == epoch))
        return;
    row->sent = SENT_NOT;
    if (!copy->request)
        return; /* the kernel sends it again */
    if (row->deliveries >= most_deliveries(row)) {
        give_up(control, i);
    } else {
        enqueue(control, i);
    }
}

/* INIT must be the first that a session hears of. */
static void greet(struct control *control, uint32_t epoch)
{
    struct shared_header *shared = control->shared;
    size_t length = atomic_load(&shared->init_length);
    if (length == 0 || atomic_load(&shared->init_epoch) == epoch)
        return;
    /* Never answered yet: it is among the rows, and the only one there. */
    if (!atomic_load(&shared->answered))
        return;
    int error = transmit(control, shared->init, length);
    if (error)
        say("a new session cannot be sent INIT errno=%d", error);
    atomic_store(&shared->init_epoch, epoch);
}

void control_attach(struct control *control, int session)
{
    if (control->session >= 0)
        take_answers(control); /* the last words of the former session */
    detach(control);
    int buffer = 0;
    socklen_t length = sizeof buffer;
    getsockopt(session, SOL_SOCKET, SO_SNDBUF, &buffer, &length);
    pthread_mutex_lock(&control->mutex);
    size_t room = buffer > 3 * PAGE ? (size_t)buffer / PAGE * PAGE - 2 * PAGE : PAGE;
    control->limit = room < CONTROL_LIMIT ? room : CONTROL_LIMIT;
    control->session = session;
    uint32_t epoch = (uint32_t)atomic_load(&control->shared->epoch);
    greet(control, epoch);
    for (unsigned i = 0; i < control->high; i++)
        sort_row(control, i, epoch);
    flush(control);
    pthread_mutex_unlock(&control->mutex);
}

/* A notification may wait in the kernel for answers, which the main thread must be free to bring. */
static void *notify(void *argument)
{
    struct control *control = argument;
    struct packet *packet;
    while ((packet = queue_pop(control->notifications))) {
        answer(control, packet->data, packet->length);
        free(packet);
    }
    return NULL;
}

struct control *control_new(struct server *server)
{
    struct control *control = calloc(1, sizeof *control);
    if (!control)
        return NULL;
    control->server = server;
    control->shared = server->shared;
    control->rows = (void *)((unsigned char *)server->shared + server->shared->rows_offset);
    control->room = PAGE + CONTROL_LIMIT;
    control->buffer = locked_memory(server->shared, control->room);
    control->notifications = queue_new();
    control->releases = queue_new();
    control->session = -1;
    control->first = control->last = NONE;
    pthread_mutex_init(&control->mutex, NULL);
    for (unsigned i = 0; i < SHARED_ROWS; i++) {
        struct shared_row *row = &control->rows[i];
        if (atomic_load(&row->unique) != 0)
            control->high = i + 1;
        /* Of the files of a session that does not serve the disk none minds being asked twice. */
        if (row->sent == SENT_PERHAPS && !forwards(server->environment))
            row->sent = SENT_NOT;
    }
    if (!control->buffer || !control->notifications || !control->releases
        || pthread_create(&control->notifier, NULL, notify, control))
        return NULL;
    return control;
}

void control_close(struct control *control)
{
    queue_close(control->notifications);
    pthread_join(control->notifier, NULL);
}
