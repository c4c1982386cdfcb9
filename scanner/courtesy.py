# SPDX-License-Identifier: Apache-2.0
"""How much of its time the scan may work, judged by what the guest's own requests take.

    work ..............  settle .. rest ...............  work ..............  settle .. rest ...............
    latencies, depth     not       latencies, depth   -> the next round's share of work
    with the scan        counted   without it

While the guest is busy, the scan works and rests in turn, each for long enough that the guest's requests are seen
both with it and without it, and takes the largest share of the time with which the guest's requests as a whole
take little more than without it. What still runs when the scan stops is of neither condition: that is the
settling. While the guest does nothing, the scan takes the whole machine.

Long parts, not a short rest after each chunk: a worker that falls asleep and wakes up moves the guest's threads
from one CPU to another. 4 KiB writes at depth 1 took twice as long beside workers that only woke up 200 times a
second.

Two figures are judged, since neither tells all:

- The 99th percentile of what serving takes, of each kind by itself (a flush takes naturally longer than a write).
  It comes as histograms: counts by bucket, with each bucket's upper bound. It leaves out what a request waits
  for a thread.
- The mean of all that a request takes: the depth divided by the requests a second (Little's law). A guest that
  keeps four requests under way and gets half as many done waits twice as long for each.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

# One row for each kind of request.
Histograms = npt.NDArray[np.uint64]
Values = npt.NDArray[np.float64]

# The 99th percentile of serving, and the mean of all that a request takes, may be this much larger than without
# a scan. What a guest sees at its 99th percentile rises by more than the mean: 4 KiB writes at depth 4 had 1.2
# where the mean had 1.1.
TOLERANCE, _MEAN_TOLERANCE = 1.2, 1.1

# The part of the requests above the percentile, and how many of them there must be for it to be known: with
# 1 in place of 5, uneven latencies alone cost half of the share beside 100 requests a second, with 5 a twentieth.
_ABOVE, _KNOWN = 0.01, 5

# Seconds of a round's parts where the guest feels nothing: a sixth of a busy guest's time is given to learning.
_WORK, _REST = 1.0, 0.2
# The longest that the scan settles: beyond that, learning would last longer than a scan is worth.
_SETTLE = 1.0
# A longer part is looked at after such a time (seconds), a much shorter one does not tell that a guest is idle.
_SLICE, _TELLING = 1.2, 0.5
# Not asked for this long (seconds), the scan was paused or over, and what was counted is of no condition.
_FORGOTTEN = 10.0

# Fewer requests than this in a second, and one under way for less than such a part of the time, are a guest that does
# nothing.
_BUSY, _UNDER_WAY = 20, 0.05

# Looks at the depth in each rest. Few: each is a thread that wakes up.
_LOOKS = 10

# What was seen before counts this much of what is seen now, unless it is so few that none is to be lost.
_KEPT, _FEW = 0.6, 50

# It is never so small that a scan would not end.
_LEAST = 0.05


@dataclass(slots=True)
class Depths:
    """What some looks at the depth found; older ones may have faded."""

    looks: float = 0.0
    total: float = 0.0
    squares: float = 0.0

    def look(self, depth: int) -> None:
        """Note the depth of this moment."""
        self.add(Depths(1, depth, depth * depth), 1)

    def add(self, more: Depths, kept: float) -> None:
        """Note further looks; of the earlier ones a part is kept."""
        self.looks = self.looks * kept + more.looks
        self.total = self.total * kept + more.total
        self.squares = self.squares * kept + more.squares

    @property
    def mean(self) -> float:
        """The mean depth, 0 if nobody has looked."""
        return self.total / self.looks if self.looks else 0.0

    @property
    def error(self) -> float:
        """The standard error of the mean; never less than what one look may have missed."""
        if not self.looks:
            return 0.0
        variance = max(self.squares / self.looks - self.mean**2, 0.0)
        return max(math.sqrt(variance / self.looks), 1 / self.looks)


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """What the guest did in one part of a round: requests by kind and bucket, and the depth at each look."""

    seconds: float
    counts: Histograms
    depths: Depths

    def is_idle(self, bounds: Values) -> bool:
        """Tell whether there was surely nobody to give way to.

        Few requests alone do not say so: a guest that waits for the scan makes few. What it waited for is known of
        those that ended, and of those that did not from the looks.
        """
        few = int(self.counts.sum()) < _BUSY * self.seconds
        waited = float(self.counts.sum(axis=0) @ bounds)
        short = max(self.depths.mean, waited / self.seconds) < _UNDER_WAY
        return few and short and self.seconds >= _TELLING


class Condition:
    """What the guest's requests took under one condition, by kind and as a whole; older ones fade away."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.counts = np.zeros(shape)
        # Faded together, unlike the counts.
        self._kinds = np.zeros(shape[0])
        self._seconds = 0.0
        self._depths = Depths()

    def add(self, part: Part) -> None:
        """Note what was seen."""
        totals = self.counts.sum(axis=1)
        self.counts[totals > _FEW] *= _KEPT
        self.counts += part.counts
        kept = _KEPT if self._requests > _FEW else 1
        self._seconds = self._seconds * kept + part.seconds
        self._kinds = self._kinds * kept + part.counts.sum(axis=1)
        self._depths.add(part.depths, kept)

    @property
    def _requests(self) -> float:
        return float(self._kinds.sum())

    def mix(self) -> Values:
        """Return each kind's part of the requests."""
        return self._kinds / max(self._requests, 1)

    def served(self, bounds: Values) -> Values:
        """Return the mean seconds that serving a request of each kind took, 0 where there was none."""
        seconds: Values = self.counts @ bounds
        requests: Values = np.maximum(self.counts.sum(axis=1), 1)
        return seconds / requests

    def at_least(self) -> float:
        """Return the mean seconds of a request, less what chance may have added: one standard error of each figure."""
        depth = max(self._depths.mean - self._depths.error, 0.0)
        return depth * self._seconds / (self._requests + math.sqrt(self._requests) + 1)

    def at_most(self) -> float:
        """Return the mean seconds of a request, and what chance may have taken from it; infinite if too few ended."""
        requests = self._requests - math.sqrt(self._requests)
        if requests <= 0:
            return math.inf
        return (self._depths.mean + self._depths.error) * self._seconds / requests


