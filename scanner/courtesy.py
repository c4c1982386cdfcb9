# SPDX-License-Identifier: Apache-2.0
"""How much of its time the scan may work, judged by what the guest's own requests take.

    work  .....................  rest ....  work  .....................  rest ....
          share of the time            none
          p99, depth with the scan     p99, depth without   -> the share for the next round

While the guest is busy, the scan rests for a moment now and then to learn what the guest's 99th percentile is
without it, and how many of its requests are under way at once (the depth), and gives way until those with it
are within 1.2 of that. While the guest does nothing, the scan takes the whole machine. Latencies come as
histograms: counts by bucket, with each bucket's upper bound.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Histogram = npt.NDArray[np.uint64]

# The guest's 99th percentile, and its depth, may be this much larger than without a scan.
TOLERANCE = 1.2
# Less than so much of a request more is no rise: at depth 1 half of the looks find none.
_LEAST_RISE = 0.5
_PERCENTILE = 0.99

# Seconds of a round's two parts: a sixth of a busy guest's time is given to learning.
_WORK, _REST = 1.0, 0.2

# Fewer requests than this in a second of work are a guest that does nothing.
_BUSY = 20

# What was seen before counts this much of what is seen now: a p99 needs some hundred requests.
_KEPT = 0.6

# The share falls fast and comes back slowly; it is never so small that a scan would not end.
_DOWN, _UP, _LEAST = 0.6, 1.15, 0.05


class Condition:
    """The guest's latencies and depth under one condition, older ones fading away."""

    def __init__(self, bounds: npt.NDArray[np.float64]) -> None:
        self._bounds = bounds
        self._counts = np.zeros(len(bounds))
        self._looks = self._depths = 0.0

    def add(self, counts: npt.NDArray[np.float64]) -> None:
        """Note the latencies that came since the last time."""
        self._counts = self._counts * _KEPT + counts
        self._looks *= _KEPT
        self._depths *= _KEPT

    def look(self, depth: int) -> None:
        """Note how many requests are under way at this moment."""
        self._looks += 1
        self._depths += depth

    def depth(self) -> float | None:
        """Return the mean depth, None where nobody has looked."""
        return self._depths / self._looks if self._looks else None

    def p99(self) -> float | None:
        """Return the 99th percentile in the bounds' unit, None while too little is known."""
        total = float(self._counts.sum())
        if total < _BUSY:
            return None
        at = int(np.searchsorted(np.cumsum(self._counts), total * _PERCENTILE))
        return float(self._bounds[min(at, len(self._bounds) - 1)])


class Courtesy:
    """Says what part of its time the scan may work. Not thread-safe: the scan asks under its lock.

    `sample` returns the guest's requests so far as counts by bucket, `bounds` the upper bound of each bucket,
    ascending, in any unit of time; `depth` how many of its requests are under way.
    """

    def __init__(
        self,
        sample: Callable[[], Histogram],
        bounds: npt.NDArray[np.float64],
        *,
        depth: Callable[[], int] = lambda: 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.enabled = True
        self._sample = sample
        self._depth = depth
        self._clock = clock
        self._with, self._without = Condition(bounds), Condition(bounds)
        self._share = 1.0
        self._resting = False
        self._seen = sample()
        self._due = clock() + _WORK

    def share(self) -> float:
        """Return the part of its time a worker may work at this moment, 0 while it rests."""
        if not self.enabled:
            return 1.0
        (self._without if self._resting else self._with).look(self._depth())
        if self._clock() >= self._due:
            self._judge()
        return 0.0 if self._resting else self._share

    @property
    def allowed(self) -> float:
        """The share of the present round, whether it is at work or at rest."""
        return self._share if self.enabled else 1.0

    def _judge(self) -> None:
        """End the part of the round that is over and begin the next."""
        seen = self._sample()
        counts = (seen - self._seen).astype(np.float64)
        self._seen = seen
        if self._resting:
            self._without.add(counts)
            self._share = self._next_share()
            self._begin(resting=False)
        elif counts.sum() < _BUSY:
            # Nobody to give way to.
            self._share = 1.0
            self._begin(resting=False)
        else:
            self._with.add(counts)
            self._begin(resting=True)

    def _begin(self, *, resting: bool) -> None:
        self._resting = resting
        self._due = self._clock() + (_REST if resting else _WORK)

    def _next_share(self) -> float:
        with_scan, without = self._with.p99(), self._without.p99()
        if with_scan is None or without is None:
            return self._share
        if with_scan > without * TOLERANCE or self._is_deeper():
            return max(self._share * _DOWN, _LEAST)
        return min(self._share * _UP, 1.0)

    def _is_deeper(self) -> bool:
        with_scan, without = self._with.depth(), self._without.depth()
        if with_scan is None or without is None:
            return False
        return with_scan > max(without * TOLERANCE, without + _LEAST_RISE)
