// SPDX-License-Identifier: Apache-2.0
/* The server: threads that read requests from /dev/fuse and serve them, and the main thread, which
 * passes the session's answers on and listens to the keeper.
 *
 * It may be killed at any moment. Then the kernel sends every request without an answer to the next
 * server, and doing one twice is legal: to the guest it has been pending all the while. Two things make
 * that true: the keeper asks for it only when this process is gone for good (so no io_uring, whose
 * writes may outlive it), and the memory that the kernel copies from and to is locked (a copy that
 * faults in a dying process fails the request: 126 of 182 kills with cold buffers, 0 of 411 locked).
 * What servers die of again and again is given up: suspects.c.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <semaphore.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "datapath.h"

/* Linux 5.6, include/uapi/linux/prctl.h. */
#ifndef PR_SET_IO_FLUSHER
#define PR_SET_IO_FLUSHER 57
#endif

/* How often the main thread looks whether every reader is stuck in a request, milliseconds. */
#define WATCH_BUSY 20
#define WATCH_IDLE 200

static sem_t spare_wanted, last_wanted;

unsigned char *locked_memory(struct shared_header *shared, size_t length)
{
    static bool told;
    void *memory = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (memory == MAP_FAILED)
        return NULL;
    errno = EPERM;
    if (faults_sabotage("no-lock") || mlock(memory, length)) {
        atomic_store(&shared->locked, 0);
        if (!told)
            say("buffers are not locked into memory errno=%d: raise RLIMIT_MEMLOCK", errno);
        told = true;
    }
    return memory;
}

void server_wake(struct server *server)
{
    uint64_t one = 1;
    if (write(server->wake, &one, sizeof one) < 0) {
        /* Full: it is awake anyway. */
    }
}

/* Ends all threads; the first code wins. */
void server_end(struct server *server, int code)
{
    int none = 0;
    atomic_compare_exchange_strong(&server->ending, &none, code + 1);
    server_wake(server);
}

void worker_reply(struct worker *worker, uint64_t unique, int error, size_t length)
{
    struct fuse_out_header out = {
        .len = (uint32_t)(sizeof out + (error ? 0 : length)), .error = -error, .unique = unique};
    unsigned char *start = worker_payload(worker) - sizeof out;
    memcpy(start, &out, sizeof out);
    ssize_t put;
    do
        put = write(worker->server->environment->fuse, start, out.len);
    while (put < 0 && errno == EINTR);
    /* ENOENT: the request was aborted. ENODEV: the mount is gone, and the next read says so too. */
    if (put < 0 && errno != ENOENT && errno != ENODEV)
        say("answer refused length=%u errno=%d", out.len, errno);
}

/* A suspect is served while nothing else is: who else is in service would become one, or come nearer to EIO. Writers
 * first, or a busy guest would keep it waiting. Nobody pays for this as long as there are no suspects. */
static pthread_rwlock_t gate = PTHREAD_RWLOCK_WRITER_NONRECURSIVE_INITIALIZER_NP;

static void enter(struct worker *worker, uint64_t unique)
{
    struct shared_header *shared = worker->server->shared;
    atomic_fetch_add_explicit(&worker->slot->requests, 1, memory_order_relaxed);
    if (suspects_deaths(shared, unique) > 0)
        pthread_rwlock_wrlock(&gate);
    else if (atomic_load_explicit(&shared->suspected, memory_order_relaxed) > 0)
        pthread_rwlock_rdlock(&gate);
    atomic_store_explicit(&worker->slot->unique, unique & ~FUSE_UNIQUE_RESEND, memory_order_relaxed);
}

void worker_leave(struct worker *worker)
{
    atomic_store_explicit(&worker->slot->unique, 0, memory_order_relaxed);
    if (atomic_load_explicit(&worker->server->shared->suspected, memory_order_relaxed) > 0)
        pthread_rwlock_unlock(&gate);
    atomic_fetch_add_explicit(&worker->slot->requests, 1, memory_order_relaxed);
}

static void dispatch(struct worker *worker, size_t length, bool (*serve)(struct worker *worker))
{
    const struct fuse_in_header *head = (void *)worker_request(worker);
    if (length < sizeof *head || head->len != length) {
        say("request of %zu bytes that says %u", length, head->len);
        return;
    }
    enter(worker, head->unique);
    if (forwards(worker->server->environment))
        forward_request(worker, length);
    else if (!serve(worker))
        control_request(worker->server->control, worker_request(worker), length);
    if (!worker->away)
        worker_leave(worker);
}

