// SPDX-License-Identifier: Apache-2.0
/* Lines on standard error, which is the session's log; and the clock. */
#include <stdarg.h>
#include <stdio.h>
#include <time.h>
#include <unistd.h>

#include "datapath.h"

uint64_t clock_nanoseconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

/* One write, so that lines of several processes stay whole. */
static void write_line(const char *format, va_list arguments)
{
    char line[512];
    int length = snprintf(line, sizeof line, "posthoc-datapath[%d]: ", (int)getpid());
    int more = vsnprintf(line + length, sizeof line - (size_t)length - 1, format, arguments);
    length = more < (int)sizeof line - length - 1 ? length + more : (int)sizeof line - 2;
    line[length] = '\n';
    if (write(STDERR_FILENO, line, (size_t)length + 1) < 0) {
        /* A log that nobody reads is no reason to stop. */
    }
}

void say(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    write_line(format, arguments);
    va_end(arguments);
}

void say_sometimes(_Atomic uint64_t *count, const char *format, ...)
{
    uint64_t times = atomic_fetch_add(count, 1) + 1;
    if (times & (times - 1))
        return;
    va_list arguments;
    va_start(arguments, format);
    write_line(format, arguments);
    va_end(arguments);
}
