# SPDX-License-Identifier: Apache-2.0
"""Rates and the frozen statistics."""

import dataclasses

import pytest

from scanner import progress


def test_the_rate_is_of_the_last_seconds() -> None:
    """What was long ago does not count; nothing done lately is a rate of 0."""
    meter = progress.Meter(0.0)
    for second in range(1, 101):
        meter.add(100 if second <= 50 else 10, float(second))
    assert meter.rate(100.0) == pytest.approx(10.0)
    assert meter.rate(1000.0) == pytest.approx(0.0, abs=0.2)


def test_the_first_moments_give_no_absurd_rate() -> None:
    """A first chunk after a microsecond is no terabyte a second."""
    meter = progress.Meter(0.0)
    meter.add(1000, 0.000001)
    assert meter.rate(0.000002) <= 4000


def test_statistics_cannot_be_changed() -> None:
    """A reader's copy is a reader's."""
    now = progress.ScanStatistics(progress.SCANNING, 100, 512, 60, 10, 5)
    assert now.undecided == 40
    with pytest.raises(dataclasses.FrozenInstanceError):
        now.scanned = 5  # type: ignore[misc]
