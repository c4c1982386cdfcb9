# SPDX-License-Identifier: Apache-2.0
"""Runs of bytes with flags."""

from dirtymap.extent import Extent, data, join


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


def test_an_extent_ends_behind_its_last_byte() -> None:
    assert Extent(3, 4).end == 7
