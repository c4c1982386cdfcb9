# SPDX-License-Identifier: Apache-2.0
"""Comparing buffers segment by segment."""

import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scanner import compare

GRANULARITIES = [512 << bits for bits in range(13)]


def array(content: bytes | bytearray) -> compare.Bytes:
    made = compare.buffer(max(len(content), 1))[: len(content)]
    made[:] = np.frombuffer(content, np.uint8)
    return made


def naive(a: bytes | bytearray, b: bytes | bytearray, granularity: int) -> list[bool]:
    return [
        a[at : at + granularity] != b[at : at + granularity] for at in range(0, len(a), granularity)
    ]


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("tail", [0, 1, 511, 513])
def test_exactly_the_segments_that_differ_are_named(granularity: int, tail: int) -> None:
    """The first and last byte of a segment count, its neighbours' do not, at every granularity."""
    length = 3 * granularity + min(tail, granularity - 1)
    a = bytes(length)
    for position in (0, granularity - 1, granularity, 3 * granularity - 1, length - 1):
        changed = bytearray(a)
        changed[position] = 1
        b = bytes(changed)
        expected = naive(a, b, granularity)
        assert sum(expected) == 1
        assert compare.differing(array(a), array(b), granularity).tolist() == expected
        assert compare.nonzero(array(b), granularity).tolist() == expected


@given(
    length=st.integers(1, 40_000),
    granularity=st.sampled_from([512, 1024, 4096, 65536]),
    changes=st.lists(st.tuples(st.integers(0, 39_999), st.integers(0, 255)), max_size=8),
    filling=st.sampled_from([0, 7]),
)
def test_any_contents_give_what_a_plain_loop_gives(
    length: int, granularity: int, changes: list[tuple[int, int]], filling: int
) -> None:
    """No length, no place of a change makes a difference between numpy and a plain loop."""
    a, b = bytearray([filling]) * length, bytearray([filling]) * length
    for position, value in changes:
        b[position % length] = value
    mask = compare.differing(array(a), array(b), granularity)
    assert mask.dtype == np.bool_
    assert mask.tolist() == naive(a, b, granularity)
    assert compare.nonzero(array(b), granularity).tolist() == naive(b, bytes(length), granularity)


def test_equal_buffers_have_no_differing_segment() -> None:
    """Equality decided for the whole at once says so for each segment."""
    content = bytes(range(256)) * 17
    assert compare.same(array(content), array(content))
    assert not compare.differing(array(content), array(content), 512).any()
    assert not compare.zero(array(content))


def test_zeros_longer_than_the_buffer_of_zeros_are_known() -> None:
    """More than the shared page of zeros covers is compared piece by piece, to the last byte."""
    big = compare.buffer((3 << 20) + 5)
    assert compare.zero(big)
    big[-1] = 1
    assert not compare.zero(big)
    assert compare.nonzero(big, 1 << 20).tolist() == [False, False, False, True]


def test_many_threads_compare_at_once() -> None:
    """Nothing is shared between two comparisons."""
    wrong: list[int] = []

    def work(number: int) -> None:
        a, b = compare.buffer(1 << 20), compare.buffer(1 << 20)
        b[number * 4096] = 1
        found = [compare.differing(a, b, 4096).nonzero()[0].tolist() for _ in range(20)]
        wrong.extend(number for segments in found if segments != [number])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
