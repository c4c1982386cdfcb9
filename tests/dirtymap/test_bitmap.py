# SPDX-License-Identifier: Apache-2.0
"""Bitmap against a Python set of segment numbers."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dirtymap import bitmap, errors, extent

GRANULARITIES = [512 << bits for bits in range(13)]

geometries = st.tuples(st.integers(0, 1 << 20), st.sampled_from([512, 4096, 65536, 2 << 20]))


@st.composite
def maps(draw: st.DrawFn) -> tuple[bitmap.Bitmap, set[int]]:
    """A bitmap after a few random operations, and the set that it must equal."""
    segments = draw(st.integers(1, 400))
    granularity = 512
    made = bitmap.Bitmap(segments * granularity - draw(st.integers(0, 511)), granularity)
    model: set[int] = set()
    for _ in range(draw(st.integers(0, 6))):
        first = draw(st.integers(0, segments))
        count = draw(st.integers(0, segments - first))
        touched = set(range(first, first + count))
        match draw(st.sampled_from(["set", "clear", "set_where", "clear_where"])):
            case "set":
                made.set(first, count)
                model |= touched
            case "clear":
                made.clear(first, count)
                model -= touched
            case verb:
                mask = np.array(draw(st.lists(st.booleans(), min_size=count, max_size=count)), bool)
                chosen = {first + int(at) for at in np.flatnonzero(mask)}
                if verb == "set_where":
                    made.set_where(first, mask)
                    model |= chosen
                else:
                    made.clear_where(first, mask)
                    model -= chosen
    return made, model


@given(maps())
def test_every_operation_equals_the_set_of_segments(made: tuple[bitmap.Bitmap, set[int]]) -> None:
    bits, model = made
    assert {i for i in range(bits.segments) if bits.get(i)} == model
    assert bits.count() == len(model)
    assert {first + i for first, count in bits.runs() for i in range(count)} == model
    assert bits.dirty_bytes() == sum(
        min((i + 1) * bits.granularity, bits.size) - i * bits.granularity for i in model
    )


@pytest.mark.parametrize("size", [1, 64 * 512, (9 << 20) * 512 + 65 * 512 + 7])
def test_counting_without_what_others_have(size: int) -> None:
    """Windows, the last word and the partial last segment: as by making the difference."""
    random = np.random.default_rng(size)
    made, *others = (bitmap.Bitmap(size, 512) for _ in range(3))
    for one in (made, *others):
        some = random.integers(0, one.segments, 3000)
        one.data[some >> 3] |= np.uint8(1) << (some & 7).astype(np.uint8)
        one.data[: len(one.data) // 2] = 0xA5
        if one is not others[-1]:
            one.set(one.segments - 1)
    for without in ([], others[:1], others):
        left = made.copy()
        for other in without:
            left.data &= ~other.data
        expected = int(left.unpack(0, left.segments).sum()) * 512
        if left.get(left.segments - 1):
            expected -= left.segments * 512 - size
        assert made.dirty_bytes_without(without) == (made.dirty_bytes(), expected)


@given(maps())
def test_runs_are_apart_and_extents_end_at_the_disk(made: tuple[bitmap.Bitmap, set[int]]) -> None:
    bits, _ = made
    runs = list(bits.runs())
    assert all(a + n < b for (a, n), (b, _) in itertools.pairwise(runs))
    extents = list(bits.extents())
    assert sum(run.length for run in extents) == bits.dirty_bytes()
    assert all(run.dirty and run.end <= bits.size for run in extents)


@given(maps(), st.integers(0, 400), st.integers(0, 400))
def test_queries_equal_the_set(
    made: tuple[bitmap.Bitmap, set[int]], first: int, count: int
) -> None:
    bits, model = made
    first = min(first, bits.segments)
    count = min(count, bits.segments - first)
    span = set(range(first, first + count))
    assert bits.any(first, count) == bool(span & model)
    assert bits.all(first, count) == (span <= model)
    assert [i for i, bit in enumerate(bits.unpack(first, count), first) if bit] == sorted(
        span & model
    )


@given(maps())
def test_no_bit_stands_beyond_the_last_segment(made: tuple[bitmap.Bitmap, set[int]]) -> None:
    bits, _ = made
    bits.fill()
    unpacked = np.unpackbits(bits.data, bitorder="little")
    assert unpacked.sum() == bits.segments
    assert bits.all(0, bits.segments)
    bits.erase()
    assert bits.count() == 0


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_range_of_bytes_sets_every_segment_that_it_touches(granularity: int) -> None:
    g = granularity
    bits = bitmap.Bitmap(4 * g + 1, g)
    bits.set_range(g - 1, 2)
    assert list(bits.runs()) == [(0, 2)]
    bits.erase()
    bits.set_range(4 * g, 1)
    assert list(bits.extents()) == [extent.Extent(4 * g, 1, dirty=True)]
    assert bits.dirty_bytes() == 1
    bits.erase()
    bits.set_range(g, 0)
    bits.set_range(5 * g, g)
    assert bits.count() == 0
    bits.set_range(3 * g, 100 * g)
    assert list(bits.runs()) == [(3, 2)]


def test_a_buffer_is_shared_and_keeps_what_it_holds() -> None:
    memory = bytearray(bitmap.buffer_length(100 * 512, 512))
    memory[0] = 0b101
    bits = bitmap.Bitmap(100 * 512, 512, memory)
    assert list(bits.runs()) == [(0, 1), (2, 1)]
    bits.set(99)
    assert memory[12] == 0b1000
    assert bits.copy() == bits
    assert len(memory) == 16


def test_or_needs_one_geometry() -> None:
    one, other = bitmap.Bitmap(1024, 512), bitmap.Bitmap(1024, 512)
    other.set(1)
    one.update(other)
    assert one == other
    for misfit in (bitmap.Bitmap(1025, 512), bitmap.Bitmap(1024, 1024)):
        with pytest.raises(errors.UserError):
            one.update(misfit)


@given(maps(), st.sampled_from([512, 1024, 4096, 65536]))
def test_a_coarser_map_covers_the_finer_one(
    made: tuple[bitmap.Bitmap, set[int]], granularity: int
) -> None:
    bits, model = made
    coarse = bits.coarsened(granularity)
    assert {i for i in range(coarse.segments) if coarse.get(i)} == {
        i * 512 // granularity for i in model
    }


def test_a_large_map_is_coarsened_across_the_windows() -> None:
    """Segments beside the borders of what is looked at at once, and the last, partial one."""
    bits = bitmap.Bitmap((3 << 20) * 512 + 1, 512)
    for segment in (0, (1 << 20) - 1, 1 << 20, (2 << 20) + 127, 3 << 20):
        bits.set(segment)
    coarse = bits.coarsened(65536)
    assert [first for first, _ in coarse.runs()] == [0, 8191, 16384, 24576]
    assert coarse.count() == 5


def test_long_runs_cross_the_search_windows() -> None:
    bits = bitmap.Bitmap((3 << 20) * 512, 512)
    bits.set(5, 2 << 20)
    assert list(bits.runs()) == [(5, 2 << 20)]
    bits.set((3 << 20) - 1)
    assert list(bits.runs()) == [(5, 2 << 20), ((3 << 20) - 1, 1)]


@pytest.mark.parametrize(("first", "count"), [(-1, 1), (0, 3), (2, 1), (0, -1)])
def test_segments_outside_are_a_bug(first: int, count: int) -> None:
    with pytest.raises(IndexError):
        bitmap.Bitmap(1024, 512).set(first, count)
