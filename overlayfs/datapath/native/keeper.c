// SPDX-License-Identifier: Apache-2.0
/* The keeper: holds every descriptor, does next to nothing, and so lives on. It is the server's parent;
 * when the server dies it has the kernel send the unanswered requests again and starts the next one.
 * When the session dies it starts the session's command line again, or waits for one to adopt the mount;
 * where the session served the disk (forward.c) the mount ends, and the command line takes it away.
 * A keeper that is killed takes its server along (PDEATHSIG). Its standby, a child that only waits for that,
 * has every descriptor too and becomes the next keeper; where both are killed at once the session, which
 * also has them, starts one. When the mount is gone, all of them end.
 *
 *   session  <---- restarted by ---- keeper ---- restarts ----> server
 *      '------ if both are dead: -----^  '------ restarts ----> standby (becomes the keeper)
 *
 * A SOCK_SEQPACKET socket in the session's private folder takes one word a packet:
 *   session   the caller becomes the session: "ok" with its socket and all descriptors, or "busy PID"
 *   resume    "ok": the session, whose keeper has died, goes on with this one
 *   drain     "ok" once every write in flight now is done
 *   swap      the bits written so far are moved to `taken`
 *   commit    what was taken is forgotten        back   it is written again
 *   stop      "ok" once the server has finished what it is doing; then everything ends
 *   pids      "KEEPER SERVER SESSION"
 * To the session, unasked: "gone" when the mount is.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "datapath.h"

#define CLIENTS 8
#define MILLISECOND 1000000ULL
#define SECOND (1000 * MILLISECOND)
/* A session that gives up sooner than this after it began to serve is started again ever later; one that is
 * killed is not to blame. */
#define SESSION_QUICK (10 * SECOND)
#define SESSION_DELAY (100 * MILLISECOND)
#define SESSION_LONGEST_DELAY (5 * SECOND)
/* The same for servers, whose delay is constant: guests wait for them. */
#define SERVER_QUICK (10 * MILLISECOND)
#define SERVER_PATIENCE 20
#define SERVER_DELAY (50 * MILLISECOND)
#define BROKEN_LIMIT 5
#define STOP_PATIENCE (10 * SECOND)

struct client {
    int fd; /* -1: free */
    bool draining;
    struct drain drain;
};

struct keeper {
    struct environment *environment;
    struct shared_header *shared;
    int memory; /* the shared memory's descriptor */
    const char *path;
    struct stat name; /* of the socket at `path` */
    int listener;
    int signals;
    struct client clients[CLIENTS];

    pid_t server;
    int channel;
    uint64_t server_began, server_due; /* due: 0 or when the next one is started */
    unsigned server_quick, broken;

    pid_t standby;
    uint64_t standby_began, standby_due;

    int session; /* connection; -1 while there is none */
    bool session_missed; /* its end has been noticed */
    pid_t session_child; /* the one that we started, until it is reaped */
    uint64_t session_began, session_due;
    unsigned session_quick;

    uint64_t stop_deadline;
    bool stopping, done;
};

bool process_start(pid_t pid, uint64_t *start)
{
    char path[64], text[1024];
    snprintf(path, sizeof path, "/proc/%d/stat", (int)pid);
    int file = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t length = file < 0 ? -1 : read(file, text, sizeof text - 1);
    if (file >= 0)
        close(file);
    if (length <= 0)
        return false;
    text[length] = 0;
    /* Field 22; the second is the name, in brackets, with anything in it. */
    char *at = strrchr(text, ')');
    for (int field = 2; at && field < 22; field++)
        at = strchr(at + 1, ' ');
    if (!at)
        return false;
    *start = strtoull(at, NULL, 10);
    return true;
}

/* Kills a process of a former keeper and waits until nothing of it runs. The descriptor pins the pid, so
 * that the start time decides whether it is still the same process. */