/* Makes what another thread has read the worker's request; returns its length. */
static ssize_t take_over(struct worker *worker, struct packet *packet)
{
    size_t length = packet->length;
    memcpy(worker_request(worker), packet->data, length);
    free(packet);
    return (ssize_t)length;
}

/* Returns a request's length, negative where there is none. */
static ssize_t read_request(struct worker *worker)
{
    struct server *server = worker->server;
    ssize_t got = read(server->environment->fuse, worker_request(worker), server->room);
    if (got >= 0)
        return got;
    if (errno == ENODEV || errno == ECONNABORTED) {
        server_end(server, EXIT_GONE); /* unmounted, or aborted */
    } else if (errno != EINTR && errno != EAGAIN && errno != ENOENT) { /* ENOENT: aborted before it was read */
        say("reading requests failed errno=%d", errno);
        server_end(server, EXIT_BROKEN);
    }
    return -1;
}

/* The same; what was read when all were stuck comes first. */
static ssize_t receive(struct worker *worker)
{
    struct packet *packet = queue_take(worker->server->late);
    return packet ? take_over(worker, packet) : read_request(worker);
}

/* The same, and waits for one. Idle before it looks: read_for_others() looks the other way round. */
static ssize_t await(struct worker *worker, ssize_t (*get)(struct worker *worker))
{
    struct server *server = worker->server;
    struct pollfd fuse = {.fd = server->environment->fuse, .events = POLLIN};
    atomic_fetch_add(&server->idle, 1);
    ssize_t got = get(worker);
    if (got < 0 && server->polled && !atomic_load(&server->ending))
        poll(&fuse, 1, -1);
    atomic_fetch_sub(&server->idle, 1);
    return got;
}

bool worker_serve(struct worker *worker, bool (*serve)(struct worker *worker))
{
    ssize_t got = receive(worker);
    if (got >= 0)
        dispatch(worker, (size_t)got, serve);
    return got >= 0;
}

static void serve_next(struct worker *worker)
{
    ssize_t got = await(worker, receive);
    if (got >= 0)
        dispatch(worker, (size_t)got, disk_serve);
}

static bool serve_packet(struct worker *worker, struct packet *packet)
{
    if (packet)
        dispatch(worker, (size_t)take_over(worker, packet), disk_serve_now);
    return packet;
}

static void *read_requests(void *argument)
{
    struct worker *worker = argument;
    while (!atomic_load(&worker->server->ending))
        serve_next(worker);
    atomic_fetch_sub(&worker->server->alive, 1);
    return NULL;
}

/* Whether a spare reader has more to do: nobody else reads, or something was left to it. */
static bool is_wanted(struct server *server)
{
    return atomic_load(&server->idle) == 0 || !queue_is_empty(server->late);
}

/* A reader for when all others wait for the disk, so that the status can be read whatever it does. */
static void *read_when_stuck(void *argument)
{
    struct worker *worker = argument;
    struct server *server = worker->server;
    while (!atomic_load(&server->ending)) {
        while (sem_wait(&spare_wanted))
            ;
        do
            if (!atomic_load(&server->ending))
                serve_next(worker);
        while (is_wanted(server) && !atomic_load(&server->ending));
    }
    atomic_fetch_sub(&server->alive, 1);
    return NULL;
}

/* When all the spare ones are stuck as well: it reads for others what would make it one of them. */
static void *read_for_others(void *argument)
{
    struct worker *worker = argument;
    struct server *server = worker->server;
    while (!atomic_load(&server->ending)) {
        while (sem_wait(&last_wanted))
            ;
        do {
            ssize_t got = atomic_load(&server->ending) ? -1 : await(worker, read_request);
            if (got >= 0)
                dispatch(worker, (size_t)got, disk_serve_later);
            /* Who is idle now may have looked before it was left. */
            if (!queue_is_empty(server->late))
                sem_post(&spare_wanted);
        } while (atomic_load(&server->idle) == 0 && !atomic_load(&server->ending));
    }
    atomic_fetch_sub(&server->alive, 1);
    return NULL;
}

static void *serve_queue(void *argument)
{
    struct worker *worker = argument;
    while (serve_packet(worker, queue_pop(worker->queue))) {
    }
    atomic_fetch_sub(&worker->server->alive, 1);
    return NULL;
}

