# SPDX-License-Identifier: Apache-2.0
"""What has to be read, from extents: never too little, and no more than there is a reason for."""

import itertools
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dirtymap import extent
from dirtymap.images import same
from scanner import plan
from scanner.plan import Kind, Run
from tests.scanner import fakes

K = 1024
GREEDY = plan.Tuning(chunk=64 * K, least_saving=0, window=1 << 20)


def image(size: int, *zeros: tuple[int, int]) -> fakes.MemoryImage:
    return fakes.MemoryImage(bytearray(size), zeros=list(zeros))


def runs_of(
    live: fakes.MemoryImage,
    reference: fakes.MemoryImage,
    unit: int = 4 * K,
    tuning: plan.Tuning = GREEDY,
    **options: object,
) -> list[Run]:
    made = plan.Plan(live, reference, live.size, unit, tuning=tuning, **options)  # type: ignore[arg-type]
    return list(made.runs([(0, live.size)]))


def test_what_is_zero_where_decides_what_is_read() -> None:
    """Both: nothing. One: the other. None: both."""
    live = image(64 * K, (16 * K, 48 * K))
    reference = image(64 * K, (0, 8 * K), (32 * K, 64 * K))
    assert runs_of(live, reference) == [
        Run(0, 8 * K, Kind.LIVE),
        Run(8 * K, 16 * K, Kind.COMPARE),
        Run(16 * K, 32 * K, Kind.REFERENCE),
        Run(32 * K, 48 * K, Kind.EQUAL, plan.ZEROS),
        Run(48 * K, 64 * K, Kind.LIVE),
    ]


def test_a_segment_that_is_zero_in_part_is_read() -> None:
    """A promise for one byte less than the segment is no promise for it."""
    live = image(32 * K, (4 * K + 1, 16 * K - 1))
    assert runs_of(live, image(32 * K, (0, 32 * K))) == [
        Run(0, 8 * K, Kind.LIVE),
        Run(8 * K, 12 * K, Kind.EQUAL, plan.ZEROS),
        Run(12 * K, 32 * K, Kind.LIVE),
    ]


def test_zeros_told_in_touching_pieces_are_one() -> None:
    """A segment covered by two extents that both promise zeros is covered."""
    live = image(16 * K, (0, 5 * K), (5 * K, 16 * K))
    assert runs_of(live, image(16 * K, (0, 16 * K))) == [Run(0, 16 * K, Kind.EQUAL, plan.ZEROS)]


def test_the_partial_last_segment_is_whole_enough() -> None:
    """Zeros up to the disk's end cover the last segment, however short it is."""
    live = image(9 * K, (4 * K, 9 * K))
    assert runs_of(live, image(9 * K, (8 * K, 9 * K))) == [
        Run(0, 4 * K, Kind.COMPARE),
        Run(4 * K, 8 * K, Kind.REFERENCE),
        Run(8 * K, 9 * K, Kind.EQUAL, plan.ZEROS),
    ]


def test_beyond_a_shorter_reference_are_zeros() -> None:
    """What the reference does not have is compared with zeros; its last, torn segment is read."""
    live = image(64 * K, (32 * K, 64 * K))
    assert runs_of(live, image(10 * K)) == [
        Run(0, 12 * K, Kind.COMPARE),
        Run(12 * K, 32 * K, Kind.LIVE),
        Run(32 * K, 64 * K, Kind.EQUAL, plan.ZEROS),
    ]


def test_zeros_up_to_a_shorter_references_end_go_on_beyond_it() -> None:
    """The segment in which the reference ends is zero when its part of it is."""
    assert runs_of(image(16 * K), image(10 * K, (8 * K, 10 * K))) == [
        Run(0, 8 * K, Kind.COMPARE),
        Run(8 * K, 16 * K, Kind.LIVE),
    ]


def test_a_longer_reference_is_looked_at_up_to_the_lives_end() -> None:
    """A shrunk live disk: the map has its size."""
    assert runs_of(image(8 * K), image(64 * K)) == [Run(0, 8 * K, Kind.COMPARE)]


@pytest.mark.parametrize("shortcut", plan.REASONS)
def test_one_shortcut_is_switched_off(shortcut: str) -> None:
    """What it would save is read from both sides; the others save as before."""
    live = image(64 * K, (0, 8 * K), (16 * K, 24 * K))
    reference = image(64 * K, (0, 16 * K))
    rules = [Known((32 * K, 40 * K), reason=reason) for reason in (same.REFLINKS, same.BACKING)]
    rules[1].ranges = ((40 * K, 48 * K),)
    usual = [
        (Run(0, 8 * K, Kind.EQUAL, plan.ZEROS), plan.ZEROS),
        (Run(8 * K, 16 * K, Kind.LIVE), plan.ONE_SIDE),
        (Run(16 * K, 24 * K, Kind.REFERENCE), plan.ONE_SIDE),
        (Run(24 * K, 32 * K, Kind.COMPARE), None),
        (Run(32 * K, 40 * K, Kind.EQUAL, same.REFLINKS), same.REFLINKS),
        (Run(40 * K, 48 * K, Kind.EQUAL, same.BACKING), same.BACKING),
        (Run(48 * K, 64 * K, Kind.COMPARE), None),
    ]
    assert _pieces(runs_of(live, reference, rules=rules)) == [run for run, _ in usual]
    assert _pieces(runs_of(live, reference, rules=rules, without=[shortcut])) == [
        Run(run.start, run.end, Kind.COMPARE) if by == shortcut else run for run, by in usual
    ]


