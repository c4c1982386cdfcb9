# SPDX-License-Identifier: Apache-2.0
"""Judges of what differs, in plain Python: nothing here may import from the product."""

import dataclasses
import io
import os
import pathlib

_PIECE = 1 << 20


def size_of(path: str | os.PathLike[str]) -> int:
    """Return the bytes of a file or block device (whose st_size is 0)."""
    with open(path, "rb") as file:
        return file.seek(0, os.SEEK_END)


def differing(
    live: str | os.PathLike[str], reference: str | os.PathLike[str], granularity: int
) -> set[int]:
    """Return the segments of `live` that differ from `reference`.

    A shorter reference has zeros beyond its end; what a longer one has there belongs to no segment.
    """
    found: set[int] = set()
    step = max(granularity, _PIECE)
    with open(live, "rb", buffering=0) as ours, open(reference, "rb", buffering=0) as theirs:
        start = 0
        while data := _read(ours, step):
            other = _read(theirs, len(data)).ljust(len(data), b"\0")
            if data != other:
                first = start // granularity
                found.update(first + i for i in differing_pieces(data, other, granularity))
            start += len(data)
    return found


def differing_pieces(data: bytes, other: bytes, granularity: int) -> set[int]:
    """Return the numbers of the pieces in which two buffers of one length differ."""
    assert len(data) == len(other)
    return {
        start // granularity
        for start in range(0, len(data), granularity)
        if data[start : start + granularity] != other[start : start + granularity]
    }


def _read(file: io.FileIO, length: int) -> bytes:
    """Read `length` bytes, fewer only at the end: one read may return less."""
    pieces = []
    while length and (piece := file.read(length)):
        pieces.append(piece)
        length -= len(piece)
    return b"".join(pieces)


def touched(start: int, length: int, granularity: int) -> set[int]:
    """Return the segments that [start, start + length) touches."""
    if not length:
        return set()
    return set(range(start // granularity, (start + length - 1) // granularity + 1))


@dataclasses.dataclass
class ModelDisk:
    """What a disk holds after some writes, and the segments they touched."""

    content: bytearray
    granularity: int
    written: set[int] = dataclasses.field(default_factory=set)

    @classmethod
    def of(cls, path: str | os.PathLike[str], granularity: int) -> "ModelDisk":
        return cls(bytearray(pathlib.Path(path).read_bytes()), granularity)

    @property
    def size(self) -> int:
        return len(self.content)

    def write(self, start: int, data: bytes) -> None:
        """Write within the disk; beyond its end is the caller's mistake."""
        assert 0 <= start <= start + len(data) <= self.size
        self.content[start : start + len(data)] = data
        self.written |= touched(start, len(data), self.granularity)

    def zero(self, start: int, length: int) -> None:
        self.write(start, bytes(length))

    def read(self, start: int, length: int) -> bytes:
        return bytes(self.content[start : start + length])

    def differing(self, reference: bytes) -> set[int]:
        """Return the segments in which it differs from `reference`, zeros beyond its end."""
        other = reference[: self.size].ljust(self.size, b"\0")
        return differing_pieces(bytes(self.content), other, self.granularity)
