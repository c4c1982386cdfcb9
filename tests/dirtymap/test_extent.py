# SPDX-License-Identifier: Apache-2.0
"""Runs of bytes with flags."""

from dirtymap.extent import Extent, data, join, overlaps


def test_neighbours_of_equal_flags_become_one() -> None:
    parts = [
        Extent(0, 4, zero=True),
        Extent(4, 0),
        Extent(4, 4, zero=True),
        data(8, 2),
        data(10, 1),
    ]
    assert list(join(parts)) == [Extent(0, 8, zero=True), data(8, 3)]


def test_a_gap_keeps_extents_apart() -> None:
    assert list(join([data(0, 4), data(5, 1)])) == [data(0, 4), data(5, 1)]


def test_what_overlaps_is_found_with_what_it_is_of() -> None:
    """One within another, several within one, the same end, and what only touches."""
    one = [data(0, 4), data(4, 8), data(20, 5)]
    other = [data(1, 2), data(5, 1), data(8, 4), data(12, 8), data(22, 9)]
    assert list(overlaps(one, other)) == [
        (1, 3, one[0], other[0]),
        (5, 6, one[1], other[1]),
        (8, 12, one[1], other[2]),
        (22, 25, one[2], other[4]),
    ]


def test_an_extent_ends_behind_its_last_byte() -> None:
    assert Extent(3, 4).end == 7
