# SPDX-License-Identifier: Apache-2.0
"""What the scan has decided so far: two bitmaps and some counters in one buffer, which may be shared memory.

    buffer    header (64-bit numbers) | diff bitmap | unscanned bitmap

A segment is dirty while `diff` or `unscanned` has its bit. Both begin as "nothing decided", and a decision
sets the diff bit before it clears the unscanned bit, so that whatever a killed process leaves behind is a
valid map: a decision cut in the middle is still unscanned, is dirty, and is made again.
"""

from __future__ import annotations

import threading

import numpy as np
import numpy.typing as npt

from dirtymap import bitmap
from scanner import plan

_MAGIC = 0x706F7374_686F6331
_HEADER_NUMBERS = 32
_HEADER = _HEADER_NUMBERS * 8
# Numbers of the header: what they are, the geometry, read errors, then one for each reason of plan.REASONS.
_AT_MAGIC, _AT_SIZE, _AT_GRANULARITY, _AT_ERRORS, _AT_REASONS = 0, 1, 2, 3, 8

# Segments that are decided or copied in one go under the lock, for which `cat status` may have to wait.
_STEP = 1 << 22


def buffer_length(size: int, granularity: int) -> int:
    """Return the bytes that the decisions on a disk of `size` bytes need."""
    return _HEADER + 2 * bitmap.buffer_length(size, granularity)


