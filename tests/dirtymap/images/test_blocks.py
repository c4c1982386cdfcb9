# SPDX-License-Identifier: Apache-2.0
"""Requests in whole blocks, and the lock for those that cannot be."""

import threading

import hypothesis
import pytest
from hypothesis import strategies as st

from dirtymap.images import blocks

BLOCK = 512


@pytest.mark.parametrize(
    ("start", "length", "size", "expected"),
    [
        pytest.param(512, 1024, 8192, (512, 1024), id="whole-blocks"),
        pytest.param(513, 1, 8192, (512, 512), id="one-byte"),
        pytest.param(511, 2, 8192, (0, 1024), id="over-a-border"),
        pytest.param(600, 400, 1000, (512, 488), id="end-within-a-block"),
        pytest.param(0, 1, 1, (0, 1), id="image-of-one-byte"),
    ],
)
def test_reads_are_rounded_outwards(
    start: int, length: int, size: int, expected: tuple[int, int]
) -> None:
    assert blocks.around(start, length, BLOCK, size) == expected


@pytest.mark.parametrize(
    ("start", "length", "whole", "partial"),
    [
        pytest.param(512, 1024, (512, 1024), (), id="whole-blocks"),
        pytest.param(513, 1, None, ((513, 1),), id="one-byte"),
        pytest.param(500, 100, None, ((500, 12), (512, 88)), id="over-a-border-filling-none"),
        pytest.param(500, 1000, (512, 512), ((500, 12), (1024, 476)), id="both-rims"),
        pytest.param(512, 600, (512, 512), ((1024, 88),), id="rim-behind"),
        pytest.param(2048, 500, (2048, 500), (), id="last-block-cut-by-the-end"),
        pytest.param(2100, 448, None, ((2100, 448),), id="within-the-cut-block"),
    ],
)
def test_writes_are_split_at_blocks(
    start: int,
    length: int,
    whole: tuple[int, int] | None,
    partial: tuple[tuple[int, int], ...],
) -> None:
    assert blocks.split(start, length, BLOCK, 2548) == blocks.Split(whole, partial)


@hypothesis.given(st.data(), st.integers(1, 5000), st.sampled_from([1, 512, 4096]))
def test_a_split_covers_each_byte_once(data: st.DataObject, size: int, block: int) -> None:
    """Whatever the range: every byte is in one part, each partial one within one block."""
    start = data.draw(st.integers(0, size - 1))
    length = data.draw(st.integers(1, size - start))
    split = blocks.split(start, length, block, size)
    parts = [*split.partial, *([split.whole] if split.whole else [])]
    covered = sorted(at for first, count in parts for at in range(first, first + count))
    assert covered == list(range(start, start + length))
    for first, count in split.partial:
        assert first // block == (first + count - 1) // block
        assert first % block or (first + count) % block


def test_alone_waits_for_those_that_share_and_keeps_newcomers_out() -> None:
    lock = blocks.Lock()
    order: list[str] = []
    sharing, release = threading.Event(), threading.Event()

    def share() -> None:
        with lock.shared():
            sharing.set()
            release.wait()
            order.append("shared")

    def be_alone() -> None:
        with lock.alone():
            order.append("alone")

    def share_late() -> None:
        with lock.shared():
            order.append("late")

    first, second = threading.Thread(target=share), threading.Thread(target=be_alone)
    first.start()
    sharing.wait()
    second.start()
    while not lock._waiting:
        pass
    third = threading.Thread(target=share_late)
    third.start()
    assert order == []
    release.set()
    for thread in (first, second, third):
        thread.join()
    assert order == ["shared", "alone", "late"]
