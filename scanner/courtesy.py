# SPDX-License-Identifier: Apache-2.0
"""How much of its time the scan may work, judged by what the guest's own requests take.

    work  .....................  settle .. rest ....  work  .....................  settle .. rest ....
          share of the time      none      none
          latencies, depth       not       latencies, depth  -> the share for the next round
          with the scan          counted   without it

While the guest is busy, the scan rests for a moment now and then to learn how long the guest's requests take
without it, and how many of them are under way at once (the depth), and gives way until their 99th percentile with
the scan is within 1.2 of that. What still runs when the scan stops is of neither condition: that is the settling.
While the guest does nothing, the scan takes the whole machine.

Latencies come as histograms, one for each kind of request (a flush takes naturally longer than a write, and each
is judged by its own kind): counts by bucket, with each bucket's upper bound.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

# One row for each kind of request.
Histograms = npt.NDArray[np.uint64]

# The guest's 99th percentile, and its depth, may be this much larger than without a scan.
TOLERANCE = 1.2
# Less than so much of a request more is no rise: at depth 1 half of the looks find none.
_LEAST_RISE = 0.5

# The part of the requests above the percentile, and how many of them there must be for it to be known: with
# 1 in place of 5, uneven latencies alone cost half of the share beside 100 requests a second, with 5 a twentieth.
_ABOVE, _KNOWN = 0.01, 5

# Seconds of a round's parts: a sixth of a busy guest's time is given to learning.
_WORK, _REST = 1.0, 0.2
# The longest that the scan settles: beyond that, learning would last longer than a scan is worth.
_SETTLE = 1.0
# Not asked for this long (seconds), the scan was paused or over, and what was counted is of no condition.
_FORGOTTEN = 10.0

# Fewer requests than this in a second, and one under way at less than so many looks (20 of 2.5 ms), are a guest
# that does nothing.
_BUSY, _UNDER_WAY = 20, 0.05

# What was seen before counts this much of what is seen now, unless it is so few that none is to be lost.
_KEPT, _FEW = 0.6, 50

# The share falls fast and comes back slowly; it is never so small that a scan would not end.
_DOWN, _UP, _LEAST = 0.6, 1.15, 0.05


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """What the guest did in one part of a round."""

    seconds: float
    counts: Histograms
    depth: float

    def is_idle(self) -> bool:
        """Tell whether there was nobody to give way to.

        Few requests alone do not say so: a guest that waits for the scan makes few.
        """
        return self.depth < _UNDER_WAY and int(self.counts.sum()) < _BUSY * self.seconds


class Condition:
    """The guest's latencies by kind, and its depth, under one condition; older ones fade away."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.counts = np.zeros(shape)
        self._parts = self._depths = 0.0

    def add(self, part: Part) -> None:
        """Note what was seen."""
        totals = self.counts.sum(axis=1)
        self.counts[totals > _FEW] *= _KEPT
        self.counts += part.counts
        kept = _KEPT if totals.sum() > _FEW else 1
        self._parts = self._parts * kept + 1
        self._depths = self._depths * kept + part.depth

    def depth(self) -> float:
        """Return the mean depth."""
        return self._depths / self._parts


class Courtesy:
    """Says what part of its time the scan may work. Not thread-safe: the scan asks under its lock.

    `sample` returns the guest's requests so far, for each kind a row of counts by bucket; `bounds` are the upper
    bounds of the buckets in the clock's seconds, ascending; `depth` returns how many requests are under way.
    """

    def __init__(
        self,
        sample: Callable[[], Histograms],
        bounds: npt.NDArray[np.float64],
        *,
        depth: Callable[[], int] = lambda: 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.enabled = True
        self._sample = sample
        self._bounds = bounds
        self._depth = depth
        self._clock = clock
        shape = sample().shape
        self._with, self._without = Condition(shape), Condition(shape)
        self._share = 1.0
        self._start()

    def share(self) -> float:
        """Return the part of its time a worker may work at this moment, 0 while it rests."""
        if not self.enabled:
            return 1.0
        now = self._clock()
        if now > self._due + _FORGOTTEN:
            self._start()
        self._looks += 1
        self._depths += self._depth()
        if now >= self._due:
            self._begin(*self._rounds.send(self._end(now)))
        return self._present

    @property
    def allowed(self) -> float:
        """The share of the present round, whether it is at work or at rest."""
        return self._share if self.enabled else 1.0

    def _start(self) -> None:
        """Begin a first round."""
        self._rounds = self._play()
        self._begin(*next(self._rounds))

    def _begin(self, share: float, seconds: float) -> None:
        """Begin a part of a round."""
        self._present, self._began = share, self._clock()
        self._due = self._began + seconds
        self._seen = self._sample()
        self._looks = self._depths = 0

    def _end(self, now: float) -> Part:
        return Part(now - self._began, self._sample() - self._seen, self._depths / self._looks)

    def _play(self) -> Generator[tuple[float, float], Part, None]:
        """Yield the share and the seconds of each part of the rounds, and be sent what was seen in it."""
        worked, enough = 0.0, _WORK
        while True:
            seen = yield self._share, _WORK
            if seen.is_idle():
                self._share, worked, enough = 1.0, 0.0, _WORK
                continue
            self._with.add(seen)
            worked += seen.seconds
            if worked < enough:
                continue
            settle = self._settling(seen)
            yield 0.0, settle
            seen = yield 0.0, _REST
            # A guest that did nothing meanwhile shows nothing.
            if seen.depth or seen.counts.any():
                self._without.add(seen)
                self._adjust()
            # A guest that is given way to is looked at again soon: there the rests cost the least.
            worked, enough = 0.0, _WORK * (1 + settle / _REST if self._share == 1 else 1)

    def _settling(self, seen: Part) -> float:
        """Return the seconds until nothing that the scan delayed is under way: twice the slowest request.

        Once for what the scan itself has begun, once for the guest's request that waits for it.
        """
        ended = np.flatnonzero(seen.counts.any(axis=0))
        # Where none has ended, the last bound stands for what is to come.
        return min(2 * float(self._bounds[ended.max(initial=-1)]), _SETTLE)

    def _adjust(self) -> None:
        """Choose the next round's share."""
        if self._is_slower() or self._is_deeper():
            self._share = max(self._share * _DOWN, _LEAST)
        else:
            self._share = min(self._share * _UP, 1.0)

    def _is_slower(self) -> bool:
        return any(
            self._is_kind_slower(with_scan, without)
            for with_scan, without in zip(self._with.counts, self._without.counts, strict=True)
        )

    def _is_kind_slower(
        self, with_scan: npt.NDArray[np.float64], without: npt.NDArray[np.float64]
    ) -> bool:
        """Compare at the 99th percentile, or at what so few requests can tell, with as much more tolerance."""
        known = float(min(with_scan.sum(), without.sum()))
        if known < 2 * _KNOWN:
            return False
        above = max(_ABOVE, _KNOWN / known)
        limit = self._percentile(without, above) * TOLERANCE * (1 + above)
        return self._percentile(with_scan, above) > limit

    def _percentile(self, counts: npt.NDArray[np.float64], above: float) -> float:
        """Return the seconds that all but the part `above` of the requests took."""
        at = int(np.searchsorted(np.cumsum(counts), counts.sum() * (1 - above)))
        return float(self._bounds[min(at, len(self._bounds) - 1)])

    def _is_deeper(self) -> bool:
        with_scan, without = self._with.depth(), self._without.depth()
        return with_scan > max(without * TOLERANCE, without + _LEAST_RISE)