static void await_gone(uint64_t pid, uint64_t start)
{
    const struct timespec pause = {0, MILLISECOND};
    uint64_t found;
    int process = -1;
    /* Whatever else is wrong (no memory, no descriptors) passes; going on beside a server that lives would not. */
    while (pid && (process = (int)syscall(SYS_pidfd_open, (pid_t)pid, 0)) < 0 && errno != ESRCH && errno != ENOSYS)
        nanosleep(&pause, NULL);
    if (process < 0)
        return;
    if (process_start((pid_t)pid, &found) && found == start) {
        struct pollfd wanted = {.fd = process, .events = POLLIN};
        syscall(SYS_pidfd_send_signal, process, SIGKILL, NULL, 0);
        while (poll(&wanted, 1, -1) < 0 && errno == EINTR)
            ;
    }
    close(process);
}

/* False if this kernel cannot. */
static bool resend(const struct keeper *keeper)
{
    struct fuse_out_header out = {.len = sizeof out, .error = FUSE_NOTIFY_RESEND, .unique = 0};
    if (!atomic_load(&keeper->shared->init_length))
        return true; /* nothing has been asked yet */
    if (!(atomic_load(&keeper->shared->kernel_flags) & FUSE_HAS_RESEND))
        return false;
    if (write(keeper->environment->fuse, &out, sizeof out) < 0 && errno != ENODEV && errno != ECONNABORTED) {
        say("the kernel refuses to resend errno=%d", errno);
        return false;
    }
    return true;
}

static void close_in_child(struct keeper *keeper)
{
    close(keeper->listener);
    close(keeper->signals);
    if (keeper->channel >= 0)
        close(keeper->channel);
    if (keeper->session >= 0)
        close(keeper->session);
    for (int i = 0; i < CLIENTS; i++)
        if (keeper->clients[i].fd >= 0)
            close(keeper->clients[i].fd);
}

static _Noreturn void become_server(struct keeper *keeper, pid_t parent, int channel)
{
    uint64_t start = 0;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent)
        _exit(EXIT_STOPPED);
    process_start(getpid(), &start);
    atomic_store(&keeper->shared->server_start, start);
    atomic_store(&keeper->shared->server_pid, (uint64_t)getpid());
    close_in_child(keeper);
    close(keeper->memory);
    keeper->environment->channel = channel;
    exit(server_main(keeper->environment));
}

static void start_server(struct keeper *keeper)
{
    int pair[2];
    pid_t parent = getpid();
    keeper->server_due = 0;
    keeper->server_began = clock_nanoseconds();
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair)) {
        keeper->server_due = keeper->server_began + SERVER_DELAY;
        return;
    }
    atomic_fetch_add(&keeper->shared->servers, 1);
    keeper->server = fork();
    if (keeper->server == 0) {
        close(pair[0]);
        become_server(keeper, parent, pair[1]);
    }
    close(pair[1]);
    keeper->channel = pair[0];
    if (keeper->server < 0) {
        say("a server cannot be started errno=%d", errno);
        close(pair[0]);
        keeper->channel = -1;
        keeper->server_due = keeper->server_began + SERVER_DELAY;
    }
}

/* Waits until the keeper is dead, and takes its place: a fresh image with the same descriptors. */
static _Noreturn void become_standby(struct keeper *keeper, pid_t parent)
{
    const struct environment *environment = keeper->environment;
    int process = (int)syscall(SYS_pidfd_open, parent, 0);
    struct pollfd wanted = {.fd = process, .events = POLLIN};
    prctl(PR_SET_NAME, "posthoc-standby");
    close_in_child(keeper);
    /* No longer its child: it died before it could be watched. */
    if (process >= 0 && getppid() == parent)
        while (poll(&wanted, 1, -1) < 0 && errno == EINTR)
            ;
    if (atomic_load(&keeper->shared->ending))
        _exit(0);
    say("keeper died: its standby takes over");
    const int passed[] = {environment->fuse, environment->live, environment->direct, keeper->memory,
                          environment->session};
    char numbers[5][16];
    for (unsigned i = 0; i < 5; i++) {
        snprintf(numbers[i], sizeof numbers[i], "%d", passed[i]);
        if (passed[i] >= 0)
            fcntl(passed[i], F_SETFD, 0);
    }
    execl("/proc/self/exe", "posthoc-datapath", "keeper", numbers[0], numbers[1], numbers[2], numbers[3],
          numbers[4], "-1", keeper->path, (char *)NULL);
    say("no keeper can be started errno=%d", errno);
    _exit(EXIT_BROKEN);
}

