# SPDX-License-Identifier: Apache-2.0
"""What a scan says of itself: frozen statistics, and the rate they show."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

SCANNING, PAUSED, COMPLETE, CANCELLED, FAILED = (
    "scanning",
    "paused",
    "complete",
    "cancelled",
    "failed",
)

# Rates are of the last so many seconds, from samples at least so far apart.
_WINDOW = 10.0
_STEP = 0.25


@dataclass(frozen=True, slots=True)
class ScanError:
    """Bytes [start, start + length) that could not be read; `side` is "live" or "reference"."""

    side: str
    start: int
    length: int
    errno: int


@dataclass(frozen=True, slots=True)
class ScanStatistics:
    """A scan at one instant. All quantities are bytes of the disk where nothing else is said."""

    state: str
    size: int
    granularity: int
    scanned: int
    """Decided so far, whichever way; equals `size` when the scan is complete."""
    skipped: int
    """The part of `scanned` that was decided without reading either image."""
    differing: int
    """The part of `scanned` found different, unreadable segments included."""
    savings: dict[str, int] = field(default_factory=dict)
    """By reason (plan.REASONS) what was not read; "one-side" is what was read from one image only."""
    rate: float = 0.0
    """Bytes read from each image a second, of late."""
    rate_limit: int | None = None
    workers: int = 0
    eta: float | None = None
    """Seconds until the scan is complete at the present rate; None when that cannot be told."""
    errors: tuple[ScanError, ...] = ()
    """The first of them; `error_count` has all."""
    error_count: int = 0
    beyond: int = 0
    """How much longer than the reference the live disk is; compared with zeros there."""
    failure: str | None = None
    """Why the scan failed, if it did."""

    @property
    def undecided(self) -> int:
        """Not scanned yet, and therefore dirty."""
        return self.size - self.scanned


class Meter:
    """A rate over the last seconds, from amounts as they come. Not thread-safe."""

    def __init__(self, now: float) -> None:
        self._total = 0
        self._samples = deque([(now, 0)])

    def add(self, amount: int, now: float) -> None:
        """Note that `amount` was done by `now`."""
        self._total += amount
        if now - self._samples[-1][0] >= _STEP:
            self._samples.append((now, self._total))
            self._forget(now)

    def rate(self, now: float) -> float:
        """Return the amount a second over the last seconds."""
        self._forget(now)
        since, before = self._samples[0]
        return (self._total - before) / max(now - since, _STEP)

    def _forget(self, now: float) -> None:
        # One sample from before the window stays: the rate is then of the whole window.
        while len(self._samples) > 1 and now - self._samples[1][0] >= _WINDOW:
            self._samples.popleft()
