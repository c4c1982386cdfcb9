// SPDX-License-Identifier: Apache-2.0
/* The memory that a session, its keeper and its server share. overlayfs/datapath/shared.py mirrors it,
 * and a test holds the two equal through `posthoc-datapath --layout`.
 *
 *   +--------+-------+------+---------+---------+---------+------+------+
 *   | header | slots | rows | restart | session | written | taken| scan |
 *   +--------+-------+------+---------+---------+---------+------+------+
 *
 * header   geometry, fixed by the session that makes it; then what a successor must know
 * slots    one for each request that the server may be in: its sequence number and its statistics
 * rows     control requests that pyfuse3 has not answered yet
 * restart  the command line of a new session: words, each ended by a zero byte, ended by an empty one
 * session  what a new session must know, in the session's own form; unknown here
 * written  the write bitmap: 64-bit words, bit i of the disk is bit i % 64 of word i / 64
 * taken    the bits that the last swap took out of `written`, until they are committed or given back
 * scan     the scanner's; unknown here
 */
#ifndef POSTHOC_SHARED_H
#define POSTHOC_SHARED_H

#include <assert.h>
#include <stdatomic.h>
#include <stdint.h>

#define SHARED_MAGIC 0x31687461706f7470ULL
#define SHARED_VERSION 2
#define SHARED_SLOTS 26
#define SHARED_ROWS 4096
#define SHARED_INIT 256
#define SHARED_ATTRIBUTES 104
#define SHARED_BUCKETS 209
/* Some deaths' worth: each may leave one of every thread. */
#define SHARED_SUSPECTS 128

enum shared_kind { KIND_READ, KIND_WRITE, KIND_FLUSH, KIND_DISCARD, SHARED_KINDS };

/* Steps of a swap. Whoever finds one cut in the middle gives the bits back. */
enum { SWAP_NONE, SWAP_TAKING, SWAP_TAKEN };

/* A server that dies in the act leaves SENT_PERHAPS. */
enum { SENT_NOT, SENT_YES, SENT_PERHAPS };

/* As overlayfs/recorder.py lays out one kind: written by one thread only, read by anyone. */
struct shared_kind_statistics {
    _Atomic uint64_t operations;
    _Atomic uint64_t bytes;
    _Atomic uint64_t errors;
    _Atomic uint64_t buckets[SHARED_BUCKETS];
};

struct shared_slot {
    _Alignas(64) _Atomic uint64_t sequence; /* odd while bytes of the disk may be changing */
    _Atomic uint64_t requests;              /* odd while a request is served */
    _Atomic uint64_t unique;                /* of that request, without FUSE's resend bit, else 0 */
    struct shared_kind_statistics kinds[SHARED_KINDS];
};

/* Free while unique is 0, which is therefore written last and cleared first. */
struct shared_row {
    _Atomic uint64_t unique; /* without FUSE's resend bit */
    uint64_t nodeid;
    uint32_t opcode;
    uint32_t epoch;      /* of the session that it was sent to last */
    uint32_t deliveries; /* how many sessions have got it */
    uint32_t sent;       /* whether the session of `epoch` has it: SENT_... */
};

/* A request that was in service when servers died of a fault: suspects.c. */
struct shared_suspect {
    _Atomic uint64_t unique; /* without FUSE's resend bit */
    _Atomic uint64_t deaths;
};

struct shared_header {
    uint64_t magic;
    uint64_t version;
    uint64_t length; /* of all of it, bytes, like every offset and length below */
    uint64_t size;   /* of the disk */
    uint64_t granularity_bits;
    uint64_t read_only;
    uint64_t threads;
    uint64_t max_write;
    uint64_t slots_offset;
    uint64_t rows_offset;
    uint64_t restart_offset;
    uint64_t restart_length;
    uint64_t session_offset;
    uint64_t session_length;
    uint64_t written_offset;
    uint64_t taken_offset;
    uint64_t bitmap_length;
    uint64_t scan_offset;
    uint64_t scan_length;

    _Atomic uint64_t kernel_flags;  /* what INIT offered, flags | flags2 << 32 */
    _Atomic uint64_t granted_flags; /* what the answer to it took */
    _Atomic uint64_t init_length;   /* of the recorded INIT request, 0 until it has come */
    _Atomic uint64_t init_epoch;    /* the last session that was sent INIT */
    _Atomic uint64_t answered;      /* 1 when INIT has been answered: the mount works */
    _Atomic uint64_t epoch;         /* counts sessions, from 1 */
    _Atomic uint64_t swap_state;
    _Atomic uint64_t keeper_pid;
    _Atomic uint64_t keeper_start; /* clock ticks since boot: a pid alone may have been given anew */
    _Atomic uint64_t server_pid;
    _Atomic uint64_t server_start;
    _Atomic uint64_t standby_pid;
    _Atomic uint64_t standby_start;
    _Atomic uint64_t ending;   /* 1 once all of it is to end: a keeper's death is then no accident */
    _Atomic uint64_t servers;  /* how many have been started */
    _Atomic uint64_t locked;   /* 1 if the server's buffers are locked into memory */
    _Atomic uint64_t sessions; /* restarts of the session by the keeper */
    _Atomic uint64_t attributes_length; /* of the disk's, as the session has told them, 0 until then */
    _Atomic uint64_t passing;   /* unique of the control request that is being sent to the session or comes back */
    _Atomic uint64_t suspected; /* how many suspects there have been */
    unsigned char attributes[SHARED_ATTRIBUTES]; /* struct fuse_attr_out */
    unsigned char init[SHARED_INIT];
    struct shared_suspect suspects[SHARED_SUSPECTS]; /* the last ones */
};

static_assert(sizeof(_Atomic uint64_t) == sizeof(uint64_t), "atomic words are plain words");
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "QEMU's bit order is that of little-endian words");

#endif
