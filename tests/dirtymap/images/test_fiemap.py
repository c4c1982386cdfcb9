# SPDX-License-Identifier: Apache-2.0
"""FIEMAP: which extents may be believed."""

import contextlib
import errno
import os
import pathlib
import time
from collections.abc import Callable, Iterator

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from dirtymap.images import fiemap

BLOCK = 4096
MIB = 1 << 20
LAST, SHARED = 0x1, 0x2000
FLAGS = {
    "unknown": 0x2,
    "delalloc": 0x4,
    "encoded": 0x8,
    "encrypted": 0x80,
    "not-aligned": 0x100,
    "inline": 0x200,
    "tail": 0x400,
    "unwritten": 0x800,
    "merged": 0x1000,
    "yet-to-be-invented": 0x80000,
}

Row = tuple[int, int, int, int]
DirtyOpen = Callable[[int, set[int]], tuple["DirtyFile", int]]


class FileSystem:
    """Answers FIEMAP from (logical, physical, length, flags), at most `room` extents at once."""

    def __init__(self, rows: list[Row], room: int = 1000) -> None:
        self._rows = rows
        self._room = room
        self.asked: list[tuple[int, int, int]] = []

    def __call__(self, fd: int, start: int, length: int, flags: int) -> np.ndarray:
        self.asked.append((start, length, flags))
        found = [row for row in self._rows if row[0] + row[2] > start and row[0] < start + length]
        answer = np.zeros(min(len(found), self._room), fiemap._EXTENT)
        for at, (logical, physical, count, extent_flags) in enumerate(found[: self._room]):
            answer[at] = (logical, physical, count, 0, extent_flags, 0)
        return answer


def places(
    monkeypatch: pytest.MonkeyPatch, rows: list[Row], start: int, length: int, room: int = 1000
) -> list[fiemap.Place]:
    monkeypatch.setattr(fiemap, "_ask", FileSystem(rows, room))
    return list(fiemap.shared(-1, start, length, time.monotonic() + 60))


