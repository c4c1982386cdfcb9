// SPDX-License-Identifier: Apache-2.0
/* In front of a session that serves the disk itself, because that disk is no file (an NBD export). Every
 * request goes to the session, and this program adds what pyfuse3 lacks: it knows no FALLOCATE.
 *
 *   FALLOCATE   header | fh, offset, length, mode
 *   SETXATTR    header | size, flags [, flags, padding] | "posthoc.fallocate\0" | mode, offset, length
 *                                                        | "posthoc.drain\0"
 *
 * Both are answered by a bare header, so the answer needs no change. overlayfs/allocation.py takes the
 * value apart: three 64-bit words. A client's own SETXATTR goes no further than this: it would change the
 * disk behind the kernel's back, which drops cached pages for a FALLOCATE only.
 */
#include <errno.h>
#include <string.h>

#include "datapath.h"

/* Writes such a request behind its header, completes that, and returns the length. */
static size_t write_setxattr(struct shared_header *shared, unsigned char *request, const char *name,
                             const void *value, size_t length)
{
    struct fuse_in_header *head = (void *)request;
    struct fuse_setxattr_in in = {.size = (uint32_t)length};
    bool extended = atomic_load(&shared->granted_flags) & FUSE_SETXATTR_EXT;
    size_t form = extended ? sizeof in : FUSE_COMPAT_SETXATTR_IN_SIZE;
    unsigned char *at = request + sizeof *head;
    memcpy(at, &in, form);
    memcpy(at += form, name, strlen(name) + 1);
    memcpy(at += strlen(name) + 1, value, length);
    head->opcode = FUSE_SETXATTR;
    head->len = (uint32_t)(at + length - request);
    return head->len;
}

size_t forward_drain(struct shared_header *shared, unsigned char *request, uint64_t unique)
{
    struct fuse_in_header head = {.unique = unique, .nodeid = DISK_INODE};
    memcpy(request, &head, sizeof head);
    return write_setxattr(shared, request, "posthoc.drain", "", 0);
}

/* In place: a reader's memory has room. */
static size_t as_setxattr(struct shared_header *shared, unsigned char *request)
{
    struct fuse_fallocate_in in;
    memcpy(&in, request + sizeof(struct fuse_in_header), sizeof in);
    const uint64_t value[] = {in.mode, in.offset, in.length};
    return write_setxattr(shared, request, "posthoc.fallocate", value, sizeof value);
}

void forward_request(struct worker *worker, size_t length)
{
    struct server *server = worker->server;
    const struct fuse_in_header *head = (void *)worker_request(worker);
    if (head->opcode == FUSE_SETXATTR) {
        /* As pyfuse3 without such a handler; the kernel asks no more. */
        worker_reply(worker, head->unique, ENOSYS, 0);
        return;
    }
    if (head->opcode == FUSE_FALLOCATE)
        length = as_setxattr(server->shared, worker_request(worker));
    control_request(server->control, worker_request(worker), length);
}
