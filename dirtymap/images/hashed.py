# SPDX-License-Identifier: Apache-2.0
"""References of which only hashes are left: a table of 32 bytes a segment, on disk.

    segment   0      1      2      3      4
    known     hash   zeros  hash   hash   zeros
    table     h0            h2     h3                  packed: what reads as zeros has no entry

The table is read as it is needed (32 bytes for every 64 KiB: 512 MiB for a TiB), a block of it at a time
and thread; memory holds one bit a segment.
"""

from __future__ import annotations

import errno
import itertools
import os
import threading
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from dirtymap import bitmap, extent

HASH_LENGTH = 32
# An entry that equals nothing: the segment could not be read when the table was made. No hash function in
# use is known to give it for any bytes.
UNKNOWN = bytes(HASH_LENGTH)

# Segments whose entries are fetched at once: at most 128 KiB of the table.
_BLOCK = 4096

Positions = npt.NDArray[np.int64]
Hasher = Callable[[memoryview], bytes]


class HashedReference:
    """The hashes in the file `fd`, from `offset` on; owned, and closed with this. Thread-safe.

    `zeros` are the segments known to be zeros. `packed`: they have no entries in the table.
    """

    def __init__(
        self, name: str, fd: int, offset: int, zeros: bitmap.Bitmap, hasher: Hasher, *, packed: bool
    ) -> None:
        self.name = name
        self.size = zeros.size
        self.granularity = zeros.granularity
        self.zeros = zeros
        self._fd = fd
        self._offset = offset
        self._hasher = hasher
        self._packed = packed
        self._ranks = self._count_entries()
        self._zero_hashes = {
            length: hasher(memoryview(bytes(length)))
            for length in {self.granularity, self._length(zeros.segments - 1)}
        }
        self._cache = threading.local()

    def _count_entries(self) -> list[int]:
        """Return the number of table entries before each block of segments."""
        ranks = [0]
        for first in range(0, self.zeros.segments, _BLOCK):
            count = min(_BLOCK, self.zeros.segments - first)
            if self._packed:
                count -= int(np.count_nonzero(self.zeros.unpack(first, count)))
            ranks.append(ranks[-1] + count)
        return ranks

    @property
    def entries(self) -> int:
        """How many hashes the table has."""
        return self._ranks[-1]

    def _length(self, segment: int) -> int:
        return min(self.granularity, self.size - segment * self.granularity)

    def equal(self, segment: int, data: memoryview) -> bool:
        """Return whether `data` is what the segment held; raises OSError where the table cannot be read."""
        if len(data) != self._length(segment):
            raise ValueError(f"{len(data)} bytes for segment {segment}")
        found = self._hasher(data)
        if self.zeros.get(segment):
            return found == self._zero_hashes[len(data)]
        return found == self._entry(segment)

    def _entry(self, segment: int) -> bytes:
        block, within = divmod(segment, _BLOCK)
        if getattr(self._cache, "block", None) != block:
            self._cache.positions, self._cache.table = self._fetch(block)
            self._cache.block = block
        at = int(self._cache.positions[within]) * HASH_LENGTH
        entry: bytes = self._cache.table[at : at + HASH_LENGTH]
        return entry

    def _fetch(self, block: int) -> tuple[Positions, bytes]:
        """Return where in the block's part of the table each segment's entry is, and that part."""
        first = block * _BLOCK
        count = min(_BLOCK, self.zeros.segments - first)
        present = np.ones(count, np.bool_)
        if self._packed:
            present = ~self.zeros.unpack(first, count)
        positions: Positions = np.cumsum(present) - present
        begin, end = self._ranks[block] * HASH_LENGTH, self._ranks[block + 1] * HASH_LENGTH
        table = os.pread(self._fd, end - begin, self._offset + begin)
        if len(table) != end - begin:
            raise OSError(errno.EIO, "the table of hashes has become shorter")
        return positions, table

    def extents(
        self, start: int, length: int, deadline: float | None = None
    ) -> Iterator[extent.Extent]:
        """Yield what is known to be zeros, the rest as data; no I/O, so that no deadline is needed."""
        del deadline
        end, step = start + length, _BLOCK * 256 * self.granularity
        return extent.join(
            part
            for at in range(start, end, step)
            for part in self._extents(at, min(at + step, end))
        )

    def _extents(self, start: int, end: int) -> Iterator[extent.Extent]:
        first = start // self.granularity
        mask = self.zeros.unpack(first, -(-end // self.granularity) - first)
        edges = np.flatnonzero(mask[1:] != mask[:-1]) + 1
        borders = [0, *edges.tolist(), len(mask)]
        for left, right in itertools.pairwise(borders):
            begin = max((first + left) * self.granularity, start)
            stop = min((first + right) * self.granularity, end)
            yield extent.Extent(begin, stop - begin, zero=bool(mask[left]), hole=bool(mask[left]))

    def read_into(self, start: int, buffer: memoryview) -> None:
        """Raise OSError: there are hashes only."""
        raise OSError(errno.EOPNOTSUPP, "holds hashes only, not the disk's bytes")

    def close(self) -> None:
        """Close the table's file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
