// SPDX-License-Identifier: Apache-2.0
/* In front of a session that serves the disk itself, because that disk is no file (an NBD export). Every
 * request goes to the session, and this program adds what pyfuse3 lacks: it knows no FALLOCATE.
 *
 *   FALLOCATE   header | fh, offset, length, mode
 *   SETXATTR    header | size, flags [, flags, padding] | "posthoc.fallocate\0" | mode, offset, length
 *
 * Both are answered by a bare header, so the answer needs no change. overlayfs/allocation.py takes the
 * value apart: three 64-bit words. A client's own SETXATTR goes no further than this: it would change the
 * disk behind the kernel's back, which drops cached pages for a FALLOCATE only.
 */
#include <errno.h>
#include <string.h>

#include "datapath.h"

static const char name[] = "posthoc.fallocate";

/* Puts the other form in the place of the request, and returns its length; a reader's memory has room. */
static size_t as_setxattr(unsigned char *request, uint64_t granted)
{
    struct fuse_in_header *head = (void *)request;
    struct fuse_fallocate_in in;
    struct fuse_setxattr_in out = {0};
    memcpy(&in, request + sizeof *head, sizeof in);
    const uint64_t value[] = {in.mode, in.offset, in.length};
    size_t form = granted & FUSE_SETXATTR_EXT ? sizeof out : FUSE_COMPAT_SETXATTR_IN_SIZE;
    unsigned char *at = request + sizeof *head;
    out.size = sizeof value;
    memcpy(at, &out, form);
    memcpy(at + form, name, sizeof name);
    memcpy(at + form + sizeof name, value, sizeof value);
    head->opcode = FUSE_SETXATTR;
    head->len = (uint32_t)(sizeof *head + form + sizeof name + sizeof value);
    return head->len;
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
        length = as_setxattr(worker_request(worker), atomic_load(&server->shared->granted_flags));
    control_request(server->control, worker_request(worker), length);
}
