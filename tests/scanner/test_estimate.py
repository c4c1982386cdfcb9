# SPDX-License-Identifier: Apache-2.0
"""The estimate: its interval, its sample, and what it makes of extent maps."""

import errno
import random

import pytest

from dirtymap import errors
from dirtymap.images import base
from scanner import estimate, plan
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


@pytest.fixture(autouse=True)
def _one_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates are measured once, not for a share of the two minutes."""
    monkeypatch.setattr(estimate, "_PROBES", 2)


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


def test_the_interval_holds_as_often_as_it_says() -> None:
    """95 %: of 100 samples of one pair at least 88 tell the truth (one in 10,000 runs would have fewer)."""
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
    assert found.scan_seconds == 0.0


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
    found = estimate.estimate(live, reference, G, samples=1000, seconds=0.0, seed=1)
    assert 0 < found.drawn <= 1000
    assert found.drawn % estimate._BATCH in (0, 1000 % estimate._BATCH)
    assert found.low <= 0.1 <= found.high


def test_rates_give_the_scans_time() -> None:
    found = estimated(*pair(512, 5))
    assert found.scan_rate
    assert found.read_rate
    assert found.scan_seconds == pytest.approx(found.to_read / found.scan_rate)