class Courtesy:
    """Says when the scan may work. Not thread-safe: the scan asks under its lock.

    `sample` returns the guest's requests so far, for each kind a row of counts by bucket; `bounds` are the upper
    bounds of the buckets in the clock's seconds, ascending; `depth` returns how many requests are under way.
    """

    def __init__(
        self,
        sample: Callable[[], Histograms],
        bounds: Values,
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
        self._idle = True
        # The seconds that it settles, while it does.
        self._settling = 0.0
        # The present part of the round.
        self._working = True
        self._began = self._due = self._next_look = self._pause = 0.0
        self._seen = sample()
        self._depths = Depths()
        self._start()

    def wait(self, at_work: int = 0) -> float:
        """Return the seconds after which a worker asks again, 0 if it may take a chunk; `at_work` others have one."""
        if not self.enabled:
            # What comes until it is switched on again is of no condition.
            self._due = -math.inf
            return 0.0
        now = self._clock()
        if now > self._due + _FORGOTTEN:
            self._start()
        if now >= self._due and self._settling and at_work:
            # It is not over before the last chunk is.
            self._due = now + max(self._settling, _REST / _LOOKS)
        if now >= self._due:
            self._begin(*self._rounds.send(self._end(now)))
            now = self._began
        if self._working:
            self._depths.look(self._depth())
            return 0.0
        # The first who asks does the looking, and the others sleep: each that wakes up is felt.
        if now < self._next_look:
            return self._due - now
        self._depths.look(self._depth())
        pause = min(self._pause, self._due - now)
        self._next_look = now + pause
        return pause

    @property
    def guest(self) -> bool:
        """Whether there is a guest to give way to, as of the last call of `wait`.

        One that has done nothing for a part of a round is back with the first request that is seen.
        """
        return self.enabled and not (self._idle and self._depths.total == 0)

    @property
    def allowed(self) -> float:
        """The share of its time that the scan takes beside this guest, apart from what learning costs."""
        return self._share if self.enabled else 1.0

    def _start(self) -> None:
        """Begin a first round."""
        self._rounds = self._play()
        self._settling = 0.0
        self._begin(*next(self._rounds))

    def _begin(self, working: bool, seconds: float) -> None:
        """Begin a part of a round."""
        self._working = working
        self._began = self._next_look = self._clock()
        self._due = self._began + seconds
        self._pause = max(seconds, _REST) / _LOOKS
        self._seen = self._sample()
        self._depths = Depths()

    def _end(self, now: float) -> Part:
        return Part(now - self._began, self._sample() - self._seen, self._depths)

    def _play(self) -> Generator[tuple[bool, float], Part, None]:
        """Yield whether to work, and the seconds, of each part of the rounds, and be sent what was seen in it."""
        work = _WORK
        while True:
            worked = yield from self._work(work)
            if worked is None or (yield from self._rest(*worked)):
                self._share, work = 1.0, _WORK
                continue
            self._share = self._bearable()
            # A sixth of the round is for learning, however long the settling.
            _, settle = worked
            whole = (settle + _REST) * (_WORK + _REST) / _REST
            work = min(self._share * whole, whole - settle - _REST)

    def _work(
        self, seconds: float
    ) -> Generator[tuple[bool, float], Part, tuple[float, float] | None]:
        """Work and settle; return the seconds that each took, None as soon as the guest does nothing."""
        worked = 0.0
        slowest = 0.0
        for part in self._slices(seconds):
            seen = yield True, part
            if self._find_idle(seen):
                return None
            self._with.add(seen)
            worked += seen.seconds
            slowest = self._slowest(seen)
        # Until nothing that the scan delayed is under way: once for what the scan itself has begun, once for the
        # guest's request that waits for it.
        self._settling = settle = min(2 * slowest, _SETTLE)
        seen = yield False, settle
        self._settling = 0.0
        if self._find_idle(seen):
            return None
        return worked + max(seen.seconds - settle, 0.0), settle

    def _rest(self, worked: float, settled: float) -> Generator[tuple[bool, float], Part, bool]:
        """Rest as long as the share wants after such work; return whether the guest does nothing."""
        for part in self._slices(max(worked / self._share - worked - settled, _REST)):
            seen = yield False, part
            if self._find_idle(seen):
                return True
            # A guest that did nothing meanwhile shows nothing.
            if seen.depths.total or seen.counts.any():
                self._without.add(seen)
        return False

    def _slices(self, seconds: float) -> list[float]:
        """Cut a part of a round, so that a guest that falls idle is seen in time."""
        count = math.ceil(seconds / _SLICE)
        return [seconds / count] * count

    def _find_idle(self, seen: Part) -> bool:
        self._idle = seen.is_idle(self._bounds)
        return self._idle

    def _slowest(self, seen: Part) -> float:
        """Return the seconds of the slowest request that ended; where none did, the last bound stands for it."""
        ended = np.flatnonzero(seen.counts.any(axis=0))
        return float(self._bounds[ended.max(initial=-1)])

    def _bearable(self) -> float:
        """Return the largest share with which the guest's requests as a whole are within the tolerance."""
        shares = [
            self._bearable_for_kind(with_scan, without)
            for with_scan, without in zip(self._with.counts, self._without.counts, strict=True)
        ]
        return max(min(self._bearable_on_average(), *shares), _LEAST)

    def _bearable_on_average(self) -> float:
        """Judge the mean of all that a request takes, as if the kinds had been mixed without the scan as with it."""
        with_scan, without = (
            condition.served(self._bounds) for condition in (self._with, self._without)
        )
        # A kind that was not seen without the scan takes what it takes with it.
        served = np.where(without > 0, without, with_scan)
        mixed = float((self._with.mix() - self._without.mix()) @ served)
        # No request takes less than its serving.
        alone = max(self._without.at_most() + mixed, float(served @ self._with.mix()))
        beside = self._with.at_least()
        more = alone * (_MEAN_TOLERANCE - 1)
        # The share s of the time takes `beside`, the rest takes `alone`: s * (beside - alone) = more.
        return 1.0 if beside <= alone + more else more / (beside - alone)

    def _bearable_for_kind(self, with_scan: Values, without: Values) -> float:
        """Judge the 99th percentile, or what so few requests can tell, with as much more tolerance."""
        known = float(min(with_scan.sum(), without.sum()))
        if known < 2 * _KNOWN:
            return 1.0
        above = max(_ABOVE, _KNOWN / known)
        limit = self._percentile(without, above) * TOLERANCE * (1 + above)
        beside, alone = (
            float(counts[self._bounds > limit].sum() / counts.sum())
            for counts in (with_scan, without)
        )
        # Less what chance may have added.
        beside -= math.sqrt(beside / float(with_scan.sum()))
        # As on average, for the part of the requests that are above the limit.
        return 1.0 if beside <= above else (above - alone) / (beside - alone)

    def _percentile(self, counts: Values, above: float) -> float:
        """Return the seconds that all but the part `above` of the requests took."""
        at = int(np.searchsorted(np.cumsum(counts), counts.sum() * (1 - above)))
        return float(self._bounds[min(at, len(self._bounds) - 1)])