static void start_standby(struct keeper *keeper)
{
    uint64_t start = 0;
    pid_t parent = getpid();
    keeper->standby_due = 0;
    keeper->standby_began = clock_nanoseconds();
    keeper->standby = fork();
    if (keeper->standby == 0)
        become_standby(keeper, parent);
    if (keeper->standby < 0) {
        keeper->standby_due = keeper->standby_began + SECOND;
        return;
    }
    process_start(keeper->standby, &start);
    atomic_store(&keeper->shared->standby_start, start);
    atomic_store(&keeper->shared->standby_pid, (uint64_t)keeper->standby);
}

static void end_standby(struct keeper *keeper)
{
    if (keeper->standby <= 0)
        return;
    kill(keeper->standby, SIGKILL);
    waitpid(keeper->standby, NULL, 0);
    keeper->standby = 0;
}

static void standby_reaped(struct keeper *keeper)
{
    uint64_t now = clock_nanoseconds();
    keeper->standby = 0;
    keeper->standby_due = now - keeper->standby_began < SERVER_QUICK ? now + SERVER_DELAY : now;
}

static void reply(int client, const char *word)
{
    if (send(client, word, strlen(word), MSG_DONTWAIT | MSG_NOSIGNAL) < 0) {
        /* Whoever asked has left. */
    }
}

static void drop_client(struct client *client)
{
    close(client->fd);
    client->fd = -1;
    client->draining = false;
}

/* The name may be another keeper's by now: of a new mount at the same place, after a lazy umount of this one. */
static void remove_listener(const struct keeper *keeper)
{
    struct stat now;
    if (lstat(keeper->path, &now) == 0 && now.st_dev == keeper->name.st_dev && now.st_ino == keeper->name.st_ino)
        unlink(keeper->path);
}

/* The end of everything: the mount is gone, or was given up. */
static void finish(struct keeper *keeper)
{
    keeper->done = true;
    atomic_store(&keeper->shared->ending, 1);
    remove_listener(keeper);
    for (int i = 0; i < CLIENTS; i++)
        if (keeper->clients[i].fd >= 0)
            reply(keeper->clients[i].fd, "ok");
    if (keeper->session >= 0)
        reply(keeper->session, "gone");
}

static void server_crashed(struct keeper *keeper, int status)
{
    uint64_t now = clock_nanoseconds();
    bool quick = now - keeper->server_began < SERVER_QUICK;
    bool broken = WIFEXITED(status) && WEXITSTATUS(status) == EXIT_BROKEN;
    keeper->server_quick = quick ? keeper->server_quick + 1 : 0;
    keeper->broken = broken ? keeper->broken + 1 : 0;
    say("server died status=%#x: %s", (unsigned)status, "its requests are sent again");
    if (keeper->broken >= BROKEN_LIMIT || !resend(keeper)) {
        say("server not replaced: %s", keeper->broken >= BROKEN_LIMIT
            ? "it cannot start" : "this kernel has no FUSE_NOTIFY_RESEND");
        finish(keeper);
    } else if (keeper->server_quick > SERVER_PATIENCE || broken) {
        keeper->server_due = now + SERVER_DELAY;
    } else {
        start_server(keeper);
    }
}

/* Only here, after waitpid, is no thread of the old server at work any more. */
static void server_reaped(struct keeper *keeper, int status)
{
    keeper->server = 0;
    close(keeper->channel);
    keeper->channel = -1;
    suspects_note(keeper->shared, WIFSIGNALED(status) ? WTERMSIG(status) : 0);
    bool gone = WIFEXITED(status) && WEXITSTATUS(status) == EXIT_GONE;
    if (gone || keeper->stopping)
        finish(keeper);
    else
        server_crashed(keeper, status);
}