struct worker *server_worker(struct server *server)
{
    static_assert(FLIGHTS + BESIDES <= SHARED_SLOTS, "a slot for each");
    if (server->workers == SHARED_SLOTS)
        return NULL;
    struct worker *worker = &server->worker[server->workers];
    worker->server = server;
    worker->slot = record_slots(server->shared) + server->workers;
    worker->arena = locked_memory(server->shared, PAGE + server->shared->max_write + PAGE);
    if (!worker->arena)
        return NULL;
    server->workers++;
    return worker;
}

static bool start_thread(struct worker *worker, void *(*run)(void *), void *argument)
{
    atomic_fetch_add(&worker->server->alive, 1);
    worker->has_thread = pthread_create(&worker->thread, NULL, run, argument) == 0;
    if (!worker->has_thread)
        atomic_fetch_sub(&worker->server->alive, 1);
    return worker->has_thread;
}

static bool start_worker(struct server *server, void *(*run)(void *))
{
    struct worker *worker = server_worker(server);
    return worker && start_thread(worker, run, worker);
}

static bool start_for_queue(struct server *server, struct queue *queue)
{
    struct worker *worker = server_worker(server);
    if (!worker)
        return false;
    worker->queue = queue;
    return start_thread(worker, serve_queue, worker);
}

/* Of the open file, hence as the server before may have left it. */
static void set_blocking(int fuse, bool blocking)
{
    int flags = fcntl(fuse, F_GETFL);
    fcntl(fuse, F_SETFL, blocking ? flags & ~O_NONBLOCK : flags | O_NONBLOCK);
}

static bool start_readers(struct server *server, unsigned count)
{
    bool started = true;
    set_blocking(server->environment->fuse, true);
    server->readers = count;
    for (unsigned i = 0; i < count; i++)
        started = started && start_worker(server, read_requests);
    return started;
}

/* Threads that have many requests with the disk at a time. Not after a fault: a suspect wants to be served alone. */
static bool start_direct(struct server *server)
{
    struct direct *direct[FLIGHTS];
    unsigned threads = (unsigned)server->shared->threads, count = 0, before = server->workers;
    if (atomic_load(&server->shared->suspected) > 0) {
        say("a thread for each request, since a server has died of one");
        return start_readers(server, FLIGHTS);
    }
    if (direct_open(server->environment))
        while (count < threads && (direct[count] = direct_new(server, FLIGHTS / threads)))
            count++;
    if (count < threads) {
        say("a thread for each request: no asynchronous I/O errno=%d", errno);
        server->workers = before;
        return start_readers(server, FLIGHTS);
    }
    set_blocking(server->environment->fuse, false);
    server->polled = true;
    bool started = start_for_queue(server, server->aside);
    for (unsigned i = 0; i < count; i++)
        started = started && start_thread(direct_worker(direct[i]), direct_run, direct[i]);
    return started;
}

static bool start_workers(struct server *server)
{
    bool started = start_worker(server, read_for_others) && start_for_queue(server, server->slow);
    for (unsigned i = 0; i < SPARES; i++)
        started = started && start_worker(server, read_when_stuck);
    if (server->environment->direct >= 0)
        return started && start_direct(server);
    return started && start_readers(server, (unsigned)server->shared->threads);
}

static void serve_rest(struct server *server, struct queue *queue)
{
    while (server->workers > 0 && serve_packet(&server->worker[0], queue_take(queue))) {
    }
}

/* Readers come back from read() by a signal, which they may miss just before it: hence repeated. */
static void join_workers(struct server *server)
{
    const struct timespec pause = {0, 1000000};
    queue_close(server->slow);
    queue_close(server->aside);
    while (atomic_load(&server->alive) > 0) {
        for (unsigned i = 0; i < server->workers; i++) {
            if (server->worker[i].has_thread)
                pthread_kill(server->worker[i].thread, SIGUSR1);
            sem_post(&spare_wanted);
            sem_post(&last_wanted);
        }
        nanosleep(&pause, NULL);
    }
    for (unsigned i = 0; i < server->workers; i++)
        if (server->worker[i].has_thread)
            pthread_join(server->worker[i].thread, NULL);
    /* What was left to threads that had ended by then. */
    serve_rest(server, server->slow);
    serve_rest(server, server->aside);
    serve_rest(server, server->late);
}

