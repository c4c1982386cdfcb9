# SPDX-License-Identifier: Apache-2.0
"""How fast runs are read: what is drawn of them, and what it costs."""

import errno
import random

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from dirtymap.images import base
from scanner import plan, rates, reader, stock
from tests.scanner import fakes

KIB, MIB = 1 << 10, 1 << 20


def runs_of(*ranges: tuple[int, int]) -> list[plan.Run]:
    return [plan.Run(start, end, plan.Kind.COMPARE) for start, end in ranges]


def read(
    image: base.Image, runs: list[plan.Run], clock: fakes.Clock, seconds: float, seed: int = 1
) -> float | None:
    return rates.reading(image, runs, random.Random(seed), seconds, clock)


# -- pieces ------------------------------------------------------------------------------------


def test_pieces_are_numbered_through_all_runs() -> None:
    found = stock.Stock.of(runs_of((0, 10), (20, 24), (30, 39)), 4)
    assert [found.piece(number) for number in range(found.count)] == runs_of(
        (0, 4), (4, 8), (8, 10), (20, 24), (30, 34), (34, 38), (38, 39)
    )
    assert stock.Stock.of([], 4).count == 0


_lengths = st.lists(st.integers(1, 3 * MIB), min_size=1, max_size=8)


@hypothesis.given(_lengths, st.sampled_from([1, 3, 5 * MIB]), st.integers(0, 100))
def test_what_is_taken_is_whole_blocks_of_the_runs(
    lengths: list[int], block: int, seed: int
) -> None:
    """A hash is of a whole block: no step ends within one, but at a run's end."""
    starts = np.cumsum([0, *lengths]) * 10
    runs = [
        plan.Run(int(start), int(start) + length, plan.Kind.COMPARE)
        for start, length in zip(starts, lengths, strict=False)
    ]
    places = rates._Places(runs, block, random.Random(seed))
    step = places.whole_blocks(256 * KIB)
    taken = []
    while (part := places.take(step)) is not None:
        taken.append(part)
    assert taken
    for part in taken:
        (run,) = (run for run in runs if run.start <= part.start < run.end)
        assert (part.start - run.start) % block == 0
        assert part.end == run.end or (part.end - run.start) % block == 0
        assert part.length <= step


def test_each_chunk_is_as_likely_as_any_other() -> None:
    """Also those of short runs: each is in one stretch, and any stretch may be the first."""
    short = [(at * 1000 * MIB, at * 1000 * MIB + 1) for at in (1, 2)]
    runs = runs_of((0, 100 * plan.CHUNK), *short)
    firsts = set()
    for seed in range(200):
        places = rates._Places(runs, 1, random.Random(seed))
        starts = [
            chunk.start for chunk in iter(lambda places=places: places.take(plan.CHUNK), None)
        ]
        assert len(set(starts)) == len(starts) == 102
        assert starts[1] == starts[0] + plan.CHUNK or starts[0] >= 96 * plan.CHUNK
        firsts.add(starts[0])
    assert firsts == {number * plan.CHUNK for number in range(0, 102, 8)}


# -- what it costs -----------------------------------------------------------------------------


def test_long_and_short_runs_together_take_what_all_of_them_take() -> None:
    """64 runs of 64 KiB at 1 ms each are as many bytes as one chunk, and take most of the time."""
    long = 8 * plan.CHUNK
    short = [(long + at * 100 * KIB, long + at * 100 * KIB + 64 * KIB) for at in range(64)]
    image, clock = fakes.MemoryImage(bytearray(short[-1][1])), fakes.Clock()
    image.before = fakes.slow(clock, each=1e-3, rate=4e9)
    runs = runs_of((0, long), *short)
    length = sum(run.length for run in runs)
    truth = 72 * 1e-3 + length / 4e9
    for seed in range(10):
        # Time for all of it: what the first, small steps took is not counted.
        rate = read(image, runs, clock, seconds=10.0, seed=seed)
        assert rate
        assert length / rate == pytest.approx(truth, rel=0.2)


def test_where_each_read_is_waited_for_a_chunk_at_once_counts() -> None:
    """The small steps before it show only that there is time."""
    image, clock = fakes.MemoryImage(bytearray(8 * plan.CHUNK)), fakes.Clock()
    image.before = fakes.slow(clock, each=0.02)
    rate = read(image, runs_of((0, image.size)), clock, seconds=0.5)
    # Some chunk was begun with a small step, and what is left of it is read in one.
    assert rate == pytest.approx(plan.CHUNK / 0.02, rel=0.2)


def test_the_clock_is_looked_at_after_each_step() -> None:
    image, clock = fakes.MemoryImage(bytearray(8 * plan.CHUNK)), fakes.Clock()
    image.before = fakes.slow(clock, rate=16 * MIB)
    began = clock()
    assert read(image, runs_of((0, image.size)), clock, seconds=0.6) == pytest.approx(16 * MIB)
    # Two of 256 KiB and two of 1 MiB; two chunks would take half a second more.
    assert clock() - began == pytest.approx(2.5 / 16)


def test_no_time_is_one_small_step_of_each_thread() -> None:
    image, clock = fakes.MemoryImage(bytearray(8 * plan.CHUNK)), fakes.Clock()
    image.before = fakes.slow(clock, rate=MIB)
    assert read(image, runs_of((0, image.size)), clock, seconds=0.0) == pytest.approx(MIB)
    assert sum(length for _, length in image.reads) == 2 * 256 * KIB


def test_memory_is_no_more_than_a_chunk_and_may_be_read_into_around_the_cache() -> None:
    """O_DIRECT wants it on a page's begin; where it was not, a disk was read another way than a scan reads it."""

    class Watched(fakes.MemoryImage):
        def read_into(self, start: int, buffer: memoryview) -> None:
            assert len(buffer) <= plan.CHUNK
            assert np.frombuffer(buffer, np.uint8).ctypes.data % 4096 == 0
            super().read_into(start, buffer)

    image = Watched(bytearray(3 * plan.CHUNK))
    assert read(image, runs_of((0, image.size)), fakes.Clock(), seconds=1.0)


def test_what_cannot_be_read_takes_time_and_counts_nothing() -> None:
    image, clock = fakes.MemoryImage(bytearray(8 * plan.CHUNK)), fakes.Clock()
    image.before = fakes.slow(clock, rate=1e9)
    everything = runs_of((0, image.size))
    image.faults = [(0, image.size, OSError(errno.EIO, "bad sector"))]
    assert read(image, everything, clock, seconds=1.0) is None
    image.faults = [(0, image.size, base.GoneError("the connection is lost"))]
    with pytest.raises(base.GoneError):
        read(image, everything, clock, seconds=1.0)
    assert read(image, [], clock, seconds=1.0) is None


def test_both_sides_are_compared_where_both_must_be_read() -> None:
    live, reference = (fakes.MemoryImage(bytearray(2 * plan.CHUNK)) for _ in range(2))
    clock = fakes.Clock()
    live.before = reference.before = fakes.slow(clock, rate=1e9)
    desks = [reader.Reader(live, reference, 64 * KIB, lambda _: None) for _ in range(2)]
    for kind, sides in ((plan.Kind.COMPARE, 2), (plan.Kind.LIVE, 1)):
        runs = [plan.Run(0, live.size, kind)]
        rate = rates.comparing(desks, runs, 64 * KIB, random.Random(1), 1.0, clock)
        assert rate == pytest.approx(1e9 / sides)