def _pieces(runs: list[Run]) -> list[Run]:
    """Cut what was joined into the pieces of the test above."""
    edges = [0, 8 * K, 16 * K, 24 * K, 32 * K, 40 * K, 48 * K, 64 * K]
    return [
        Run(first, last, run.kind, run.reason)
        for first, last in itertools.pairwise(edges)
        for run in runs
        if run.start <= first and last <= run.end
    ]


def test_without_any_nothing_is_believed() -> None:
    """Every shortcut is off, also the one beyond the end."""
    live, reference = image(64 * K, (0, 64 * K)), image(32 * K, (0, 32 * K))
    assert runs_of(live, reference, without=plan.REASONS) == [Run(0, 64 * K, Kind.COMPARE)]


def test_small_savings_are_not_worth_a_chunk_of_their_own() -> None:
    """A short hole between two reads is read; a long one is not, even beside a short read."""
    tuning = plan.Tuning(least_saving=16 * K, window=1 << 20)
    zeros = [(4 * K, 8 * K), (64 * K, 128 * K), (132 * K, 256 * K)]
    live, reference = image(256 * K, *zeros), image(256 * K, *zeros)
    assert runs_of(live, reference, tuning=tuning) == [
        Run(0, 64 * K, Kind.COMPARE),
        Run(64 * K, 128 * K, Kind.EQUAL, plan.ZEROS),
        Run(128 * K, 132 * K, Kind.COMPARE),
        Run(132 * K, 256 * K, Kind.EQUAL, plan.ZEROS),
    ]


def test_only_what_is_undecided_is_planned() -> None:
    """A scan that goes on leaves what is decided; runs grow to whole units and never overlap."""
    made = plan.Plan(image(64 * K), image(64 * K), 64 * K, 16 * K, tuning=GREEDY)
    undecided = [(4 * K, 4 * K), (12 * K, 8 * K), (48 * K, 16 * K)]
    assert list(made.runs(undecided)) == [
        Run(0, 16 * K, Kind.COMPARE),
        Run(16 * K, 32 * K, Kind.COMPARE),
        Run(48 * K, 64 * K, Kind.COMPARE),
    ]


def test_reads_are_cut_into_chunks_and_decisions_are_not() -> None:
    """Chunks end at multiples of their size; a terabyte of zeros is one decision."""
    live = image(512 * K, (200 * K, 512 * K))
    reference = image(512 * K, (200 * K, 512 * K))
    made = plan.Plan(live, reference, live.size, 4 * K, tuning=GREEDY)
    assert [(run.start, run.end) for run in made.chunks([(8 * K, 504 * K)])] == [
        (8 * K, 64 * K),
        (64 * K, 128 * K),
        (128 * K, 192 * K),
        (192 * K, 200 * K),
        (200 * K, 512 * K),
    ]


def test_windows_grow_while_answers_are_quick() -> None:
    """A huge sparse disk takes few questions."""
    tebibyte = 1 << 40
    sparse = Sparse(tebibyte)
    made = plan.Plan(sparse, sparse, tebibyte, 64 * K, clock=lambda: 0.0)
    runs = list(made.runs([(0, tebibyte)]))
    assert all(run.kind is Kind.EQUAL for run in runs)
    assert len(runs) < 40
    assert sparse.questions < 80


class Sparse:
    """A disk of nothing; `slow` seconds pass on `clock` with every answer."""

    name = "sparse"

    def __init__(self, size: int, slow: float = 0.0) -> None:
        self.size = size
        self.slow = slow
        self.now = 0.0
        self.questions = 0

    def clock(self) -> float:
        return self.now

    def read_into(self, start: int, buffer: memoryview) -> None:
        raise AssertionError("not read here")

    def extents(
        self, start: int, length: int, deadline: float | None = None
    ) -> Iterator[extent.Extent]:
        self.questions += 1
        self.now += self.slow
        yield extent.Extent(start, length, zero=True)

    def close(self) -> None:
        pass


def test_an_image_that_answers_slowly_is_asked_no_more() -> None:
    """After three slow answers in a row the rest is read instead of asked for."""
    size = 64 << 30
    live, reference = Sparse(size, slow=2.0), Sparse(size)
    made = plan.Plan(live, reference, size, 64 * K, clock=live.clock)
    kinds = [run.kind for run in made.runs([(0, size)])]
    assert kinds[:3] == [Kind.EQUAL] * 3
    assert set(kinds[3:]) == {Kind.LIVE}
    assert live.questions == 3


