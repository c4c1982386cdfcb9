// SPDX-License-Identifier: Apache-2.0
/* Requests that were in service when a server died of a fault (SIGSEGV and the like): one that is always the
 * death of its server would be sent again for ever, and the guest's disk would hang.
 *
 *   in service   each slot says what is served; whichever thread passes a control request on or its
 *                answer back, often another's, says so in the header
 *   suspect      noted by the keeper when that server is dead; the next one serves it alone (server.c), so
 *                that of several which were in service at a death only the guilty one is there at more
 *   given up     at SUSPECT_LIMIT deaths it is answered with EIO (disk.c, control.c)
 *
 * A server that is killed from outside says nothing of its requests, and is not counted. Only the keeper writes
 * here, while there is no server. Who was answered just before a death stays until a later one takes its place.
 */
#include <signal.h>

#include "datapath.h"

static struct shared_suspect *find(struct shared_header *shared, uint64_t unique)
{
    uint64_t count = atomic_load_explicit(&shared->suspected, memory_order_relaxed);
    for (uint64_t i = 0; i < count && i < SHARED_SUSPECTS; i++)
        if (atomic_load_explicit(&shared->suspects[i].unique, memory_order_relaxed) == unique)
            return &shared->suspects[i];
    return NULL;
}

uint64_t suspects_deaths(struct shared_header *shared, uint64_t unique)
{
    struct shared_suspect *suspect = find(shared, unique & ~FUSE_UNIQUE_RESEND);
    return suspect ? atomic_load_explicit(&suspect->deaths, memory_order_relaxed) : 0;
}

static void note(struct shared_header *shared, uint64_t unique)
{
    struct shared_suspect *suspect = find(shared, unique);
    if (!suspect) {
        suspect = &shared->suspects[atomic_fetch_add(&shared->suspected, 1) % SHARED_SUSPECTS];
        /* In this order: a keeper killed in between accuses nobody of another's deaths. */
        atomic_store(&suspect->deaths, 0);
        atomic_store(&suspect->unique, unique);
    }
    atomic_fetch_add(&suspect->deaths, 1);
}

static bool is_fault(int signal)
{
    return signal == SIGSEGV || signal == SIGBUS || signal == SIGABRT || signal == SIGILL || signal == SIGFPE;
}

static bool contains(const uint64_t *values, unsigned count, uint64_t value)
{
    for (unsigned i = 0; i < count; i++)
        if (values[i] == value)
            return true;
    return false;
}

void suspects_note(struct shared_header *shared, int signal)
{
    struct shared_slot *slots = record_slots(shared);
    /* It alone, where there is one: the death of the main thread over an answer, again and again, would meet the
     * same slow requests in service every time. */
    uint64_t passing = atomic_exchange(&shared->passing, 0);
    if (passing && is_fault(signal))
        note(shared, passing);
    /* One that a thread leaves to another may still be in the slots of both: that is one death, not two. */
    uint64_t served[SHARED_SLOTS];
    for (unsigned i = 0; i < SHARED_SLOTS; i++) {
        served[i] = atomic_exchange(&slots[i].unique, 0);
        if (served[i] && !passing && is_fault(signal) && !contains(served, i, served[i]))
            note(shared, served[i]);
    }
}
