# SPDX-License-Identifier: Apache-2.0
"""FIEMAP: which extents may be believed."""

import pathlib
import time

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from dirtymap.images import fiemap

BLOCK = 4096
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
