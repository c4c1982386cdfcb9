// SPDX-License-Identifier: Apache-2.0
/* What the parts of posthoc-datapath know of each other.
 *
 *   guest -> kernel -> /dev/fuse -> server's readers -> disk.c    -> live, also by way of direct.c
 *                                                    -> control.c -> socket -> pyfuse3 in the session
 *   or, where the session serves the disk:           -> forward.c -> control.c -> ...
 *   keeper: parent of the server, holds every descriptor, starts the next server when one dies
 *
 * FUSE's messages are those of <linux/fuse.h>.
 */
#ifndef POSTHOC_DATAPATH_H
#define POSTHOC_DATAPATH_H

#include <linux/fuse.h>
#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <sys/types.h>

#include "shared.h"

/* Newer than the headers of some distributions that this is built on. */
#ifndef FUSE_HAS_RESEND
#define FUSE_HAS_RESEND (1ULL << 39)
#define FUSE_NOTIFY_RESEND 7
#endif
#ifndef FUSE_UNIQUE_RESEND
#define FUSE_UNIQUE_RESEND (1ULL << 63)
#endif
#ifndef FUSE_DIRECT_IO_ALLOW_MMAP
#define FUSE_DIRECT_IO_ALLOW_MMAP (1ULL << 36)
#endif
#ifndef FUSE_SETXATTR_EXT
#define FUSE_SETXATTR_EXT (1 << 29)
#endif
#ifndef FUSE_COMPAT_SETXATTR_IN_SIZE
#define FUSE_COMPAT_SETXATTR_IN_SIZE 8
#endif

#define PAGE 4096
/* overlayfs/filesystem.py's number of the disk. */
#define DISK_INODE 2
/* A WRITE's payload begins this far into the request. */
#define WRITE_HEAD (sizeof(struct fuse_in_header) + sizeof(struct fuse_write_in))
/* The largest request or answer of any other inode's data. */
#define CONTROL_LIMIT (128 * 1024)
/* Threads beside the ordinary readers: readers for when all of those are stuck, one for when these are too, one for
 * slow requests (of which the kernel asks one at a time: it holds the inode's lock meanwhile), and one for what goes
 * through the page cache where the rest goes around it. */
#define SPARES 7
#define BESIDES (SPARES + 3)
/* Requests that may be with an O_DIRECT disk at a time. */
#define FLIGHTS 16
/* A request in service at so many deaths of servers is answered with EIO: one may be another's, two a coincidence. */
#define SUSPECT_LIMIT 3

/* How a server ends; any other way it has crashed. */
enum { EXIT_GONE = 0, EXIT_STOPPED = 75, EXIT_BROKEN = 70 };

/* What the keeper and the server are given. */
struct environment {
    struct shared_header *shared;
    int fuse;    /* /dev/fuse, mounted */
    int live;    /* the disk, through the page cache; -1 where the session serves it */
    int direct;  /* the disk, O_DIRECT; -1 where the page cache is wanted */
    int session; /* our end of the socket to pyfuse3 */
    int channel; /* server: to its keeper */
};

/* Whether this stands in front of a session that serves the disk: then the write bitmap is the session's, and
 * the mount ends with it. */
static inline bool forwards(const struct environment *environment)
{
    return environment->live < 0;
}

struct worker {
    struct server *server;
    struct shared_slot *slot;
    /* One page of head, then the payload, so that a WRITE's payload begins on a page of its own. A
     * reply lies in the same memory: its header ends where the payload begins. */
    unsigned char *arena;
    pthread_t thread;
    bool has_thread;
    struct queue *queue; /* whose requests it serves, where it reads none */
    struct flight *flight; /* direct.c's, where it has one */
    bool away;             /* its request is with the disk */
};

struct server {
    struct environment *environment;
    struct shared_header *shared;
    struct control *control;
    size_t block; /* direct_block() */
    bool polled; /* reading /dev/fuse does not wait: direct.c */
    struct queue *slow;  /* requests that may take long, for a thread of their own */
    struct queue *aside; /* reads and writes that are not for direct.c, for a thread of their own */
    struct queue *late; /* requests read when every thread was stuck, for whichever is free first */
    size_t room; /* of a request, bytes */
    unsigned readers; /* threads that serve what they read themselves */
    unsigned workers;
    struct worker worker[SHARED_SLOTS];
    int wake; /* eventfd: the main thread looks around */
    _Atomic int ending; /* an exit code + 1 once the threads are to end */
    _Atomic unsigned alive;
    _Atomic unsigned idle; /* threads waiting for a request in read() or poll() */
    _Atomic unsigned heavy; /* readers in requests that may take long */
};

static inline unsigned char *worker_request(const struct worker *worker)
{
    return worker->arena + PAGE - WRITE_HEAD;
}

static inline unsigned char *worker_payload(const struct worker *worker)
{
    return worker->arena + PAGE;
}

/* server.c */
int server_main(struct environment *environment);
void server_end(struct server *server, int code);
void server_wake(struct server *server);
unsigned char *locked_memory(struct shared_header *shared, size_t length);
/* A worker without a thread; NULL if there is no memory for it. */
struct worker *server_worker(struct server *server);
/* Reads a request, or takes one that was read when all were stuck, and has it served; false where there is none. */
bool worker_serve(struct worker *worker, bool (*serve)(struct worker *worker));
/* What follows a request that was away. */
void worker_leave(struct worker *worker);
/* Answers `unique` with an error (0 or positive) and the `length` bytes at the worker's payload. */
void worker_reply(struct worker *worker, uint64_t unique, int error, size_t length);