static _Noreturn void become_session(char *restart)
{
    static char *words[256];
    sigset_t none;
    unsigned count = 0;
    for (char *word = restart; *word && count < 255; word += strlen(word) + 1)
        words[count++] = word;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    setsid();
    execv(words[0], words);
    say("session cannot be started errno=%d", errno);
    _exit(127);
}

static void start_session(struct keeper *keeper)
{
    keeper->session_due = 0;
    keeper->session_began = clock_nanoseconds();
    atomic_fetch_add(&keeper->shared->sessions, 1);
    keeper->session_child = fork();
    if (keeper->session_child == 0)
        become_session((char *)keeper->shared + keeper->shared->restart_offset);
}

static bool has_restart(const struct keeper *keeper)
{
    const char *restart = (const char *)keeper->shared + keeper->shared->restart_offset;
    return restart[0] != 0;
}

/* The write bitmap has died with the session: who wrote on would be in no map. */
static void end_with_session(struct keeper *keeper)
{
    say("session died: the mount ends with it");
    if (has_restart(keeper))
        start_session(keeper);
    finish(keeper);
}

static void plan_session(struct keeper *keeper, bool quick)
{
    if (keeper->done || keeper->stopping || keeper->session_due)
        return;
    if (forwards(keeper->environment)) {
        end_with_session(keeper);
        return;
    }
    if (!has_restart(keeper))
        return;
    keeper->session_quick = quick ? keeper->session_quick + 1 : 0;
    uint64_t delay = 0;
    if (keeper->session_quick > 0)
        delay = keeper->session_quick < 6 ? SESSION_DELAY << (keeper->session_quick - 1) : SESSION_LONGEST_DELAY;
    keeper->session_due = clock_nanoseconds() + delay;
    say("session ended: started again in %u ms", (unsigned)(delay / MILLISECOND));
}

static void session_reaped(struct keeper *keeper, int status)
{
    bool gave_up = WIFEXITED(status) && clock_nanoseconds() - keeper->session_began < SESSION_QUICK;
    keeper->session_child = 0;
    /* Else another has come, or its connection's end is about to be read. */
    if (keeper->session < 0)
        plan_session(keeper, gave_up);
}

static void reap(struct keeper *keeper)
{
    struct signalfd_siginfo information;
    int status;
    pid_t pid;
    while (read(keeper->signals, &information, sizeof information) > 0) {
        /* Asked to end, which only a session may decide while there is one. */
        if (information.ssi_signo == SIGTERM && keeper->session < 0)
            finish(keeper);
    }
    while (!keeper->done && (pid = waitpid(-1, &status, WNOHANG)) > 0) {
        if (pid == keeper->server) {
            server_reaped(keeper, status);
        } else if (pid == keeper->standby) {
            standby_reaped(keeper);
        } else if (pid == keeper->session_child) {
            session_reaped(keeper, status);
        }
    }
}

static int send_descriptors(int socket, const char *word, const int *descriptors, unsigned count)
{
    union {
        struct cmsghdr head;
        char room[CMSG_SPACE(8 * sizeof(int))];
    } ancillary = {0};
    struct iovec part = {(char *)word, strlen(word)};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = &ancillary,
                             .msg_controllen = CMSG_SPACE(count * sizeof(int))};
    struct cmsghdr *head = CMSG_FIRSTHDR(&message);
    head->cmsg_level = SOL_SOCKET;
    head->cmsg_type = SCM_RIGHTS;
    head->cmsg_len = CMSG_LEN(count * sizeof(int));
    memcpy(CMSG_DATA(head), descriptors, count * sizeof(int));
    return sendmsg(socket, &message, MSG_NOSIGNAL | MSG_DONTWAIT) < 0 ? errno : 0;
}

/* As large as those of the pair before; the kernel reports twice what was asked for. */
static void copy_buffer_size(int from, int to)
{
    int size = 0;
    socklen_t length = sizeof size;
    getsockopt(from, SOL_SOCKET, SO_SNDBUF, &size, &length);
    size /= 2;
    if (setsockopt(to, SOL_SOCKET, SO_SNDBUFFORCE, &size, sizeof size))
        setsockopt(to, SOL_SOCKET, SO_SNDBUF, &size, sizeof size);
}

