# SPDX-License-Identifier: Apache-2.0
"""How much differs, told from extent maps and a random sample before anything is scanned.

    disk      |zeros on both|same extents|  to be read, a share p of it differs  |
    sample                                 x  x   x x    x  x     x  (segments, drawn without bias)

Changes cluster, and a sample of single segments drawn from all of them does not care: each is differing with
probability p wherever the others are. The interval is Clopper and Pearson's (1934), which keeps its
confidence for every p; drawing without replacement makes it only too wide.
"""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Callable, Collection
from concurrent import futures
from dataclasses import dataclass, replace

import numpy as np

from dirtymap import errors
from dirtymap.images import base, same
from scanner import plan, progress, rates, reader, scan, stock

CONFIDENCE = 0.95
SAMPLES = 4000
SECONDS = 5.0

# Requests in flight, for disks that need some to be quick.
_THREADS = 4
# Drawn at random, read in the disk's order: a whole batch or nothing, so that the time limit cannot choose. Fewer
# at once where segments are large: a slow disk takes its time for a batch, too.
_BATCH = 64

Clock = Callable[[], float]


@dataclass(frozen=True)
class Estimate:
    """What was found. Quantities are bytes, rates bytes a second, `took` seconds."""

    size: int
    granularity: int
    known: int
    """Known to be equal without reading."""
    data: int
    """Of the live disk, what is not known to be zeros: what a full backup reads and holds at most."""
    drawn: int
    """Segments of the sample."""
    drawn_differing: int
    low: float
    share: float
    high: float
    """The part of the disk that differs, with its interval."""
    unreadable: int
    planning: float
    """What asking for all the extents takes, which a scan does as well."""
    scan_rate: float | None
    """Bytes of the disk that a scan reads, on as many sides as it must, and compares."""
    read_rate: float | None
    """Bytes of the live disk's data read alone, as a full backup does, with as many threads."""
    took: float

    @property
    def to_read(self) -> int:
        """What a scan has to read."""
        return self.size - self.known

    def differing(self) -> tuple[int, int, int]:
        """Return (at least, about, at most) how many bytes differ."""
        low, about, high = (round(self.size * part) for part in (self.low, self.share, self.high))
        return low, about, high

    @property
    def scan_seconds(self) -> float | None:
        """What a scan takes; None where there was too little to measure."""
        if not self.to_read:
            return self.planning
        return self.planning + self.to_read / self.scan_rate if self.scan_rate else None


def estimate(
    live: base.Image,
    reference: base.Image,
    granularity: int,
    *,
    samples: int = SAMPLES,
    seconds: float = SECONDS,
    without: Collection[str] = (),
    seed: int | None = None,
    clock: Clock = time.monotonic,
) -> Estimate:
    """Return what a scan of this pair would find and take; blocks for about `seconds`, rarely longer.

    The extent maps get a third of the time, the sample a half, the rates the rest. Raises UserError where an
    image is gone.
    """
    began = clock()
    generator = random.Random(seed)
    unit = granularity
    if isinstance(reference, base.HashedImage):
        unit = max(unit, reference.granularity)
    planned = plan.Plan(
        live,
        reference,
        live.size,
        unit,
        rules=same.rules(live, reference),
        without=without,
        clock=clock,
    )
    known, runs, planning = _runs(planned, live.size, began + seconds / 3, clock)
    data, data_runs = _data(live, began + seconds / 3, clock)
    units = stock.Stock.of(runs, unit)
    desk = _Desk(live, reference, granularity)
    try:
        drawn, differing = _sample(
            desk, units, samples, generator, clock() + max(seconds / 2, 0.1), clock
        )
        scan_rate = rates.comparing(
            [desk.reader() for _ in range(scan.WORKERS)],
            runs,
            unit,
            generator,
            seconds / 12,
            clock,
        )
        read_rate = rates.reading(live, data_runs, generator, seconds / 12, clock)
    except base.GoneError as error:
        raise errors.UserError(f"an image is gone: {errors.reason(error)}") from None
    part = (live.size - known) / live.size
    low, high = (
        (differing / drawn,) * 2 if drawn and drawn == units.count else interval(differing, drawn)
    )
    return Estimate(
        size=live.size,
        granularity=granularity,
        known=known,
        data=data,
        drawn=drawn,
        drawn_differing=differing,
        low=low * part,
        share=differing / drawn * part if drawn else 0.0,
        high=high * part if units.count else 0.0,
        unreadable=desk.unreadable,
        planning=planning,
        scan_rate=scan_rate,
        read_rate=read_rate,
        took=clock() - began,
    )


