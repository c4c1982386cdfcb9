# SPDX-License-Identifier: Apache-2.0
"""The estimate: its interval, its sample, and what it makes of extent maps."""

import errno
import random
import tracemalloc
from collections.abc import Iterator

import pytest

from dirtymap import errors, extent
from dirtymap.images import base, same
from scanner import estimate, plan, rates
from tests.scanner import fakes

G = 4096
MIB = 1 << 20


@pytest.mark.parametrize(
    ("hits", "drawn", "low", "high"),
    [
        # From tables of the exact binomial interval at 95 %.
        pytest.param(0, 10, 0.0, 0.3085, id="none-of-ten"),
        pytest.param(5, 10, 0.1871, 0.8129, id="half-of-ten"),
        pytest.param(10, 10, 0.6915, 1.0, id="all-of-ten"),
        pytest.param(1, 100, 0.0003, 0.0545, id="one-of-a-hundred"),
        pytest.param(0, 0, 0.0, 1.0, id="nothing-drawn"),
    ],
)
def test_the_interval_is_clopper_and_pearsons(
    hits: int, drawn: int, low: float, high: float
) -> None:
    assert estimate.interval(hits, drawn) == pytest.approx((low, high), abs=6e-5)


def test_the_interval_is_sound_for_large_samples() -> None:
    low, high = estimate.interval(2000, 4000)
    assert low == pytest.approx(0.4844, abs=1e-4)
    assert high == pytest.approx(0.5156, abs=1e-4)


def pair(segments: int, changed: int, seed: int = 1) -> tuple[fakes.MemoryImage, fakes.MemoryImage]:
    """Two disks of random bytes that differ in one byte of `changed` segments."""
    chosen = random.Random(seed)
    content = bytearray(chosen.randbytes(segments * G))
    reference = fakes.MemoryImage(bytearray(content))
    for segment in chosen.sample(range(segments), changed):
        content[segment * G + chosen.randrange(G)] ^= 0xFF
    return fakes.MemoryImage(content), reference


def estimated(
    live: base.Image, reference: base.Image, samples: int = 4000, **keywords: object
) -> estimate.Estimate:
    # Time enough for the whole sample on any machine.
    return estimate.estimate(
        live,
        reference,
        G,
        samples=samples,
        seconds=120.0,
        seed=1,
        **keywords,  # type: ignore[arg-type]
    )


def test_a_disk_smaller_than_the_sample_is_told_exactly() -> None:
    found = estimated(*pair(300, 17))
    assert (found.drawn, found.drawn_differing) == (300, 17)
    assert found.low == found.share == found.high == pytest.approx(17 / 300)
    assert found.differing() == (17 * G, 17 * G, 17 * G)


@pytest.mark.parametrize("changed", [0, 4, 40, 400, 4000])
def test_the_truth_lies_within_the_interval(changed: int) -> None:
    found = estimated(*pair(4000, changed), samples=1000)
    assert found.drawn == 1000
    assert found.low <= changed / 4000 <= found.high
    assert found.high - found.low < 0.07


def test_the_interval_holds_as_often_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """95 %: of 100 samples of one pair at least 88 tell the truth (one in 10,000 runs would have fewer)."""
    # Nobody asks here how fast it is read.
    monkeypatch.setattr(rates, "_rate", lambda *_: None)
    live, reference = pair(2000, 100)
    told = [
        estimate.estimate(live, reference, G, samples=200, seconds=120.0, seed=seed)
        for seed in range(100)
    ]
    assert sum(found.low <= 0.05 <= found.high for found in told) >= 88


def test_what_both_sides_say_is_zeros_is_not_drawn() -> None:
    live, reference = pair(256, 0)
    for image in (live, reference):
        image.content[64 * G : 192 * G] = bytes(128 * G)
        image.zeros = [(64 * G, 192 * G)]
    live.content[0] ^= 1
    found = estimated(live, reference)
    assert (found.known, found.to_read, found.data) == (128 * G, 128 * G, 128 * G)
    assert (found.drawn, found.drawn_differing) == (128, 1)
    assert found.share == pytest.approx(1 / 256)
    assert all(end <= 64 * G or start >= 192 * G for start, end in _reads(live, reference))


def _reads(*images: fakes.MemoryImage) -> list[tuple[int, int]]:
    return [(start, start + length) for image in images for start, length in image.reads]


def test_read_all_trusts_no_extent_map() -> None:
    live, reference = pair(256, 0)
    live.zeros = reference.zeros = [(0, 256 * G)]
    assert estimated(live, reference).to_read == 0
    assert estimated(live, reference, without=plan.REASONS).drawn == 256


def test_a_disk_that_is_known_needs_no_sample() -> None:
    live, reference = pair(256, 0)
    live.zeros = reference.zeros = [(0, 256 * G)]
    found = estimated(live, reference)
    assert (found.low, found.share, found.high) == (0.0, 0.0, 0.0)
    assert found.to_read == 0
    assert found.scan_seconds == found.planning
    assert (found.scan_rate, found.read_rate) == (None, None)


def test_a_reference_of_hashes_is_drawn_in_its_blocks() -> None:
    live, memory = pair(400, 10)
    reference = fakes.HashedMemory(memory.content, granularity=4 * G)
    found = estimated(live, reference)
    assert found.drawn == 100
    ours, theirs = live.content, memory.content
    blocks = [ours[at : at + 4 * G] != theirs[at : at + 4 * G] for at in range(0, 400 * G, 4 * G)]
    assert found.drawn_differing == sum(blocks)