/* Whether a session holds the other end of the control requests' way, connected here or not (any more). */
static bool session_lives(const struct keeper *keeper)
{
    struct pollfd end = {.fd = keeper->environment->session};
    return poll(&end, 1, 0) == 0;
}

static void connect_session(struct keeper *keeper, int client)
{
    keeper->session = client;
    keeper->session_missed = false;
    keeper->session_began = clock_nanoseconds();
    keeper->session_due = 0;
}

/* The session of a keeper that died comes back. False if `client` cannot be that. */
static bool resume(struct keeper *keeper, int client)
{
    struct pollfd end = {.fd = client};
    /* A client that has given up meanwhile would be taken for a session that has died. */
    if (keeper->session >= 0 || !session_lives(keeper) || poll(&end, 1, 0) != 0)
        return false;
    connect_session(keeper, client);
    reply(client, "ok");
    return true;
}

/* Makes `client` the session. False if there is one already. */
static bool adopt(struct keeper *keeper, int client)
{
    struct environment *environment = keeper->environment;
    int pair[2];
    if (keeper->session >= 0 || session_lives(keeper) || socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair))
        return false;
    copy_buffer_size(environment->session, pair[0]);
    copy_buffer_size(environment->session, pair[1]);
    const int all[] = {pair[1], pair[0], keeper->memory, environment->fuse, environment->live, environment->direct};
    if (send_descriptors(client, "ok", all, environment->direct < 0 ? 5 : 6)) {
        /* It has left at once. */
        close(pair[0]);
        close(pair[1]);
        close(client);
        return true;
    }
    /* What the dead session had swapped out and not committed is dirty again. */
    if (atomic_load(&keeper->shared->swap_state) != SWAP_NONE)
        record_give_back(keeper->shared);
    close(environment->session);
    environment->session = pair[0];
    atomic_fetch_add(&keeper->shared->epoch, 1);
    if (keeper->channel >= 0)
        send_descriptors(keeper->channel, "session", &pair[0], 1);
    close(pair[1]);
    connect_session(keeper, client);
    /* The former one has the former session's socket. */
    end_standby(keeper);
    start_standby(keeper);
    return true;
}

static void refuse_adoption(const struct keeper *keeper, int client)
{
    struct ucred peer = {0};
    socklen_t length = sizeof peer;
    char text[64];
    if (keeper->session >= 0)
        getsockopt(keeper->session, SOL_SOCKET, SO_PEERCRED, &peer, &length);
    snprintf(text, sizeof text, "busy %d", (int)peer.pid);
    reply(client, text);
}

static void tell_pids(const struct keeper *keeper, int client)
{
    struct ucred peer = {0};
    socklen_t length = sizeof peer;
    char text[96];
    if (keeper->session >= 0)
        getsockopt(keeper->session, SOL_SOCKET, SO_PEERCRED, &peer, &length);
    snprintf(text, sizeof text, "%d %d %d", (int)getpid(), (int)keeper->server, (int)peer.pid);
    reply(client, text);
}

static void stop(struct keeper *keeper)
{
    keeper->stopping = true;
    atomic_store(&keeper->shared->ending, 1);
    keeper->stop_deadline = clock_nanoseconds() + STOP_PATIENCE;
    if (keeper->server > 0)
        reply(keeper->channel, "stop");
    else
        finish(keeper);
}

