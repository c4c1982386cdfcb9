# SPDX-License-Identifier: Apache-2.0
"""The write bitmap and the guest's statistics, in one buffer."""

import hypothesis
import pytest
from hypothesis import strategies

from overlayfs import recorder

SIZE, GRANULARITY = 10 * 65536 + 1, 65536


@pytest.mark.parametrize(
    ("start", "length", "segments"),
    [
        pytest.param(0, 1, [0], id="first-byte"),
        pytest.param(65535, 2, [0, 1], id="across-a-border"),
        pytest.param(65536, 65536, [1], id="exactly-one"),
        pytest.param(10 * 65536, 1, [10], id="last-partial-segment"),
        pytest.param(5, 0, [], id="nothing"),
    ],
)
def test_mark_sets_every_touched_segment(start: int, length: int, segments: list[int]) -> None:
    """A segment of which one byte may change is marked, its neighbours are not."""
    record = recorder.Recorder(SIZE, GRANULARITY)
    record.mark(start, length)
    assert [i for i in range(11) if record.written.get(i)] == segments


def test_all_of_it_lies_in_the_buffer() -> None:
    """Who maps the same memory sees the bits and the counters; what stands there is taken over."""
    memory = bytearray(recorder.buffer_length(SIZE, GRANULARITY))
    recorder.Recorder(SIZE, GRANULARITY, memory).mark(3 * GRANULARITY, 1)
    recorder.Recorder(SIZE, GRANULARITY, memory).account(recorder.WRITE, 4096, 2000)
    again = recorder.Recorder(SIZE, GRANULARITY, memory)
    assert list(again.written.runs()) == [(3, 1)]
    assert again.statistics().write.bytes == 4096
    assert memory[0] == 0b1000


def test_buffer_of_another_length_is_refused() -> None:
    """Memory that is too short is never written beyond."""
    memory = bytearray(recorder.buffer_length(SIZE, GRANULARITY) - 1)
    with pytest.raises(ValueError):
        recorder.Recorder(SIZE, GRANULARITY, memory)


def test_swap_takes_the_bits_and_clears_them() -> None:
    """Each bit is in the taken bitmap or in the new one, never in none."""
    record = recorder.Recorder(SIZE, GRANULARITY)
    record.mark(0, GRANULARITY)
    taken = record.swap()
    record.mark(GRANULARITY, 1)
    assert list(taken.runs()) == [(0, 1)]
    assert list(record.written.runs()) == [(1, 1)]


def test_failed_operation_counts_as_error_and_moves_no_bytes() -> None:
    """Operations and latencies count all, bytes the successes."""
    record = recorder.Recorder(SIZE, GRANULARITY)
    record.account(recorder.READ, 512, 5000)
    record.account(recorder.READ, 4096, 7000, failed=True)
    read = record.statistics().read
    assert (read.operations, read.bytes, read.errors) == (2, 512, 1)
    assert int(read.histogram.sum()) == 2
    assert record.statistics().write.operations == 0


def test_statistics_do_not_change_after_they_were_taken() -> None:
    """They are values: what happens later is in the next ones, and `since` tells it."""
    record = recorder.Recorder(SIZE, GRANULARITY)
    record.account(recorder.FLUSH, 0, 1 << 20)
    before = record.statistics()
    record.account(recorder.FLUSH, 0, 1 << 30)
    assert before.flush.operations == 1
    later = record.statistics().since(before)
    assert later.flush.operations == 1
    assert later.flush.percentile(50) == (1 << 30) * 9 // 8


@pytest.mark.parametrize(
    ("nanoseconds", "index"),
    [
        pytest.param(0, 0, id="nothing"),
        pytest.param(1023, 0, id="below-the-first"),
        pytest.param(1024, 0, id="first"),
        pytest.param(1151, 0, id="end-of-first"),
        pytest.param(1152, 1, id="second"),
        pytest.param(2048, 8, id="next-octave"),
        pytest.param((1 << 36) - 1, 207, id="last-bounded"),
        pytest.param(1 << 36, 208, id="beyond"),
        pytest.param(1 << 60, 208, id="far-beyond"),
    ],
)
def test_bucket(nanoseconds: int, index: int) -> None:
    """8 buckets an octave from 2**10 to 2**36 ns: 209, the layout that a native data path shares."""
    assert recorder.BUCKETS == 209
    assert recorder.bucket(nanoseconds) == index


@hypothesis.given(strategies.integers(1 << 10, (1 << 36) - 1))
def test_bucket_is_right_within_an_eighth(nanoseconds: int) -> None:
    """A bucket's end lies above every latency in it, by an eighth at most."""
    end = recorder.bucket_end(recorder.bucket(nanoseconds))
    assert nanoseconds < end <= nanoseconds * 9 // 8 + 1


def test_percentile() -> None:
    """Of 100 operations, 99 quick and one slow: p50 and p99 are quick, p99.9 is slow."""
    record = recorder.Recorder(SIZE, GRANULARITY)
    for _ in range(99):
        record.account(recorder.WRITE, 1, 1 << 14)
    record.account(recorder.WRITE, 1, 1 << 24)
    write = record.statistics().write
    quick, slow = (1 << 14) * 9 // 8, (1 << 24) * 9 // 8
    assert [write.percentile(p) for p in (50, 99, 99.9, 100)] == [quick, quick, slow, slow]
    assert record.statistics().read.percentile(50) is None


def test_percentile_of_what_has_no_bound_is_the_largest_known() -> None:
    """An operation of minutes is reported as 69 s, the histogram's end."""
    record = recorder.Recorder(SIZE, GRANULARITY)
    record.account(recorder.WRITE, 1, 1 << 40)
    assert record.statistics().write.percentile(99) == 1 << 36


def test_buckets_are_those_that_hold_something() -> None:
    """Each with its exclusive upper bound; the slowest has none."""
    record = recorder.Recorder(1 << 20, 65536)
    for nanoseconds in (5, 6, 2_000_000, 1 << 40):
        record.account(recorder.WRITE, 512, nanoseconds)
    found = record.statistics().write.buckets()
    assert [count for _, count in found] == [2, 1, 1]
    bounds = [bound for bound, _ in found]
    assert bounds[0] == 1152
    assert bounds[1] is not None
    assert 2_000_000 < bounds[1] <= 2_000_000 * 9 / 8
    assert bounds[2] is None
    assert record.statistics().read.buckets() == []
