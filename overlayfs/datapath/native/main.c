// SPDX-License-Identifier: Apache-2.0
/* posthoc-datapath: serves the disk of a posthoc mount. Started by the session, never by hand.
 *
 *   posthoc-datapath keeper FUSE LIVE DIRECT MEMORY SESSION COMMAND PATH
 *       six descriptors and the path of the socket to listen on; DIRECT may be -1, LIVE where the session serves
 *       the disk, COMMAND where the session is to come by itself
 *   posthoc-datapath --layout
 *       the layout of the shared memory, a line for each field: name, offset, length
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "datapath.h"

#define HEADER(name) {"header." #name, offsetof(struct shared_header, name), sizeof(((struct shared_header *)0)->name)}
#define SLOT(name) {"slot." #name, offsetof(struct shared_slot, name), sizeof(((struct shared_slot *)0)->name)}
#define ROW(name) {"row." #name, offsetof(struct shared_row, name), sizeof(((struct shared_row *)0)->name)}

static int print_layout(void)
{
    static const struct {
        const char *name;
        size_t offset, length;
    } fields[] = {
        {"header", 0, sizeof(struct shared_header)},
        HEADER(magic), HEADER(version), HEADER(length), HEADER(size), HEADER(granularity_bits),
        HEADER(read_only), HEADER(threads), HEADER(max_write), HEADER(slots_offset), HEADER(rows_offset),
        HEADER(restart_offset), HEADER(restart_length), HEADER(session_offset), HEADER(session_length),
        HEADER(written_offset), HEADER(taken_offset), HEADER(bitmap_length), HEADER(scan_offset),
        HEADER(scan_length), HEADER(kernel_flags), HEADER(granted_flags), HEADER(init_length),
        HEADER(init_epoch), HEADER(answered), HEADER(epoch), HEADER(swap_state), HEADER(keeper_pid),
        HEADER(keeper_start), HEADER(server_pid), HEADER(server_start),
        HEADER(standby_pid), HEADER(standby_start), HEADER(ending), HEADER(servers), HEADER(locked),
        HEADER(sessions), HEADER(attributes_length), HEADER(passing), HEADER(suspected),
        HEADER(attributes), HEADER(init), HEADER(suspects),
        {"slot", SHARED_SLOTS, sizeof(struct shared_slot)},
        SLOT(sequence), SLOT(requests), SLOT(unique), SLOT(kinds),
        {"row", SHARED_ROWS, sizeof(struct shared_row)},
        ROW(unique), ROW(nodeid), ROW(opcode), ROW(epoch), ROW(deliveries), ROW(sent),
    };
    printf("magic %llx %d\n", SHARED_MAGIC, SHARED_VERSION);
    for (size_t i = 0; i < sizeof fields / sizeof *fields; i++)
        printf("%s %zu %zu\n", fields[i].name, fields[i].offset, fields[i].length);
    return 0;
}

/* Returns the descriptor that `text` names, closed on exec from now on. */
static int descriptor(const char *text)
{
    int fd = atoi(text);
    if (fd >= 0)
        fcntl(fd, F_SETFD, FD_CLOEXEC);
    return fd;
}

static struct shared_header *map(int memory)
{
    off_t length = lseek(memory, 0, SEEK_END);
    if (length < (off_t)sizeof(struct shared_header))
        return NULL;
    struct shared_header *shared = mmap(NULL, (size_t)length, PROT_READ | PROT_WRITE, MAP_SHARED, memory, 0);
    if (shared == MAP_FAILED)
        return NULL;
    if (shared->magic != SHARED_MAGIC || shared->version != SHARED_VERSION
        || shared->length != (uint64_t)length || shared->threads + BESIDES > SHARED_SLOTS)
        return NULL;
    return shared;
}

int main(int count, char **words)
{
    if (count == 2 && strcmp(words[1], "--layout") == 0)
        return print_layout();
    if (count != 9 || strcmp(words[1], "keeper") != 0) {
        fprintf(stderr, "posthoc-datapath: started by posthoc mount, not by hand\n");
        return 2;
    }
    static struct environment environment;
    faults_read_environment();
    environment.fuse = descriptor(words[2]);
    environment.live = descriptor(words[3]);
    environment.direct = descriptor(words[4]);
    int memory = descriptor(words[5]);
    environment.session = descriptor(words[6]);
    int command = descriptor(words[7]);
    environment.channel = -1;
    environment.shared = map(memory);
    if (!environment.shared) {
        say("the shared memory is not of this version");
        return EXIT_BROKEN;
    }
    if (chdir("/"))
        return EXIT_BROKEN;
    return keeper_main(&environment, memory, command, words[8]);
}
