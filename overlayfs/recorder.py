# SPDX-License-Identifier: Apache-2.0
"""The write bitmap and what the guest did: operations, bytes, errors, latencies.

One buffer holds all of it, so that it can lie in memory shared with a data path of another process:

    +----------------------------+--------+--------+---------+-----------+
    | write bitmap, 64-bit words |  read  |  write |  flush  |  discard  |
    +----------------------------+--------+--------+---------+-----------+
                                 \\ 212 words of 64 bits each: operations, bytes, errors, 209 buckets

The rule: a segment's bit is set *before* its bytes may change, and only `swap` clears bits. The object
itself is for one thread, the event loop's: `mark` is a plain read-modify-write. Where another process
writes the bitmap (atomically), nothing here may mark; reading is always allowed, and sees each bit as
it was or as it is.

Latency buckets are log-scaled: 8 an octave from 2**10 ns (about a microsecond; all that is faster is in
bucket 0) to 2**36 ns (69 s; all that is slower is in the last), so a percentile is right within 1/8.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from dirtymap import bitmap

READ, WRITE, FLUSH, DISCARD = range(4)
KINDS = 4

FIRST_OCTAVE, LAST_OCTAVE, PER_OCTAVE_BITS = 10, 36, 3
BUCKETS = ((LAST_OCTAVE - FIRST_OCTAVE) << PER_OCTAVE_BITS) + 1

# Words of one kind: operations, bytes, errors, then the histogram.
OPERATIONS, BYTES, ERRORS, HISTOGRAM = range(4)
KIND_WORDS = HISTOGRAM + BUCKETS
STATISTICS_LENGTH = KINDS * KIND_WORDS * 8

Words = npt.NDArray[np.uint64]


def buffer_length(size: int, granularity: int) -> int:
    """Return the bytes that a recorder's buffer needs."""
    return bitmap.buffer_length(size, granularity) + STATISTICS_LENGTH


def bucket(nanoseconds: int) -> int:
    """Return the histogram bucket of a latency."""
    octave = nanoseconds.bit_length() - 1
    if octave < FIRST_OCTAVE:
        return 0
    if octave >= LAST_OCTAVE:
        return BUCKETS - 1
    within = nanoseconds >> (octave - PER_OCTAVE_BITS) & ((1 << PER_OCTAVE_BITS) - 1)
    return (octave - FIRST_OCTAVE << PER_OCTAVE_BITS) | within


def bucket_end(index: int) -> int:
    """Return the latency in nanoseconds that bucket `index` ends below: its exclusive upper bound."""
    octave, within = divmod(index + 1, 1 << PER_OCTAVE_BITS)
    return (1 << PER_OCTAVE_BITS | within) << (FIRST_OCTAVE + octave - PER_OCTAVE_BITS)


@dataclass(frozen=True, slots=True, eq=False)
class KindStatistics:
    """What the guest has done of one kind since the recorder began; `bytes` counts successes only."""

    operations: int
    bytes: int
    errors: int
    histogram: Words

    def since(self, earlier: KindStatistics) -> KindStatistics:
        """Return what was done after `earlier`."""
        return KindStatistics(
            self.operations - earlier.operations,
            self.bytes - earlier.bytes,
            self.errors - earlier.errors,
            self.histogram - earlier.histogram,
        )

    def buckets(self) -> list[tuple[int | None, int]]:
        """Return (nanoseconds, operations) of each bucket that holds any: they ended in less than that.

        None stands for the last bucket's bound, which it has not.
        """
        return [
            (bucket_end(index) if index < BUCKETS - 1 else None, int(self.histogram[index]))
            for index in map(int, np.flatnonzero(self.histogram))
        ]

    def percentile(self, percent: float) -> int | None:
        """Return the nanoseconds within which `percent` of the operations ended, None if there were none.

        It is the upper bound of a bucket, never too low. The last bucket has no bound: its lower one
        stands for it.
        """
        total = int(self.histogram.sum())
        if total == 0:
            return None
        wanted = max(1, -int(-total * percent // 100))
        index = int(np.searchsorted(np.cumsum(self.histogram), wanted))
        return bucket_end(min(index, BUCKETS - 2))


@dataclass(frozen=True, slots=True)
class GuestStatistics:
    """The guest's requests by kind."""

    read: KindStatistics
    write: KindStatistics
    flush: KindStatistics
    discard: KindStatistics

    def since(self, earlier: GuestStatistics) -> GuestStatistics:
        """Return what was done after `earlier`."""
        names = [field.name for field in fields(self)]
        return GuestStatistics(*(getattr(self, n).since(getattr(earlier, n)) for n in names))


def statistics_of(words: Words) -> GuestStatistics:
    """Return what `KINDS * KIND_WORDS` counters say, as they stand at this moment."""
    table = words.reshape(KINDS, KIND_WORDS)
    return GuestStatistics(
        *(
            KindStatistics(
                int(row[OPERATIONS]), int(row[BYTES]), int(row[ERRORS]), row[HISTOGRAM:].copy()
            )
            for row in table
        )
    )


class Recorder:
    """The write bitmap of a disk of `size` bytes, and the guest's statistics.

    `buffer`, if given, is writable memory of at least `buffer_length(size, granularity)` bytes; what
    stands in it is taken over. `depth` is the number of the guest's requests being worked on.
    """

    def __init__(self, size: int, granularity: int, buffer: bitmap.Buffer | None = None) -> None:
        map_length = bitmap.buffer_length(size, granularity)
        length = map_length + STATISTICS_LENGTH
        if buffer is None:
            buffer = np.zeros(length, np.uint8)
        memory = np.frombuffer(buffer, np.uint8, count=length)
        self.written = bitmap.Bitmap(size, granularity, memory[:map_length])
        self.words: Words = memory[map_length:].view(np.uint64)
        self.depth = 0

    def mark(self, start: int, length: int) -> None:
        """Record that bytes [start, start + length) are about to change. Never waits."""
        self.written.set_range(start, length)

    def account(self, kind: int, length: int, nanoseconds: int, *, failed: bool = False) -> None:
        """Count one operation of `kind` that took `nanoseconds`; a failed one moved no bytes."""
        base = kind * KIND_WORDS
        words = self.words
        words[base + OPERATIONS] += 1
        words[base + ERRORS if failed else base + BYTES] += 1 if failed else length
        words[base + HISTOGRAM + bucket(nanoseconds)] += 1

    def statistics(self) -> GuestStatistics:
        """Return the counters as they stand."""
        return statistics_of(self.words)

    def swap(self) -> bitmap.Bitmap:
        """Return the write bitmap and begin an empty one: the only place where bits are cleared.

        Nothing is awaited between the copy and the erasure, so no mark can fall between them. Writes
        in flight at this moment stand in the returned bitmap only: whoever reads the disk for it waits
        until they are done (a data path's `drain`) first. Measured without that wait: 11 segments lost.
        """
        taken = self.written.copy()
        self.written.erase()
        return taken
