// SPDX-License-Identifier: Apache-2.0
/* The write bitmap: marking, and taking marks out.
 *
 * A writer:    sequence to odd | mark | write | mark again | sequence to even | reply
 * A taker:     swap | drain: wait for every sequence that was odd | read the disk
 *
 * Marked before, so that a scanner that reads the segment in between finds the bit. Marked again after,
 * because a swap may have taken the first mark before the bytes changed. The sequence is written before
 * the bitmap is looked at and the swap happens before the sequences are read (all sequentially
 * consistent): either the writer sees the bit cleared or the taker sees the writer.
 */
#include "datapath.h"

static _Atomic uint64_t *words(struct shared_header *shared, uint64_t offset)
{
    return (_Atomic uint64_t *)((unsigned char *)shared + offset);
}

struct shared_slot *record_slots(struct shared_header *shared)
{
    return (struct shared_slot *)((unsigned char *)shared + shared->slots_offset);
}

static void mark(struct shared_header *shared, uint64_t start, uint64_t length)
{
    if (length == 0)
        return;
    _Atomic uint64_t *written = words(shared, shared->written_offset);
    uint64_t first = start >> shared->granularity_bits;
    uint64_t last = (start + length - 1) >> shared->granularity_bits;
    for (uint64_t word = first / 64; word <= last / 64; word++) {
        uint64_t mask = ~0ULL;
        if (word == first / 64)
            mask &= ~0ULL << first % 64;
        if (word == last / 64)
            mask &= ~0ULL >> (63 - last % 64);
        /* Most writes go where others went: looking is cheaper than a locked operation. */
        if ((atomic_load(&written[word]) & mask) != mask)
            atomic_fetch_or(&written[word], mask);
    }
}

void record_begin(struct shared_header *shared, struct shared_slot *slot, uint64_t start, uint64_t length)
{
    atomic_fetch_add(&slot->sequence, 1);
    if (!faults_sabotage("no-mark-before"))
        mark(shared, start, length);
    faults_delay("before-write");
}

void record_end(struct shared_header *shared, struct shared_slot *slot, uint64_t start, uint64_t length)
{
    faults_delay("after-write");
    if (!faults_sabotage("no-mark-after"))
        mark(shared, start, length);
    atomic_fetch_add(&slot->sequence, 1);
}

/* One writer a word: a plain addition, which other processes see whole. */
static void add(_Atomic uint64_t *word, uint64_t amount)
{
    uint64_t old = atomic_load_explicit(word, memory_order_relaxed);
    atomic_store_explicit(word, old + amount, memory_order_relaxed);
}

/* 8 buckets an octave from 2^10 to 2^36 ns, as overlayfs/recorder.py. */
static unsigned bucket(uint64_t nanoseconds)
{
    if (nanoseconds < 1 << 10)
        return 0;
    unsigned octave = 63 - (unsigned)__builtin_clzll(nanoseconds);
    if (octave >= 36)
        return SHARED_BUCKETS - 1;
    return (octave - 10) << 3 | (nanoseconds >> (octave - 3) & 7);
}

void record_account(struct shared_slot *slot, enum shared_kind kind, uint64_t bytes, bool failed,
                    uint64_t nanoseconds)
{
    struct shared_kind_statistics *statistics = &slot->kinds[kind];
    add(&statistics->operations, 1);
    if (failed)
        add(&statistics->errors, 1);
    else
        add(&statistics->bytes, bytes);
    add(&statistics->buckets[bucket(nanoseconds)], 1);
}

/* Moves the bits of `from` to `to`. A bit is in the target before it leaves the source: whenever this is
 * killed, each is in one of the two, or in both. */
static void move_bits(struct shared_header *shared, uint64_t from, uint64_t to)
{
    _Atomic uint64_t *source = words(shared, from), *target = words(shared, to);
    for (uint64_t i = 0; i < shared->bitmap_length / 8; i++) {
        uint64_t bits = atomic_load(&source[i]);
        if (bits == 0)
            continue;
        atomic_fetch_or(&target[i], bits);
        atomic_fetch_and(&source[i], ~bits);
    }
}

void record_swap(struct shared_header *shared)
{
    atomic_store(&shared->swap_state, SWAP_TAKING);
    move_bits(shared, shared->written_offset, shared->taken_offset);
    atomic_store(&shared->swap_state, SWAP_TAKEN);
}

void record_commit(struct shared_header *shared)
{
    _Atomic uint64_t *taken = words(shared, shared->taken_offset);
    for (uint64_t i = 0; i < shared->bitmap_length / 8; i++)
        atomic_store_explicit(&taken[i], 0, memory_order_relaxed);
    atomic_store(&shared->swap_state, SWAP_NONE);
}

void record_give_back(struct shared_header *shared)
{
    move_bits(shared, shared->taken_offset, shared->written_offset);
    atomic_store(&shared->swap_state, SWAP_NONE);
}

/* For the next server, which has waited until no write of the one before is in flight any more. */
void record_reset_sequences(struct shared_header *shared)
{
    struct shared_slot *slots = record_slots(shared);
    for (unsigned i = 0; i < SHARED_SLOTS; i++) {
        if (atomic_load(&slots[i].sequence) & 1)
            atomic_fetch_add(&slots[i].sequence, 1);
        if (atomic_load(&slots[i].requests) & 1)
            atomic_fetch_add(&slots[i].requests, 1);
    }
}

void drain_begin(struct drain *drain, struct shared_header *shared)
{
    for (unsigned i = 0; i < SHARED_SLOTS; i++)
        drain->sequence[i] = atomic_load(&record_slots(shared)[i].sequence);
}

/* Bounded by the slowest write in flight: writes that began later are not waited for. */
bool drain_done(const struct drain *drain, struct shared_header *shared)
{
    if (faults_sabotage("no-drain"))
        return true;
    for (unsigned i = 0; i < SHARED_SLOTS; i++)
        if (drain->sequence[i] & 1 && atomic_load(&record_slots(shared)[i].sequence) == drain->sequence[i])
            return false;
    return true;
}