def test_a_shorter_reference_is_zeros_beyond_its_end() -> None:
    live, reference = pair(100, 0)
    del reference.content[50 * G :]
    found = estimated(live, reference)
    assert (found.drawn, found.drawn_differing) == (100, 50)


def test_what_cannot_be_read_counts_as_differing() -> None:
    live, reference = pair(100, 0)
    live.faults = [(10 * G, 12 * G, OSError(errno.EIO, "bad sector"))]
    found = estimated(live, reference)
    assert found.drawn_differing == 2
    assert found.unreadable >= 2 * G


def test_an_image_that_goes_away_is_one_line() -> None:
    live, reference = pair(100, 0)
    reference.faults = [(0, MIB, base.GoneError("the connection is lost"))]
    with pytest.raises(errors.UserError, match="an image is gone: the connection is lost"):
        estimated(live, reference)


def test_the_sample_ends_with_its_time() -> None:
    """A batch that was begun is finished, so that what is slow is not left out of the count."""
    live, reference = pair(1000, 100)
    clock = fakes.Clock()
    live.before = fakes.slow(clock, each=1.0)
    found = estimate.estimate(live, reference, G, samples=1000, seconds=80.0, seed=1, clock=clock)
    # The sample has half of the time: 40 reads of the 64 in a batch.
    assert found.drawn == estimate._BATCH == 64
    assert found.low <= 0.1 <= found.high


def test_rates_give_the_scans_time() -> None:
    found = estimated(*pair(512, 5))
    assert found.scan_rate
    assert found.read_rate
    assert found.scan_seconds == pytest.approx(found.planning + found.to_read / found.scan_rate)


SEGMENT = 64 << 10


def sparse(runs: int, every: int) -> fakes.MemoryImage:
    """A disk with one segment of data at the begin of each `every` bytes."""
    image = fakes.MemoryImage(bytearray(runs * every))
    for start in range(0, runs * every, every):
        image.content[start] = 1
        image.zeros.append((start + SEGMENT, start + every))
    return image


class AllocationClock(fakes.Clock):
    """One that goes on also when memory is allocated, at 1 GB/s: from a new highest amount on."""

    def __call__(self) -> float:
        _, peak = tracemalloc.get_traced_memory()
        return super().__call__() + peak / 1e9


@pytest.fixture
def allocation_clock() -> Iterator[AllocationClock]:
    tracemalloc.start()
    yield AllocationClock()
    tracemalloc.stop()


def test_short_runs_cost_what_reading_them_costs(allocation_clock: AllocationClock) -> None:
    """Both times, where each run is one segment.

    What a thread needs was made within the measurement: 9.8 s were told of a full backup that took 0.5 s, a
    tenth of the scan's rate, and hence that a scan of 1 to 2 s and an incremental was quicker.
    """
    live, reference = (sparse(64, 5 * SEGMENT) for _ in range(2))
    for image in (live, reference):
        image.before = fakes.slow(allocation_clock, each=50e-6, rate=1e9)
    one_side = 64 * (50e-6 + SEGMENT / 1e9)
    found = estimate.estimate(live, reference, SEGMENT, seed=1, clock=allocation_clock)
    assert (found.to_read, found.data) == (64 * SEGMENT, 64 * SEGMENT)
    assert found.scan_rate
    assert found.read_rate
    assert found.read_rate > found.scan_rate
    assert found.data / found.read_rate == pytest.approx(one_side, rel=0.3)
    assert found.scan_seconds == pytest.approx(2 * one_side, rel=0.3)


@pytest.mark.parametrize(
    ("granularity", "most"), [pytest.param(SEGMENT, 5.5, id="64K"), pytest.param(MIB, 9.0, id="1M")]
)
def test_a_slow_disk_is_estimated_in_time(granularity: int, most: float) -> None:
    """At 1 MiB a second a batch of the sample takes 4 s, at 1 MiB each rate takes two more segments.

    128 MiB were read whatever the time: 70 s where 5 were said.
    """
    live, reference = (fakes.MemoryImage(bytearray(32 * MIB)) for _ in range(2))
    clock = fakes.Clock()
    live.before = fakes.slow(clock, rate=MIB)
    found = estimate.estimate(live, reference, granularity, seconds=5.0, seed=1, clock=clock)
    assert found.took <= most
    assert found.drawn == 4 * MIB // granularity
    assert found.scan_rate == found.read_rate == pytest.approx(MIB)


class Same:
    """A rule by which both images hold the same bytes everywhere."""

    reason = same.REFLINKS

    def equal(self, start: int, length: int, deadline: float) -> Iterator[extent.Extent]:
        del deadline
        yield extent.data(start, length)


def test_a_full_backup_reads_what_a_scan_need_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reflink copies: no run is left to measure a scan by, and the disk has its data nevertheless."""
    live, reference = pair(256, 0)
    clock = fakes.Clock()
    live.before = fakes.slow(clock, rate=MIB)
    monkeypatch.setattr(same, "rules", lambda *_: [Same()])
    found = estimate.estimate(live, reference, G, seed=1, clock=clock)
    assert (found.to_read, found.scan_seconds) == (0, 0.0)
    assert found.data == 256 * G
    assert found.read_rate == pytest.approx(MIB)