@pytest.fixture(autouse=True)
def _nothing_is_dirty(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most of these ask about a file that is not there."""
    if not {"dirty_file", "tmp_path"} & set(request.fixturenames):
        monkeypatch.setattr(fiemap, "_write_out", lambda *_: True)


def test_a_shared_extent_counts_cut_to_what_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [(0, 1 << 20, 8 * BLOCK, SHARED | LAST)]
    assert places(monkeypatch, rows, 100, 200) == [fiemap.Place(100, 300, (1 << 20) + 100)]


@pytest.mark.parametrize("flag", FLAGS.values(), ids=FLAGS)
def test_an_extent_with_any_other_flag_never_counts(
    monkeypatch: pytest.MonkeyPatch, flag: int
) -> None:
    """Such a place says nothing about the bytes; a flag that is not known here may mean the same."""
    rows = [(0, 1 << 20, BLOCK, SHARED | flag), (BLOCK, 2 << 20, BLOCK, SHARED)]
    assert places(monkeypatch, rows, 0, 2 * BLOCK) == [fiemap.Place(BLOCK, 2 * BLOCK, 2 << 20)]


def test_an_extent_that_is_not_shared_never_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert places(monkeypatch, [(0, 1 << 20, BLOCK, LAST)], 0, BLOCK) == []


def test_gaps_are_no_places(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [(BLOCK, 1 << 20, BLOCK, SHARED), (4 * BLOCK, 2 << 20, BLOCK, SHARED)]
    assert places(monkeypatch, rows, 0, 8 * BLOCK) == [
        fiemap.Place(BLOCK, 2 * BLOCK, 1 << 20),
        fiemap.Place(4 * BLOCK, 5 * BLOCK, 2 << 20),
    ]


def test_many_extents_are_asked_for_in_turns_and_synced_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = [(at * BLOCK, (1 << 20) + at * 2 * BLOCK, BLOCK, SHARED) for at in range(100)]
    system = FileSystem(rows, room=7)
    monkeypatch.setattr(fiemap, "_ask", system)
    found = list(fiemap.shared(-1, 0, 100 * BLOCK, time.monotonic() + 60))
    assert [place.start for place in found] == [row[0] for row in rows]
    assert [flags for _, _, flags in system.asked] == [1] + [0] * (len(system.asked) - 1)


class DirtyFile(FileSystem):
    """A file with dirty pages, which take time to be written: a second for 100 MiB.

    FIEMAP_FLAG_SYNC writes them all, as Linux does, whatever range is asked for.
    """

    def __init__(self, size: int, dirty: set[int]) -> None:
        """`dirty` are numbers of MiB."""
        super().__init__([(0, 1 << 40, size, SHARED | LAST)])
        self._dirty = set(dirty)
        self.now = 0.0
        self.written: list[tuple[int, int]] = []
        self.synced = 0

    def monotonic(self) -> float:
        return self.now

    def write_range(self, fd: int, start: int, length: int) -> None:
        self.written.append((start, length))
        found = {at for at in self._dirty if start <= at * MIB < start + length}
        self._dirty -= found
        self.now += len(found) / 100

    def __call__(self, fd: int, start: int, length: int, flags: int) -> np.ndarray:
        if flags & 1:
            self.synced = len(self._dirty)
            self.now += len(self._dirty) / 100
            self._dirty.clear()
        return super().__call__(fd, start, length, flags)


@pytest.fixture
def dirty_file(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> Iterator[DirtyOpen]:
    """A function that opens one and returns it with its descriptor."""
    with contextlib.ExitStack() as stack:

        def make(size: int, dirty: set[int]) -> tuple[DirtyFile, int]:
            system = DirtyFile(size, dirty)
            monkeypatch.setattr(fiemap, "_ask", system)
            monkeypatch.setattr(fiemap, "_write_range", system.write_range, raising=False)
            monkeypatch.setattr(fiemap, "time", system)
            stream = stack.enter_context(open(tmp_path / "file", "wb"))
            stream.truncate(size)
            return system, stream.fileno()

        yield make


def test_what_is_dirty_is_written_in_pieces_with_looks_at_the_clock(dirty_file: DirtyOpen) -> None:
    """The kernel looks at none: 800 MiB took 3.4 s where one was allowed, and no other thread got a chunk."""
    system, fd = dirty_file(1 << 30, set(range(800)))
    assert list(fiemap.shared(fd, 0, 1 << 30, deadline=1.0)) == []
    assert system.now == pytest.approx(1.28)
    assert system.asked == []
    # Next time there is less of it.
    assert list(fiemap.shared(fd, 0, 1 << 30, deadline=10.0)) == [fiemap.Place(0, 1 << 30, 1 << 40)]
    assert system.now == pytest.approx(8.0)


def test_the_whole_file_is_written_before_any_of_it_is_asked_for(dirty_file: DirtyOpen) -> None:
    """FIEMAP_FLAG_SYNC would write what lies elsewhere, too; it stays, and finds nothing left."""
    system, fd = dirty_file((1 << 30) + 5, {0, 700, 1024})
    assert list(fiemap.shared(fd, MIB, MIB, deadline=60.0)) == [
        fiemap.Place(MIB, 2 * MIB, (1 << 40) + MIB)
    ]
    assert [start for start, _ in system.written] == list(range(0, (1 << 30) + 5, 128 * MIB))
    assert {length for _, length in system.written} == {128 * MIB}
    assert system.asked == [(MIB, MIB, 1)]
    assert system.synced == 0


def test_a_file_that_cannot_be_written_out_is_an_error() -> None:
    """Told by errno, as where there is no FIEMAP: nothing is known without it."""
    reading, writing = os.pipe()
    try:
        with pytest.raises(OSError) as caught:
            fiemap._write_range(reading, 0, BLOCK)
        assert caught.value.errno == errno.ESPIPE
    finally:
        os.close(reading)
        os.close(writing)


def test_it_ends_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [(0, 1 << 20, BLOCK, SHARED)]
    monkeypatch.setattr(fiemap, "_ask", FileSystem(rows))
    assert list(fiemap.shared(-1, 0, BLOCK, time.monotonic() - 1)) == []


def test_an_answer_that_does_not_advance_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        fiemap, "_ask", lambda *_: FileSystem([(0, 1 << 20, BLOCK, SHARED)])(0, 0, BLOCK, 0)
    )
    found = list(fiemap.shared(-1, 0, 10 * BLOCK, time.monotonic() + 60))
    assert found == [fiemap.Place(0, BLOCK, 1 << 20)]


def test_an_unmapped_file_has_no_places(tmp_path: pathlib.Path) -> None:
    """Whatever file system this is: either no FIEMAP (an OSError) or no shared extents."""
    path = tmp_path / "file"
    path.write_bytes(b"x" * 10_000)
    with open(path, "rb") as stream:
        try:
            found = list(fiemap.shared(stream.fileno(), 0, 10_000, time.monotonic() + 60))
        except OSError:
            found = []
        assert found == []
        assert not fiemap.is_realtime(stream.fileno())


_rows = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4), st.integers(0, 3)), max_size=12)


def _layout(rows: list[tuple[int, int, int]]) -> tuple[list[fiemap.Place], dict[int, int]]:
    """Places from (gap, length, disk area), and where each byte is."""
    found, where, at = [], {}, 0
    for gap, length, area in rows:
        at += gap
        physical = area * 1000 + at
        found.append(fiemap.Place(at, at + length, physical))
        where.update({at + i: physical + i for i in range(length)})
        at += length
    return found, where


@hypothesis.given(_rows, _rows)
def test_common_places_are_those_of_each_byte(
    one: list[tuple[int, int, int]], other: list[tuple[int, int, int]]
) -> None:
    left, where_left = _layout(one)
    right, where_right = _layout(other)
    expected = {at for at, place in where_left.items() if where_right.get(at) == place}
    found = list(fiemap.common(left, right))
    assert {at for place in found for at in range(place.start, place.end)} == expected
    assert all(where_left[place.start] == place.physical for place in found)