/* disk.c: a request of the disk's inode; false if it is not one of those that are done with here. */
bool disk_serve(struct worker *worker);
/* The same for a thread that must not wait for the disk: what might is left to others. */
bool disk_serve_later(struct worker *worker);
/* The same for a thread that must wait for the disk in one place only: direct.c. */
bool disk_serve_aside(struct worker *worker);
/* Serves what was left to others, which is the worker's request now. */
bool disk_serve_now(struct worker *worker);
/* A read or write between the disk and the worker's payload. */
struct transfer {
    bool writes;
    int flags; /* RWF_... */
    uint64_t start;
    size_t length;
    uint64_t begin; /* clock_nanoseconds() */
};
/* Begins the worker's request if it is such a one, in whole blocks, and no write through the page cache is at work or
 * waits for its turn: a write is marked now. */
bool disk_begin(struct worker *worker, struct transfer *transfer);
/* Ends it and answers, when `moved` bytes of it are moved (or a negative errno says why not): the rest is moved here. */
void disk_end(struct worker *worker, const struct transfer *transfer, long moved);

/* direct.c: reads and writes of an O_DIRECT disk, many at a time by one thread. */
/* Waits until no other server's request is with the disk. */
void direct_await_others(int file);
/* Opens the disk once more, so that those of this one can be waited for; false where that cannot be had. */
bool direct_open(struct environment *environment);
/* What both ends of a request are multiples of that goes around the page cache: bytes, a page at least. */
size_t direct_block(int file);
/* For the thread of a worker with a flight: waits until it has no request with the disk. */
void direct_finish(struct worker *worker);
struct direct *direct_new(struct server *server, unsigned flights);
/* The thread; its argument is the struct direct. */
void *direct_run(void *argument);
/* That of a thread, for who has to signal it. */
struct worker *direct_worker(struct direct *direct);

/* forward.c: where the session serves the disk, every request. */
void forward_request(struct worker *worker, size_t length);
/* Writes the question that is answered when all is done that the session was asked before it; returns its length,
 * at most FORWARD_DRAIN. */
#define FORWARD_DRAIN 128
size_t forward_drain(struct shared_header *shared, unsigned char *request, uint64_t unique);

/* control.c: everything else goes to the session, and its answers come back. */
struct control *control_new(struct server *server);
void control_request(struct control *control, unsigned char *request, size_t length);
/* For the main thread: what to poll for, and what to do when it has come. */
int control_descriptor(struct control *control, short *events);
void control_pump(struct control *control);
void control_attach(struct control *control, int session);
void control_close(struct control *control);

/* record.c */
void record_begin(struct shared_header *shared, struct shared_slot *slot, uint64_t start, uint64_t length);
void record_end(struct shared_header *shared, struct shared_slot *slot, uint64_t start, uint64_t length);
void record_account(struct shared_slot *slot, enum shared_kind kind, uint64_t bytes, bool failed,
                    uint64_t nanoseconds);
void record_swap(struct shared_header *shared);
void record_commit(struct shared_header *shared);
void record_give_back(struct shared_header *shared);
void record_reset_sequences(struct shared_header *shared);
struct shared_slot *record_slots(struct shared_header *shared);
/* A drain: the writes in flight when it began, and whether they are done. */
struct drain {
    uint64_t sequence[SHARED_SLOTS];
};
void drain_begin(struct drain *drain, struct shared_header *shared);
bool drain_done(const struct drain *drain, struct shared_header *shared);

/* suspects.c */
/* For the keeper, when `signal` was the end of a server (0: nobody knows) and nothing of it is left. */
void suspects_note(struct shared_header *shared, int signal);
/* At how many deaths a request was in service. */
uint64_t suspects_deaths(struct shared_header *shared, uint64_t unique);

/* queue.c: copies of packets, first in, first out. */
struct packet {
    struct packet *next;
    size_t length;
    unsigned char data[];
};
struct queue *queue_new(void);
/* False if there is no memory for it. */
bool queue_push(struct queue *queue, const void *data, size_t length);
/* Waits; NULL once the queue is closed and empty. The caller frees. */
struct packet *queue_pop(struct queue *queue);
/* Does not wait: NULL where it is empty. */
struct packet *queue_take(struct queue *queue);
bool queue_is_empty(const struct queue *queue);
void queue_close(struct queue *queue);

/* keeper.c */
int keeper_main(struct environment *environment, int memory, int command, const char *path);
bool process_start(pid_t pid, uint64_t *start);

/* log.c */
uint64_t clock_nanoseconds(void);
void say(const char *format, ...) __attribute__((format(printf, 1, 2)));
/* The same for what may come with every request: told at the 1st, 2nd, 4th, 8th... time. */
void say_sometimes(_Atomic uint64_t *count, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* faults.c: for tests only. In the product every one of them is a constant. */
#ifdef POSTHOC_FAULTS
void faults_read_environment(void);
void faults_delay(const char *place);
bool faults_sabotage(const char *what);
uint64_t faults_masked_flags(void);
/* Dies if `name` is among the faults with this value. */
void faults_crash(const char *name, uint64_t value);
void faults_break_rules(const struct shared_header *shared);
#else
static inline void faults_read_environment(void) {}
static inline void faults_delay(const char *place) { (void)place; }
static inline bool faults_sabotage(const char *what) { (void)what; return false; }
static inline uint64_t faults_masked_flags(void) { return 0; }
static inline void faults_crash(const char *name, uint64_t value) { (void)name; (void)value; }
static inline void faults_break_rules(const struct shared_header *shared) { (void)shared; }
#endif

#endif