/* From the keeper: a new session's socket, or its wish that this server ends. */
static void listen_to_keeper(struct server *server)
{
    char word[16];
    union {
        struct cmsghdr head;
        char room[CMSG_SPACE(sizeof(int))];
    } ancillary;
    struct iovec part = {word, sizeof word};
    struct msghdr message = {
        .msg_iov = &part, .msg_iovlen = 1, .msg_control = &ancillary, .msg_controllen = sizeof ancillary};
    ssize_t got = recvmsg(server->environment->channel, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    if (got < 0)
        return;
    struct cmsghdr *head = CMSG_FIRSTHDR(&message);
    if (head && head->cmsg_type == SCM_RIGHTS) {
        int session;
        memcpy(&session, CMSG_DATA(head), sizeof session);
        control_attach(server->control, session);
    } else {
        server_end(server, EXIT_STOPPED);
    }
}

/* Wakes a spare reader. The one before has not been heard by any: all are stuck, and the last is wanted. */
static void wake_spare(void)
{
    int unheard = 0;
    sem_getvalue(&spare_wanted, &unheard);
    sem_post(unheard > 0 ? &last_wanted : &spare_wanted);
}

/* Wakes a spare reader when nobody reads and nobody has finished anything since the last look. */
static int watch(struct server *server, uint64_t *before)
{
    uint64_t sum = 0;
    for (unsigned i = 0; i < server->workers; i++)
        sum += atomic_load_explicit(&server->worker[i].slot->requests, memory_order_relaxed);
    bool same = sum == *before;
    bool reading = atomic_load(&server->idle) > 0;
    *before = sum;
    if (same && !reading)
        wake_spare();
    return same && reading ? WATCH_IDLE : WATCH_BUSY;
}

static void run(struct server *server)
{
    uint64_t before = 0, count;
    int pause = WATCH_BUSY;
    while (!atomic_load(&server->ending)) {
        struct pollfd wanted[3] = {{.fd = server->wake, .events = POLLIN},
                                   {.fd = server->environment->channel, .events = POLLIN}};
        wanted[2].fd = control_descriptor(server->control, &wanted[2].events);
        int ready = poll(wanted, 3, pause);
        if (wanted[0].revents && read(server->wake, &count, sizeof count) < 0)
            continue;
        if (wanted[1].revents)
            listen_to_keeper(server);
        control_pump(server->control);
        if (ready == 0)
            pause = watch(server, &before);
    }
}

static void ignore(int signal)
{
    (void)signal;
}

/* Only readers listen to SIGUSR1, which they inherit unblocked; the main thread blocks it again. */
static void set_signals(int how)
{
    sigset_t set;
    struct sigaction action = {.sa_handler = ignore}; /* no SA_RESTART: read() must return */
    sigaction(SIGUSR1, &action, NULL);
    sigfillset(&set);
    pthread_sigmask(SIG_BLOCK, &set, NULL);
    sigemptyset(&set);
    sigaddset(&set, SIGUSR1);
    pthread_sigmask(how, &set, NULL);
}

int server_main(struct environment *environment)
{
    static struct server server;
    const struct rlimit none = {0, 0};
    prctl(PR_SET_NAME, "posthoc-server");
    /* A core dump would delay the reaping, and with it the next server. */
    setrlimit(RLIMIT_CORE, &none);
    server.environment = environment;
    server.shared = environment->shared;
    server.block = direct_block(environment->direct);
    if (environment->direct >= 0 && !server.shared->read_only)
        direct_await_others(environment->direct);
    record_reset_sequences(server.shared);
    server.room = WRITE_HEAD + server.shared->max_write;
    /* The kernel gives nothing to who reads with less. */
    if (server.room < FUSE_MIN_READ_BUFFER)
        server.room = FUSE_MIN_READ_BUFFER;
    atomic_store(&server.shared->locked, 1);
    server.wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    server.slow = queue_new();
    server.aside = queue_new();
    server.late = queue_new();
    sem_init(&spare_wanted, 0, 0);
    sem_init(&last_wanted, 0, 0);
    /* Under a loop device or a file system the writer of dirty pages must not wait for pages to be written. */
    prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0);
    set_signals(SIG_BLOCK);
    server.control = control_new(&server);
    if (server.wake < 0 || !server.slow || !server.aside || !server.late || !server.control) {
        say("server cannot start errno=%d", errno);
        return EXIT_BROKEN;
    }
    control_attach(server.control, environment->session);
    set_signals(SIG_UNBLOCK);
    if (!start_workers(&server)) {
        say("threads cannot be started errno=%d", errno);
        server_end(&server, EXIT_BROKEN);
    }
    set_signals(SIG_BLOCK);
    run(&server);
    join_workers(&server);
    control_close(server.control);
    return atomic_load(&server.ending) - 1;
}