static void obey(struct keeper *keeper, struct client *client, const char *word)
{
    if (strcmp(word, "session") == 0) {
        if (adopt(keeper, client->fd))
            client->fd = -1; /* now keeper->session, or gone */
        else
            refuse_adoption(keeper, client->fd);
    } else if (strcmp(word, "resume") == 0) {
        if (resume(keeper, client->fd))
            client->fd = -1;
        else
            reply(client->fd, "busy");
    } else if (strcmp(word, "swap") == 0) {
        record_swap(keeper->shared);
        reply(client->fd, "ok");
    } else if (strcmp(word, "drain") == 0) {
        client->draining = true;
        drain_begin(&client->drain, keeper->shared);
    } else if (strcmp(word, "commit") == 0) {
        record_commit(keeper->shared);
        reply(client->fd, "ok");
    } else if (strcmp(word, "back") == 0) {
        record_give_back(keeper->shared);
        reply(client->fd, "ok");
    } else if (strcmp(word, "stop") == 0) {
        stop(keeper);
    } else if (strcmp(word, "pids") == 0) {
        tell_pids(keeper, client->fd);
    } else {
        reply(client->fd, "unknown");
    }
}

static void listen_to(struct keeper *keeper, struct client *client)
{
    char word[32];
    ssize_t got = recv(client->fd, word, sizeof word - 1, MSG_DONTWAIT);
    if (got < 0 && errno == EAGAIN)
        return;
    if (got <= 0) {
        drop_client(client);
        return;
    }
    word[got] = 0;
    obey(keeper, client, word);
}

static void welcome(struct keeper *keeper)
{
    struct ucred peer = {0};
    socklen_t length = sizeof peer;
    int fd = accept4(keeper->listener, NULL, NULL, SOCK_CLOEXEC);
    if (fd < 0)
        return;
    getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &length);
    for (int i = 0; i < CLIENTS; i++) {
        if (keeper->clients[i].fd < 0 && (peer.uid == getuid() || peer.uid == 0)) {
            keeper->clients[i].fd = fd;
            return;
        }
    }
    close(fd);
}

static void session_spoke(struct keeper *keeper)
{
    char word[32] = {0};
    ssize_t got = recv(keeper->session, word, sizeof word - 1, MSG_DONTWAIT);
    if (got > 0 && strcmp(word, "stop") == 0)
        stop(keeper);
    if (got > 0 || (got < 0 && errno == EAGAIN))
        return;
    close(keeper->session);
    keeper->session = -1;
    keeper->session_missed = true;
    /* A child of ours is about to be reaped, which tells how it ended. */
    if (keeper->session_child <= 0)
        plan_session(keeper, false);
}

/* Before it has come back to this keeper, which took over from another. */
static void session_hung_up(struct keeper *keeper)
{
    keeper->session_missed = true;
    plan_session(keeper, false);
}

/* Does what is due and returns how long poll() may wait, milliseconds. */
static int look_at_clock(struct keeper *keeper)
{
    uint64_t now = clock_nanoseconds(), next = UINT64_MAX;
    bool draining = false;
    for (int i = 0; i < CLIENTS; i++) {
        struct client *client = &keeper->clients[i];
        if (client->fd >= 0 && client->draining && drain_done(&client->drain, keeper->shared)) {
            client->draining = false;
            reply(client->fd, "ok");
        }
        draining = draining || client->draining;
    }
    if (keeper->server_due && keeper->server_due <= now)
        start_server(keeper);
    if (keeper->session_due && keeper->session_due <= now)
        start_session(keeper);
    if (keeper->standby_due && keeper->standby_due <= now)
        start_standby(keeper);
    if (keeper->stop_deadline && keeper->stop_deadline <= now && keeper->server > 0) {
        keeper->stop_deadline = 0;
        say("server does not stop: killed");
        kill(keeper->server, SIGKILL);
    }
    const uint64_t times[] = {keeper->server_due, keeper->session_due, keeper->standby_due,
                              keeper->stop_deadline};
    for (unsigned i = 0; i < sizeof times / sizeof *times; i++)
        if (times[i] && times[i] < next)
            next = times[i];
    if (draining)
        return 1;
    if (next == UINT64_MAX)
        return -1;
    return next <= now ? 0 : (int)((next - now) / MILLISECOND + 1);
}

