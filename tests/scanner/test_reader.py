# SPDX-License-Identifier: Apache-2.0
"""Reading both sides of a run, and what becomes of what cannot be read."""

import errno

import pytest

from dirtymap.images import base
from scanner import progress, reader
from scanner.plan import Kind
from tests.scanner import fakes

G = 512


def disk(*values: int, tail: int = 0) -> fakes.MemoryImage:
    """A disk of one segment for each value, filled with it, and a tail of so many bytes."""
    content = bytearray(b"".join(bytes([value]) * G for value in values) + bytes([9]) * tail)
    return fakes.MemoryImage(content)


def desk(
    live: fakes.MemoryImage, reference: fakes.MemoryImage
) -> tuple[reader.Reader, list[progress.ScanError]]:
    told: list[progress.ScanError] = []
    return reader.Reader(live, reference, G, told.append), told


def test_each_kind_reads_what_it_needs_and_no_more() -> None:
    """Both sides are compared; one side alone is compared with zeros."""
    live, reference = disk(1, 0, 2), disk(1, 3, 0)
    read, _ = desk(live, reference)
    assert read.differing(0, 3 * G, Kind.COMPARE).tolist() == [False, True, True]
    live.reads.clear()
    reference.reads.clear()
    assert read.differing(0, 3 * G, Kind.LIVE).tolist() == [True, False, True]
    assert (live.reads, reference.reads) == ([(0, 3 * G)], [])
    assert read.differing(0, 3 * G, Kind.REFERENCE).tolist() == [True, True, False]
    assert (live.reads, reference.reads) == ([(0, 3 * G)], [(0, 3 * G)])


class DistantImage(fakes.MemoryImage):
    at_once = 4 << 20


def test_a_distant_image_is_asked_for_much_at_once() -> None:
    """So that many requests are on their way: 3.5 times as fast where a server is 20 ms away."""
    content = bytes(range(256)) * (9 << 12)
    near, far = fakes.MemoryImage(bytearray(content)), DistantImage(bytearray(content))
    assert isinstance(far, base.DistantImage)
    assert not isinstance(near, base.DistantImage)
    read, _ = desk(near, near)
    read.differing(0, 9 << 20, Kind.COMPARE)
    assert {length for _, length in near.reads} == {reader.PIECE}
    read, _ = desk(near, far)
    read.differing(0, 9 << 20, Kind.COMPARE)
    assert far.reads == [(0, 4 << 20), (4 << 20, 4 << 20), (8 << 20, 1 << 20)]


class CopiedImage(fakes.MemoryImage):
    gently = 0

    def read_gently(self, start: int, buffer: memoryview) -> None:
        self.gently += len(buffer)
        self.read_into(start, buffer)


def test_what_lies_in_memory_is_read_gently_beside_a_guest() -> None:
    content = bytes(range(256)) * (8 << 12)
    copied, other = CopiedImage(bytearray(content)), fakes.MemoryImage(bytearray(content))
    assert isinstance(copied, base.CopiedImage)
    read, _ = desk(copied, other)
    read.differing(0, 8 << 20, Kind.COMPARE)
    assert copied.gently == 0
    read.gentle = True
    assert not read.differing(0, 8 << 20, Kind.COMPARE).any()
    assert copied.gently == 8 << 20


def test_beyond_the_references_end_are_zeros_and_not_what_was_there_before() -> None:
    """The buffer's old contents must not stand in for what the reference does not have."""
    live, reference = disk(7, 0, 7, 0), disk(7, 7)
    read, _ = desk(live, reference)
    read.differing(0, 2 * G, Kind.COMPARE)
    assert read.differing(G, 3 * G, Kind.COMPARE).tolist() == [True, True, False]


def test_only_the_segments_that_cannot_be_read_count_as_differing() -> None:
    """One bad sector costs one segment; it is told with its side, place and errno."""
    live, reference = disk(1, 1, 1, 1, tail=5), disk(1, 1, 1, 2, tail=5)
    live.faults = [(G + 10, G + 11, OSError(errno.EIO, "bad"))]
    reference.faults = [(4 * G + 4, 4 * G + 5, OSError(errno.EREMOTEIO, "worse"))]
    read, told = desk(live, reference)
    mask = read.differing(0, 4 * G + 5, Kind.COMPARE).tolist()
    assert mask == [False, True, False, True, True]
    assert told == [
        progress.ScanError("live", G, G, errno.EIO),
        progress.ScanError("reference", 4 * G, 5, errno.EREMOTEIO),
    ]


def test_a_segment_unreadable_on_both_sides_is_told_for_both() -> None:
    """Neither side's fault hides the other's."""
    live, reference = disk(1), disk(1)
    live.faults = reference.faults = [(0, G, OSError(errno.EIO, "bad"))]
    read, told = desk(live, reference)
    assert read.differing(0, G, Kind.COMPARE).tolist() == [True]
    assert [error.side for error in told] == ["live", "reference"]