class Decisions:
    """The decisions on a disk of `size` bytes at `granularity`. Safe to use from several threads.

    `buffer`, if given, is writable memory of at least `buffer_length(size, granularity)` bytes. Where it
    holds decisions of the same geometry, those are taken over; anything else is overwritten.
    """

    def __init__(self, size: int, granularity: int, buffer: bitmap.Buffer | None = None) -> None:
        self.size = size
        self.granularity = granularity
        if buffer is None:
            buffer = np.zeros(buffer_length(size, granularity), np.uint8)
        memory = np.frombuffer(buffer, np.uint8, count=buffer_length(size, granularity))
        half = bitmap.buffer_length(size, granularity)
        self._numbers: npt.NDArray[np.int64] = memory[:_HEADER].view(np.int64)
        self.diff = bitmap.Bitmap(size, granularity, memory[_HEADER : _HEADER + half])
        self.unscanned = bitmap.Bitmap(size, granularity, memory[_HEADER + half :])
        self._lock = threading.Lock()
        self._decided = self._differing = 0
        self._resets = 0
        if (
            self._numbers[_AT_MAGIC],
            self._numbers[_AT_SIZE],
            self._numbers[_AT_GRANULARITY],
        ) == (_MAGIC, size, granularity):
            self._take_over()
        else:
            self._begin()

    def _begin(self) -> None:
        self._numbers[_AT_MAGIC] = 0
        self._numbers[_AT_SIZE] = self.size
        self._numbers[_AT_GRANULARITY] = self.granularity
        self.reset()
        # Last: a process killed before leaves a buffer that is begun again.
        self._numbers[_AT_MAGIC] = _MAGIC

    def _take_over(self) -> None:
        # Counted anew, since the bitmaps are the truth; what was skipped may lack the last decisions.
        self._decided = self.size - self.unscanned.dirty_bytes()
        self._differing = self.diff.dirty_bytes()
        if self._skipped() > self._decided:
            # Killed in the middle of a reset.
            self._numbers[_AT_ERRORS:] = 0

    def reset(self) -> None:
        """Forget every decision: all is unscanned. No scan may be running on these decisions."""
        with self._lock:
            self._resets += 1
            # In this order: at no moment is a segment neither unscanned nor decided.
            self.unscanned.fill()
            self.diff.erase()
            self._numbers[_AT_ERRORS:] = 0
            self._decided = self._differing = 0

    # Decisions, each on segments from `first` on

    def compared(self, first: int, mask: npt.NDArray[np.bool_], *, one_side: bool = False) -> None:
        """Decide `len(mask)` segments that were read: those with a true `mask` differ."""
        with self._lock:
            if mask.any():
                before = self.diff.unpack(first, len(mask))
                self._differing += self._bytes_where(first, mask & ~before)
                self.diff.set_where(first, mask)
            decided = self._clear(first, len(mask))
            if one_side:
                self._add(plan.ONE_SIDE, decided)

    def equal(self, first: int, count: int, reason: str) -> None:
        """Decide `count` segments that are known to be equal without being read."""
        for begin in range(first, first + count, _STEP):
            with self._lock:
                self._add(reason, self._clear(begin, min(_STEP, first + count - begin)))

    def written(self, first: int, mask: npt.NDArray[np.bool_]) -> None:
        """Decide the segments with a true `mask`: the write bitmap has them, and with it every map."""
        with self._lock:
            fresh = mask & self.unscanned.unpack(first, len(mask))
            self.unscanned.clear_where(first, mask)
            decided = self._bytes_where(first, fresh)
            self._decided += decided
            self._add(plan.WRITTEN, decided)

    def failed_read(self) -> None:
        """Count one run of bytes that could not be read; the caller decides its segments as differing."""
        with self._lock:
            self._numbers[_AT_ERRORS] += 1

    def _clear(self, first: int, count: int) -> int:
        """Clear `count` unscanned bits and return the bytes that this newly decided."""
        if self.unscanned.all(first, count):
            decided = self._bytes(first, count)
        else:
            # Decided before in part: read again because a neighbour had to be.
            decided = self._bytes_where(first, self.unscanned.unpack(first, count))
        self.unscanned.clear(first, count)
        self._decided += decided
        return decided

    def _add(self, reason: str, length: int) -> None:
        self._numbers[_AT_REASONS + plan.REASONS.index(reason)] += length

    def _bytes(self, first: int, count: int) -> int:
        return min((first + count) * self.granularity, self.size) - first * self.granularity

    def _bytes_where(self, first: int, mask: npt.NDArray[np.bool_]) -> int:
        total = int(np.count_nonzero(mask)) * self.granularity
        if len(mask) and first + len(mask) == self.diff.segments and mask[-1]:
            total -= self.diff.segments * self.granularity - self.size
        return total

    # Looking at them

    def map(self, written: bitmap.Bitmap | None = None) -> bitmap.Bitmap:
        """Return the dirty map, a copy: diff OR unscanned OR `written`, each bit as of some moment of the call.

        Whatever was dirty at the call's beginning is in it, and later writes may be. `written` has to hold
        everything written since before the scan's first read.
        """
        dirty = bitmap.Bitmap(self.size, self.granularity)
        for begin in range(0, len(dirty.data), _STEP // 8):
            part = slice(begin, begin + _STEP // 8)
            with self._lock:
                found = self.diff.data[part] | self.unscanned.data[part]
                if written is not None:
                    # Last: a segment whose write came later than its decision is then not missed, and one
                    # skipped because of its write bit has lost its unscanned bit only after it.
                    found |= written.data[part]
            # What stays zero needs no memory.
            if found.max():
                dirty.data[part] = found
        return dirty

    def sums(self, written: bitmap.Bitmap) -> tuple[int, int]:
        """Return the bytes of `written` and those of the map, which is not made for it. From any thread.

        Exact when nothing changes meanwhile; else the map's may be too many, never too few: what was unscanned
        before the count, what differs after it, and in between what is written and neither. Whatever is decided
        during the count only moves a segment from the first to one of the others, and it counts twice. A segment
        becomes unscanned again by a reset alone, and then all is counted anew.
        """
        while True:
            with self._lock:
                resets, undecided = self._resets, self.size - self._decided
            covered, beyond = written.dirty_bytes_without((self.diff, self.unscanned))
            with self._lock:
                differing = self._differing
                if resets != self._resets:
                    continue
            return covered, min(self.size, undecided + differing + beyond)

    def undecided(self) -> list[tuple[int, int]]:
        """Return (start, length) in bytes of everything not decided yet."""
        with self._lock:
            left = self.unscanned.copy()
        if left.segments and left.all(0, left.segments):
            return [(0, self.size)]
        return [(extent.start, extent.length) for extent in left.extents()]

    @property
    def complete(self) -> bool:
        """Whether every segment is decided."""
        return self._decided == self.size

    def figures(self) -> tuple[int, int, dict[str, int], int]:
        """Return (bytes decided, bytes differing, bytes saved by reason, read errors) of one instant."""
        with self._lock:
            savings = {
                reason: int(self._numbers[_AT_REASONS + at])
                for at, reason in enumerate(plan.REASONS)
            }
            return self._decided, self._differing, savings, int(self._numbers[_AT_ERRORS])

    def _skipped(self) -> int:
        return sum(
            int(self._numbers[_AT_REASONS + at])
            for at, reason in enumerate(plan.REASONS)
            if reason != plan.ONE_SIDE
        )
