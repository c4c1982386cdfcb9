# SPDX-License-Identifier: Apache-2.0
"""What a scan has decided: a valid map at every instant, also after a kill in the middle."""

import mmap
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dirtymap import bitmap
from dirtymap.images import same
from scanner import decisions, plan
from tests import command

SIZE = 100 * 512 + 7
SEGMENTS = 101


def dirty(decision: decisions.Decisions, written: bitmap.Bitmap | None = None) -> set[int]:
    found = decision.map(written)
    return {segment for segment in range(found.segments) if found.get(segment)}


def mask(*bits: int) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    return np.array(bits, np.bool_)


def test_nothing_decided_is_all_dirty() -> None:
    """Before the first read the map names everything."""
    fresh = decisions.Decisions(SIZE, 512)
    assert dirty(fresh) == set(range(SEGMENTS))
    assert fresh.undecided() == [(0, SIZE)]
    assert not fresh.complete


def test_each_kind_of_decision_is_counted_in_bytes() -> None:
    """Differing, equal, skipped: the partial last segment counts what it has."""
    made = decisions.Decisions(SIZE, 512)
    made.compared(0, mask(1, 0, 0))
    made.compared(3, mask(0, 1), one_side=True)
    made.equal(5, 90, plan.ZEROS)
    made.written(95, mask(1, 0, 0))
    assert made.undecided() == [(96 * 512, SIZE - 96 * 512)]
    made.compared(96, mask(0, 0, 0, 0, 1))
    decided, differing, savings, errors = made.figures()
    assert (decided, differing, errors) == (SIZE, 2 * 512 + 7, 0)
    assert savings == {
        plan.ZEROS: 90 * 512,
        plan.ONE_SIDE: 2 * 512,
        plan.WRITTEN: 512,
        same.REFLINKS: 0,
        same.BACKING: 0,
    }
    assert made.complete
    assert dirty(made) == {0, 4, 100}


@given(
    st.lists(st.tuples(st.integers(0, 100), st.sampled_from(["differs", "equal", "write"]))),
)
def test_the_sums_are_those_of_the_map(steps: list[tuple[int, str]]) -> None:
    """Counted without making the map, and the same, when nothing changes meanwhile."""
    made, written = decisions.Decisions(SIZE, 512), bitmap.Bitmap(SIZE, 512)
    for segment, verb in steps:
        if verb == "write":
            written.set(segment)
        else:
            made.compared(segment, mask(verb == "differs"))
        assert made.sums(written) == (written.dirty_bytes(), made.map(written).dirty_bytes())


class _Interrupted(bitmap.Bitmap):
    """A write bitmap during the first count of which something happens to the decisions."""

    __slots__ = ("happen",)

    happen: Callable[[], None] | None

    def dirty_bytes_without(self, others: Sequence[bitmap.Bitmap]) -> tuple[int, int]:
        happen, self.happen = self.happen, None
        if happen:
            happen()
        return super().dirty_bytes_without(others)


@pytest.mark.parametrize("verb", ["reset", "compared", "written"])
def test_a_sum_is_never_too_small(verb: str) -> None:
    """What changes during the count may be counted twice, and never not at all."""
    made, written = decisions.Decisions(SIZE, 512), _Interrupted(SIZE, 512)
    written.set(0, 40)
    made.compared(0, mask(*[0] * 50))
    happens: dict[str, Callable[[], None]] = {
        "reset": made.reset,
        "compared": lambda: made.compared(0, mask(*[1] * 60)),
        "written": lambda: made.written(60, mask(1)),
    }
    before = made.map(written).dirty_bytes()
    written.happen = happens[verb]
    _, dirty = made.sums(written)
    assert dirty >= before
    if verb == "reset":
        assert dirty == SIZE


def test_a_segment_decided_twice_counts_once() -> None:
    """A neighbour read again changes no sum; what once differed stays dirty."""
    made = decisions.Decisions(SIZE, 512)
    made.compared(0, mask(1, 0))
    made.compared(0, mask(0, 0, 1))
    made.written(1, mask(1, 1))
    made.equal(0, 4, plan.ZEROS)
    decided, differing, savings, _ = made.figures()
    assert (decided, differing) == (4 * 512, 2 * 512)
    assert (savings[plan.ZEROS], savings[plan.WRITTEN]) == (512, 0)


def test_the_map_has_what_is_written_too() -> None:
    """Decided as equal and written later: dirty."""
    made = decisions.Decisions(SIZE, 512)
    made.equal(0, SEGMENTS, plan.ZEROS)
    written = bitmap.Bitmap(SIZE, 512)
    written.set(7)
    assert dirty(made) == set()
    assert dirty(made, written) == {7}


def test_a_map_is_a_copy() -> None:
    """What is decided later does not change a map that somebody holds."""
    made = decisions.Decisions(SIZE, 512)
    held = made.map()
    made.equal(0, SEGMENTS, plan.ZEROS)
    assert held.count() == SEGMENTS


def test_reset_forgets_everything() -> None:
    """After a reset it is as at the beginning."""
    made = decisions.Decisions(SIZE, 512)
    made.compared(0, mask(*[1] * SEGMENTS))
    made.failed_read()
    made.reset()
    assert made.figures() == (0, 0, dict.fromkeys(plan.REASONS, 0), 0)
    assert dirty(made) == set(range(SEGMENTS))
    assert made.diff.count() == 0


def test_a_buffer_of_the_same_disk_is_taken_over() -> None:
    """A session started anew goes on where the last one was."""
    buffer = bytearray(decisions.buffer_length(SIZE, 512))
    first = decisions.Decisions(SIZE, 512, buffer)
    first.compared(0, mask(1, 0, 1))
    first.equal(10, 10, plan.ZEROS)
    first.failed_read()
    second = decisions.Decisions(SIZE, 512, buffer)
    assert second.figures() == first.figures()
    assert dirty(second) == dirty(first)
    assert second.undecided() == [(3 * 512, 7 * 512), (20 * 512, SIZE - 20 * 512)]


