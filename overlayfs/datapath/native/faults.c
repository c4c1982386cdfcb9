// SPDX-License-Identifier: Apache-2.0
/* Test builds only: delays and sabotage, named in POSTHOC_FAULTS, to show that a check can fail.
 *
 *   POSTHOC_FAULTS=before-write=300,no-drain,mask=8000000000,crash=327681
 *   (a delay in microseconds; a sabotage; INIT flags to hide, in hexadecimal; what to die of every time: a read, write
 *   or discard that begins there, or with crash-send and crash-answer an opcode on its way to the session or back)
 *
 * data-race, overflow and undefined are what the sanitizers must find. Only the first server does it: a request is
 * sent again until a server lives to answer it.
 */
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "datapath.h"

static char faults[512];

void faults_read_environment(void)
{
    const char *value = getenv("POSTHOC_FAULTS");
    /* Framed by commas, so that a whole word can be searched for. */
    faults[0] = ',';
    if (value)
        strncpy(faults + 1, value, sizeof faults - 3);
    strcat(faults, ",");
}

/* Returns what follows `name`, or NULL where it is not among the faults. */
static const char *find(const char *name)
{
    size_t length = strlen(name);
    for (const char *at = faults; (at = strchr(at, ',')) && at[1]; at++)
        if (strncmp(at + 1, name, length) == 0 && (at[1 + length] == ',' || at[1 + length] == '='))
            return at + 1 + length;
    return NULL;
}

void faults_delay(const char *place)
{
    const char *value = find(place);
    if (!value)
        return;
    long microseconds = strtol(value + 1, NULL, 10);
    struct timespec time = {microseconds / 1000000, microseconds % 1000000 * 1000};
    nanosleep(&time, NULL);
}

bool faults_sabotage(const char *what)
{
    return find(what) != NULL;
}

void faults_crash(const char *name, uint64_t value)
{
    static int *volatile nowhere;
    const char *wanted = find(name);
    if (wanted && strtoull(wanted + 1, NULL, 10) == value)
        *nowhere = 1;
}

void faults_break_rules(const struct shared_header *shared)
{
    static int shared_without_a_lock, largest = 0x7fffffff;
    static volatile int beyond = 8;
    if (atomic_load(&shared->servers) > 1)
        return;
    if (find("data-race"))
        shared_without_a_lock++;
    if (find("overflow")) {
        volatile char *eight = malloc(8);
        eight[beyond] = 1;
        free((void *)eight);
    }
    if (find("undefined"))
        largest += beyond;
}

uint64_t faults_masked_flags(void)
{
    const char *value = find("mask");
    return value ? strtoull(value + 1, NULL, 16) : 0;
}