static void run(struct keeper *keeper)
{
    enum { SIGNALS, LISTENER, SESSION, HANG_UP, FIRST_CLIENT };
    while (!keeper->done) {
        struct pollfd wanted[FIRST_CLIENT + CLIENTS] = {
            [SIGNALS] = {.fd = keeper->signals, .events = POLLIN},
            [LISTENER] = {.fd = keeper->listener, .events = POLLIN},
            [SESSION] = {.fd = keeper->session, .events = POLLIN},
            [HANG_UP] = {.fd = keeper->session < 0 && !keeper->session_missed ? keeper->environment->session : -1}};
        for (int i = 0; i < CLIENTS; i++)
            wanted[FIRST_CLIENT + i] = (struct pollfd){.fd = keeper->clients[i].fd, .events = POLLIN};
        int pause = look_at_clock(keeper);
        if (keeper->done || poll(wanted, FIRST_CLIENT + CLIENTS, pause) < 0)
            continue;
        if (wanted[SIGNALS].revents)
            reap(keeper);
        if (wanted[SESSION].revents && !keeper->done)
            session_spoke(keeper);
        if (wanted[HANG_UP].revents && !keeper->done)
            session_hung_up(keeper);
        for (int i = 0; i < CLIENTS && !keeper->done; i++) {
            struct pollfd *client = &wanted[FIRST_CLIENT + i];
            if (client->revents && keeper->clients[i].fd == client->fd)
                listen_to(keeper, &keeper->clients[i]);
        }
        if (wanted[LISTENER].revents && !keeper->done)
            welcome(keeper);
    }
    end_standby(keeper);
}

static int open_listener(const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof address.sun_path)
        return -1;
    strcpy(address.sun_path, path);
    unlink(path);
    int listener = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    mode_t mask = umask(0177);
    bool bound = bind(listener, (struct sockaddr *)&address, sizeof address) == 0;
    umask(mask);
    if (!bound || listen(listener, CLIENTS)) {
        close(listener);
        return -1;
    }
    return listener;
}

static int open_signals(void)
{
    sigset_t set;
    sigfillset(&set);
    sigprocmask(SIG_BLOCK, &set, NULL);
    sigemptyset(&set);
    sigaddset(&set, SIGCHLD);
    sigaddset(&set, SIGTERM);
    return signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
}

/* Takes over from a keeper that was killed: nothing of it or of its server may be left at work. */
static void succeed(struct keeper *keeper)
{
    struct shared_header *shared = keeper->shared;
    await_gone(atomic_load(&shared->keeper_pid), atomic_load(&shared->keeper_start));
    await_gone(atomic_load(&shared->server_pid), atomic_load(&shared->server_start));
    if (atomic_load(&shared->standby_pid) != (uint64_t)getpid())
        await_gone(atomic_load(&shared->standby_pid), atomic_load(&shared->standby_start));
    suspects_note(shared, 0);
    if (atomic_load(&shared->swap_state) == SWAP_TAKING)
        record_give_back(shared);
    uint64_t start = 0;
    process_start(getpid(), &start);
    atomic_store(&shared->keeper_start, start);
    atomic_store(&shared->keeper_pid, (uint64_t)getpid());
}

int keeper_main(struct environment *environment, int memory, int command, const char *path)
{
    static struct keeper keeper;
    prctl(PR_SET_NAME, "posthoc-keeper");
    keeper.environment = environment;
    keeper.shared = environment->shared;
    keeper.memory = memory;
    keeper.path = path;
    keeper.session = command;
    keeper.session_began = clock_nanoseconds();
    keeper.channel = -1;
    for (int i = 0; i < CLIENTS; i++)
        keeper.clients[i].fd = -1;
    keeper.signals = open_signals();
    keeper.listener = open_listener(path);
    if (keeper.signals < 0 || keeper.listener < 0) {
        say("%s: cannot be listened on errno=%d", path, errno);
        return EXIT_BROKEN;
    }
    if (lstat(path, &keeper.name))
        memset(&keeper.name, 0, sizeof keeper.name);
    succeed(&keeper);
    start_standby(&keeper);
    if (atomic_load(&keeper.shared->ending))
        finish(&keeper); /* asked to end when the one before died */
    else if (atomic_load(&keeper.shared->servers) > 0 && !resend(&keeper))
        finish(&keeper);
    else
        start_server(&keeper);
    run(&keeper);
    return 0;
}