@pytest.mark.parametrize(("size", "granularity"), [(SIZE + 512, 512), (SIZE, 1024)])
def test_a_buffer_of_another_disk_is_begun_again(size: int, granularity: int) -> None:
    """Decisions on another size or granularity are none on this."""
    buffer = bytearray(decisions.buffer_length(SIZE + 512, 512))
    decisions.Decisions(SIZE, 512, buffer).equal(0, SEGMENTS, plan.ZEROS)
    other = decisions.Decisions(size, granularity, buffer)
    assert other.undecided() == [(0, size)]
    assert other.figures()[0] == 0


class Killed(BaseException):
    """Stands for the end of the process at this instruction."""


def killed(*_: object) -> None:
    raise Killed


@pytest.mark.parametrize("step", ["diff.set_where", "unscanned.clear", "_add"])
def test_a_decision_cut_in_the_middle_loses_no_difference(
    step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before, between or after the two bitmaps' changes: a differing segment is dirty."""
    buffer = bytearray(decisions.buffer_length(SIZE, 512))
    first = decisions.Decisions(SIZE, 512, buffer)
    owner, _, method = step.rpartition(".")
    owned = type(getattr(first, owner)) if owner else type(first)
    with monkeypatch.context() as patched:
        patched.setattr(owned, method, killed)
        with pytest.raises(Killed):
            first.compared(0, mask(1, 0), one_side=True)
    second = decisions.Decisions(SIZE, 512, buffer)
    assert 0 in dirty(second)
    assert second.figures()[0] == SIZE - second.unscanned.dirty_bytes()


@pytest.mark.parametrize("step", ["fill", "erase"])
def test_a_reset_cut_in_the_middle_decides_nothing(
    step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed within a reset: at no instant is a differing segment neither different nor unscanned."""
    buffer = bytearray(decisions.buffer_length(SIZE, 512))
    first = decisions.Decisions(SIZE, 512, buffer)
    first.compared(0, mask(1))
    first.equal(1, SEGMENTS - 1, plan.ZEROS)
    with monkeypatch.context() as patched:
        patched.setattr(bitmap.Bitmap, step, killed)
        with pytest.raises(Killed):
            first.reset()
    second = decisions.Decisions(SIZE, 512, buffer)
    decided, _, savings, _ = second.figures()
    assert 0 in dirty(second)
    assert sum(savings.values()) <= decided


def test_a_beginning_cut_in_the_middle_is_begun_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Old memory is not taken for decisions because its header was half written."""
    buffer = bytearray(decisions.buffer_length(SIZE, 512))
    with monkeypatch.context() as patched:
        patched.setattr(bitmap.Bitmap, "fill", killed)
        with pytest.raises(Killed):
            decisions.Decisions(SIZE, 512, buffer)
    assert decisions.Decisions(SIZE, 512, buffer).undecided() == [(0, SIZE)]


# Decides segment after segment in shared memory, a multiple of 3 as differing, and says when it is under way.
VICTIM = """
import mmap, os, sys
import numpy as np
from scanner import decisions
size = int(sys.argv[2])
descriptor = os.open(sys.argv[1], os.O_RDWR)
shared = mmap.mmap(descriptor, decisions.buffer_length(size, 512))
made = decisions.Decisions(size, 512, memoryview(shared))
for _ in range(1000):
    made.reset()
    for first in range(0, made.diff.segments, 7):
        count = min(7, made.diff.segments - first)
        made.compared(first, np.arange(first, first + count) % 3 == 0)
        if first == 700:
            os.write(1, b"x")
"""


def test_sigkill_leaves_a_valid_map(tmp_path: pathlib.Path) -> None:
    """Whatever a killed process has left in shared memory names every differing segment."""
    size = 5000 * 512
    shared = tmp_path / "decisions"
    shared.write_bytes(bytes(decisions.buffer_length(size, 512)))
    for rounds in range(5):
        victim = subprocess.Popen(
            [sys.executable, "-c", VICTIM, str(shared), str(size)],
            stdout=subprocess.PIPE,
            env=command.environment(),
        )
        try:
            assert victim.stdout is not None
            assert os.read(victim.stdout.fileno(), 1 + rounds) != b""
        finally:
            victim.kill()
            victim.communicate()
        with shared.open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
            left = decisions.Decisions(size, 512, bytearray(memory))
        found = dirty(left)
        assert found >= set(range(0, 5000, 3))
        assert left.figures()[0] == size - left.unscanned.dirty_bytes()
        assert left.figures()[1] == left.diff.dirty_bytes()


@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(["compared", "equal", "written"]),
            st.integers(0, SEGMENTS - 1),
            st.lists(st.booleans(), min_size=1, max_size=20),
        ),
        max_size=20,
    )
)
def test_sums_always_fit_the_bitmaps(steps: list[tuple[str, int, list[bool]]]) -> None:
    """Whatever is decided in whatever order, the counters say what the bits say."""
    made = decisions.Decisions(SIZE, 512)
    for kind, first, bits in steps:
        chosen = mask(*bits[: SEGMENTS - first])
        if kind == "compared":
            made.compared(first, chosen)
        elif kind == "written":
            made.written(first, chosen)
        else:
            made.equal(first, len(chosen), same.BACKING)
        decided, differing, savings, _ = made.figures()
        assert decided == SIZE - made.unscanned.dirty_bytes()
        assert differing == made.diff.dirty_bytes()
        assert sum(savings.values()) <= decided