def test_more_extents_than_are_listened_to_lose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shattered disk is planned in more and smaller windows."""
    monkeypatch.setattr(plan, "_MOST_EXTENTS", 5)
    zeros = [(at, at + 4 * K) for at in range(0, 256 * K, 8 * K)]
    live, reference = image(256 * K, *zeros), image(256 * K, *zeros)
    expected = [
        Run(at, at + 4 * K, Kind.COMPARE if at % (8 * K) else Kind.EQUAL)
        for at in range(0, 256 * K, 4 * K)
    ]
    assert runs_of(live, reference) == expected


class Known:
    """A rule that knows fixed ranges to be equal."""

    def __init__(self, *ranges: tuple[int, int], reason: str = same.REFLINKS) -> None:
        self.ranges = ranges
        self.reason = reason

    def equal(self, start: int, length: int, deadline: float) -> Iterator[extent.Extent]:
        del deadline
        for first, last in self.ranges:
            first, last = max(first, start), min(last, start + length)
            if first < last:
                yield extent.data(first, last - first)


def test_a_rule_decides_whole_segments_that_would_be_read() -> None:
    """Its promise is cut to whole segments, and what zeros decide stays decided by zeros."""
    live, reference = image(64 * K, (32 * K, 40 * K)), image(64 * K, (32 * K, 48 * K))
    rule = Known((2 * K, 13 * K), (20 * K, 44 * K))
    assert runs_of(live, reference, rules=[rule]) == [
        Run(0, 4 * K, Kind.COMPARE),
        Run(4 * K, 12 * K, Kind.EQUAL, same.REFLINKS),
        Run(12 * K, 20 * K, Kind.COMPARE),
        Run(20 * K, 32 * K, Kind.EQUAL, same.REFLINKS),
        Run(32 * K, 40 * K, Kind.EQUAL, plan.ZEROS),
        Run(40 * K, 44 * K, Kind.EQUAL, same.REFLINKS),
        Run(44 * K, 48 * K, Kind.LIVE),
        Run(48 * K, 64 * K, Kind.COMPARE),
    ]


def test_a_rule_is_asked_in_every_window() -> None:
    """No window is planned without it."""
    tuning = plan.Tuning(least_saving=0, window=8 * K)
    made = runs_of(image(64 * K), image(64 * K), tuning=tuning, rules=[Known((0, 64 * K))])
    assert {(run.kind, run.reason) for run in made} == {(Kind.EQUAL, same.REFLINKS)}


def ranges(end: int) -> st.SearchStrategy[list[tuple[int, int]]]:
    """Ranges in order that do not overlap, at any byte."""
    edges = st.lists(st.integers(0, end), max_size=16, unique=True).map(sorted)
    return edges.map(lambda points: list(itertools.pairwise(points))[::2])


@given(
    size=st.integers(1, 40 * K),
    shorter=st.integers(0, 40 * K),
    live_zeros=ranges(40 * K),
    reference_zeros=ranges(40 * K),
    known=ranges(40 * K),
    unit=st.sampled_from([512, 2 * K, 4 * K]),
    least_saving=st.sampled_from([0, 3 * K, 16 * K]),
    window=st.sampled_from([4 * K, 1 << 20]),
    without=st.sets(st.sampled_from(plan.REASONS)),
)
def test_every_byte_is_covered_once_and_no_promise_is_stretched(
    size: int,
    shorter: int,
    live_zeros: list[tuple[int, int]],
    reference_zeros: list[tuple[int, int]],
    known: list[tuple[int, int]],
    unit: int,
    least_saving: int,
    window: int,
    without: set[str],
) -> None:
    """Whatever the extents are: runs are contiguous whole units, each kind covered by its promise."""
    live = image(size, *_cut(live_zeros, size))
    reference = image(shorter, *_cut(reference_zeros, shorter))
    tuning = plan.Tuning(least_saving=least_saving, window=window)
    rules = [Known(*_cut(known, size))]
    made = runs_of(live, reference, unit, tuning, rules=rules, without=without)
    position = 0
    zero_live = _bytes(live.zeros)
    zero_reference = _bytes(reference.zeros) | set(range(shorter, size))
    for run in made:
        assert run.start == position < run.end
        assert run.start % unit == 0
        position = run.end
        assert run.kind is not Kind.EQUAL or run.reason not in without
        covered = set(range(run.start, run.end))
        if run.kind is Kind.LIVE:
            assert covered <= zero_reference
        elif run.kind is Kind.REFERENCE:
            assert covered <= zero_live
        elif run.kind is Kind.EQUAL and run.reason == plan.ZEROS:
            assert covered <= zero_live & zero_reference
        elif run.kind is Kind.EQUAL:
            assert covered <= _bytes(_cut(known, size))
    assert position == size


def _cut(wanted: list[tuple[int, int]], end: int) -> list[tuple[int, int]]:
    return [(first, min(last, end)) for first, last in wanted if first < end]


def _bytes(wanted: list[tuple[int, int]]) -> set[int]:
    return {byte for first, last in wanted for byte in range(first, last)}