def _runs(
    planned: plan.Plan, size: int, deadline: float, clock: Clock
) -> tuple[int, list[plan.Run], float]:
    """Return the bytes known to be equal, the runs to read, and what asking for all of them takes.

    What is not told in time is read, and taken to be as slow to tell.
    """
    began = clock()
    known, done = 0, 0
    runs: list[plan.Run] = []
    for run in planned.runs([(0, size)]):
        done = run.end
        if run.kind is plan.Kind.EQUAL:
            known += run.length
        else:
            runs.append(run)
        if clock() >= deadline:
            break
    planning = (clock() - began) * size / done
    if done < size:
        runs.append(plan.Run(done, size, plan.Kind.COMPARE))
    return known, runs, planning


def _data(live: base.Image, deadline: float, clock: Clock) -> tuple[int, list[plan.Run]]:
    """Return how much of the live disk is not known to be zeros, and the runs that a full backup reads."""
    deadline = max(deadline, clock() + 0.1)
    data = 0
    runs: list[plan.Run] = []
    for found in live.extents(0, live.size, deadline):
        if found.zero:
            continue
        data += found.length
        if runs and found.start - runs[-1].end < plan.LEAST_SAVING:
            runs[-1] = replace(runs[-1], end=found.end)
        else:
            runs.append(plan.Run(found.start, found.end, plan.Kind.LIVE))
    return data, runs


class _Desk:
    """Readers, one a thread, and what they could not read."""

    def __init__(self, live: base.Image, reference: base.Image, granularity: int) -> None:
        self._live = live
        self._reference = reference
        self._granularity = granularity
        self._local = threading.local()
        self._lock = threading.Lock()
        self.unreadable = 0

    def _report(self, error: progress.ScanError) -> None:
        with self._lock:
            self.unreadable += error.length

    def reader(self) -> reader.Reader:
        """Return a new reader, for one thread."""
        return reader.Reader(self._live, self._reference, self._granularity, self._report)

    def differs(self, run: plan.Run) -> bool:
        """Return whether anything in the run differs or cannot be read; raises GoneError."""
        if not hasattr(self._local, "reader"):
            self._local.reader = self.reader()
        return bool(self._local.reader.differing(run.start, run.length, run.kind).any())


def _sample(
    desk: _Desk,
    units: stock.Stock,
    samples: int,
    generator: random.Random,
    deadline: float,
    clock: Clock,
) -> tuple[int, int]:
    """Return how many units were drawn, and how many of them differ."""
    numbers = generator.sample(range(units.count), min(samples, units.count))
    size = max(_THREADS, min(_BATCH, plan.CHUNK // units.unit))
    drawn = differing = 0
    with futures.ThreadPoolExecutor(_THREADS, thread_name_prefix="sample") as pool:
        for first in range(0, len(numbers), size):
            batch = sorted(numbers[first : first + size])
            differing += sum(pool.map(desk.differs, map(units.piece, batch)))
            drawn += len(batch)
            if clock() >= deadline:
                break
    return drawn, differing


def interval(hits: int, drawn: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return Clopper and Pearson's interval for a share of which `drawn` units showed `hits`."""
    if drawn == 0:
        return 0.0, 1.0
    tail = (1 - confidence) / 2
    # The share at which this many hits or more, or this many or fewer, would just be that unlikely.
    low = 0.0 if hits == 0 else _solve(lambda p: 1 - _at_most(hits - 1, drawn, p) - tail)
    high = 1.0 if hits == drawn else _solve(lambda p: tail - _at_most(hits, drawn, p))
    return low, high


def _solve(rising: Callable[[float], float]) -> float:
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if rising(middle) < 0:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _at_most(hits: int, drawn: int, share: float) -> float:
    """Return the probability of at most `hits` in `drawn` draws of probability `share`."""
    if share <= 0:
        return 1.0
    if share >= 1:
        return 0.0
    numbers = np.arange(hits + 1, dtype=np.float64)
    logs = _log_choices(drawn)[: hits + 1]
    terms = logs + numbers * math.log(share) + (drawn - numbers) * math.log1p(-share)
    return min(1.0, float(np.exp(terms).sum()))


def _log_choices(drawn: int) -> np.ndarray:
    """Return the logarithms of "drawn over k" for all k."""
    steps = np.log(np.arange(drawn, 0, -1, dtype=np.float64)) - np.log(
        np.arange(1, drawn + 1, dtype=np.float64)
    )
    return np.concatenate([[0.0], np.cumsum(steps)])