def test_an_error_that_does_not_come_back_is_none() -> None:
    """A chunk that failed once and can then be read segment by segment is compared as usual."""
    live, reference = disk(1, 2), disk(1, 1)
    attempts: list[int] = []

    def fail_once(start: int, length: int) -> None:
        attempts.append(start)
        if len(attempts) == 1:
            raise OSError(errno.ETIMEDOUT, "later")

    live.before = fail_once
    read, told = desk(live, reference)
    assert read.differing(0, 2 * G, Kind.COMPARE).tolist() == [False, True]
    assert told == []


@pytest.mark.parametrize("after", [0, 1], ids=["at-the-chunk", "at-a-segment"])
def test_an_image_that_is_gone_is_not_asked_again_and_again(after: int) -> None:
    """There is no use in reading segment by segment what cannot be reached."""
    live, reference = disk(1, 1, 1), disk(1, 1, 1)
    gone = base.GoneError("the server is away")

    def fail(start: int, length: int) -> None:
        raise gone if len(live.reads) > after else OSError(errno.EIO, "bad")

    live.before = fail
    read, _ = desk(live, reference)
    with pytest.raises(base.GoneError):
        read.differing(0, 3 * G, Kind.COMPARE)
    assert len(live.reads) == after + 1


@pytest.mark.parametrize("block", [G, 4 * G], ids=["same", "coarser"])
@pytest.mark.parametrize("length", [8 * G, 6 * G, 5 * G + 3], ids=["same", "short", "torn"])
def test_a_reference_of_hashes_is_asked_block_by_block(block: int, length: int) -> None:
    """A block that is not the same marks all of its segments; beyond the reference's end are zeros."""
    live = disk(1, 1, 1, 1, 1, 0, 0, 5, tail=5)
    reference = fakes.HashedMemory(bytearray(live.content[:length]), granularity=block)
    reference.content[2 * G] ^= 1
    read, _ = desk(live, reference)
    found = read.differing(0, live.size, Kind.COMPARE).tolist()
    first = 2 * G // block * block
    expected = set(range(first // G, (first + block) // G))
    plain = reference.content.ljust(live.size, b"\0")
    expected |= {
        at // G for at in range(0, live.size, G) if live.content[at : at + G] != plain[at : at + G]
    }
    assert {segment for segment, differs in enumerate(found) if differs} == expected


@pytest.mark.parametrize("kind", [Kind.COMPARE, Kind.REFERENCE], ids=["read", "known-zeros"])
def test_a_block_that_the_live_disk_has_only_in_part_differs(kind: Kind) -> None:
    """Its hash is of bytes that are not there: also where those that are have not changed."""
    content = disk(*[0] * 10).content
    reference = fakes.HashedMemory(content, granularity=4 * G)
    live = fakes.MemoryImage(content[: 5 * G + 3])
    read, told = desk(live, reference)
    assert read.differing(0, live.size, kind).tolist() == [False] * 4 + [True] * 2
    assert told == []


def test_a_table_of_hashes_that_cannot_be_read_leaves_its_blocks_in_doubt() -> None:
    """A bad sector of the manifest's own is the reference's error, not the end of the scan."""
    live = disk(*[1] * 8)
    reference = fakes.HashedMemory(bytearray(live.content), granularity=4 * G)
    reference.faults = [(5 * G, 5 * G + 1, OSError(errno.EIO, "bad"))]
    read, told = desk(live, reference)
    assert read.differing(0, 8 * G, Kind.COMPARE).tolist() == [False] * 4 + [True] * 4
    assert told == [progress.ScanError("reference", 4 * G, 4 * G, errno.EIO)]


def test_a_live_disk_that_is_zero_is_compared_with_hashes_without_a_read() -> None:
    """Hashes cannot be read, but what the live disk holds is known."""
    live, reference = disk(0, 0, 0), fakes.HashedMemory(disk(0, 1, 0).content, granularity=G)
    read, _ = desk(live, reference)
    assert read.differing(0, 3 * G, Kind.REFERENCE).tolist() == [False, True, False]
    assert live.reads == []


def test_a_block_that_cannot_be_read_is_dirty_as_a_whole() -> None:
    """With hashes of larger blocks an unreadable sector leaves the whole block in doubt."""
    live = disk(*[1] * 8)
    reference = fakes.HashedMemory(bytearray(live.content), granularity=4 * G)
    live.faults = [(5 * G, 5 * G + 1, OSError(errno.EIO, "bad"))]
    read, told = desk(live, reference)
    assert read.differing(0, 8 * G, Kind.COMPARE).tolist() == [False] * 4 + [True] * 4
    assert told == [progress.ScanError("live", 4 * G, 4 * G, errno.EIO)]


def test_a_run_longer_than_a_piece_is_read_in_pieces() -> None:
    """Every piece's segments land in their place, the last piece's too."""
    size = 2 * reader.PIECE + 5 * G + 3
    live = fakes.MemoryImage(bytearray(size))
    reference = fakes.MemoryImage(bytearray(size))
    expected = [0, reader.PIECE // G, 2 * reader.PIECE // G - 1, size // G]
    for segment in expected:
        live.content[segment * G + 1] = 1
    read, _ = desk(live, reference)
    for kind in (Kind.COMPARE, Kind.LIVE):
        assert read.differing(0, size, kind).nonzero()[0].tolist() == expected
    assert {length for _, length in live.reads} == {reader.PIECE, 5 * G + 3}
