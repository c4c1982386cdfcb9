# SPDX-License-Identifier: Apache-2.0
"""Which parts of the disk need reading at all, and from which side.

    live        |data      |zeros            |data     |data        |
    reference   |data  |zeros       |zeros        |data   (shorter: zeros beyond its end)
    run          COMPARE|LIVE|EQUAL         |LIVE  |COMPARE|LIVE

A shortcut decides segments without reading them, or by reading one side only. Why each keeps the map safe:

- zeros: an image says "these bytes read as zeros" only where that is sure. The live image is asked after the
  write bitmap has begun to record: either nothing was written since, and the answer still holds, or something
  was, and the write bitmap has the segment whatever is decided here.
- one-side: the same promise for one image; the bytes of the other are read and compared with zeros.
- written (made by the scan itself, chunk by chunk): the write bitmap is part of every map.
- further rules (dirtymap/images/same.py): each states its own reason, under the same condition.

A segment is decided by a shortcut only where the promise covers all of it. Asking is bounded in time and in
memory; what is not answered is read. Each can be switched off by its name.
"""

from __future__ import annotations

import enum
import itertools
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from dirtymap.images import base, same

ZEROS, ONE_SIDE, WRITTEN = "zeros", "one-side", "written"

# The order is part of the layout of Decisions' buffer: only append.
REASONS = (ZEROS, ONE_SIDE, WRITTEN, same.REFLINKS, same.BACKING)

# How much a worker takes at once; the controls are looked at in between. The reader reads it in pieces.
CHUNK = 4 << 20

# A shortcut that saves less than this between two reads is not taken: a chunk costs about as much beyond its
# bytes (locks, two calls, bits) as reading so many.
LEAST_SAVING = 128 << 10

# Extents are asked for in windows of the disk, so that a scan begins at once and memory stays small.
_SMALLEST_WINDOW, _LARGEST_WINDOW = 1 << 30, 64 << 30
_MOST_EXTENTS = 1 << 16

# Seconds that one question may take. At less than a second for each GiB of the smallest window asking still costs
# no more than reading; an image that is slower than that so many times in a row is not asked again.
_PATIENCE = 1.0
_SLOW_ANSWERS = 3


@dataclass(frozen=True, slots=True)
class Tuning:
    """Sizes in bytes that change how fast a scan is, never what it finds."""

    chunk: int = CHUNK
    least_saving: int = LEAST_SAVING
    window: int = _SMALLEST_WINDOW


TUNING = Tuning()

Range = tuple[int, int]
Clock = Callable[[], float]


class Kind(enum.Enum):
    """What has to be read to decide a run."""

    EQUAL = "equal"
    COMPARE = "compare"
    LIVE = "live"
    """The reference reads as zeros: only live is read."""
    REFERENCE = "reference"
    """The live disk reads as zeros: only the reference is read."""


@dataclass(frozen=True, slots=True)
class Run:
    """Bytes [start, end), whole segments, decided in one way; `reason` says by what an EQUAL one is."""

    start: int
    end: int
    kind: Kind
    reason: str = ZEROS

    @property
    def length(self) -> int:
        """Bytes."""
        return self.end - self.start


class Plan:
    """The runs of one pass over what is undecided.

    `unit` is what runs are aligned to: the granularity, or a coarser multiple of it where the reference
    knows only hashes of larger blocks. The shortcuts `without` are not taken. Not thread-safe.
    """

    def __init__(
        self,
        live: base.Image,
        reference: base.Image,
        size: int,
        unit: int,
        *,
        rules: Sequence[same.Rule] = (),
        without: Collection[str] = (),
        tuning: Tuning = TUNING,
        clock: Clock = time.monotonic,
    ) -> None:
        self._size = size
        self._unit = unit
        self._rules = [rule for rule in rules if rule.reason not in without]
        self._kinds = {
            zeros: Kind.COMPARE if _SHORTCUTS.get(kind) in without else kind
            for zeros, kind in _KINDS.items()
        }
        self._tuning = tuning
        self._clock = clock
        self._sides = [Side(image, size, unit, clock) for image in (live, reference)]
        self._window = self._smallest_window = max(_down(tuning.window, unit), unit)

    def runs(self, undecided: Iterable[Range]) -> Iterator[Run]:
        """Yield runs that cover the (start, length) of `undecided`, grown to whole units, in order."""
        done = 0
        for start, length in undecided:
            position = max(start // self._unit * self._unit, done)
            done = min(_up(start + length, self._unit), self._size)
            while position < done:
                runs = list(self._next_window(position, done))
                yield from runs
                position = runs[-1].end

    def chunks(self, undecided: Iterable[Range]) -> Iterator[Run]:
        """Yield the same runs with what is to be read cut at multiples of a chunk."""
        step = max(self._tuning.chunk, self._unit)
        for run in self.runs(undecided):
            if run.kind is Kind.EQUAL:
                # However long: deciding it is one operation on the bitmap.
                yield run
                continue
            start = run.start
            while start < run.end:
                end = min(_down(start, step) + step, run.end)
                yield Run(start, end, run.kind, run.reason)
                start = end

    def _next_window(self, start: int, end: int) -> Iterator[Run]:
        began = self._clock()
        stop = min(start + self._window, end)
        runs: Iterator[Run] = iter([Run(start, stop, Kind.COMPARE)])
        if set(self._kinds.values()) != {Kind.COMPARE}:
            live, stop = self._sides[0].zeros(start, stop)
            reference, stop = self._sides[1].zeros(start, stop)
            runs = iter(_merge(start, stop, live, reference, self._kinds))
        for rule in self._rules:
            runs = self._apply(rule, runs, start, stop)
        self._resize(self._clock() - began)
        return _without_small_savings(runs, self._tuning.least_saving)

    def _apply(self, rule: same.Rule, runs: Iterator[Run], start: int, stop: int) -> Iterator[Run]:
        answer = rule.equal(start, stop - start, self._clock() + _PATIENCE)
        ranges = _inward(((found.start, found.end) for found in answer), self._unit, self._size)
        return _cut(runs, list(ranges), rule.reason)

    def _resize(self, took: float) -> None:
        """Ask for more at once where asking is quick, and for less where it is slow."""
        if took < _PATIENCE / 20:
            self._window = min(self._window * 4, _LARGEST_WINDOW)
        elif took > _PATIENCE / 2:
            self._window = max(self._window // 4, self._smallest_window)


class Side:
    """What one image says about its zeros. Beyond the end of a shorter image there are only zeros."""

    def __init__(self, image: base.Image, size: int, unit: int, clock: Clock) -> None:
        self._image = image
        self._size = size
        self._unit = unit
        self._clock = clock
        self._slow = 0

    def zeros(self, start: int, end: int) -> tuple[list[Range], int]:
        """Return the ranges of whole units that read as zeros, and up to where that is known (<= `end`)."""
        found: list[Range] = []
        known = self._ask(start, min(end, self._image.size), found)
        if known >= self._image.size:
            known = end
            if end > self._image.size:
                found.append((max(start, self._image.size), end))
        elif known < end:
            known = _down(known, self._unit)
            if known <= start:
                # More extents than we listen to within one unit: it is read.
                return [], min(start + self._unit, end)
        return list(_inward(_clip(found, known), self._unit, self._size)), known

    def _ask(self, start: int, end: int, found: list[Range]) -> int:
        """Add what the image says to `found` and return up to where it has spoken."""
        if start >= end or self._slow >= _SLOW_ANSWERS:
            return max(start, end)
        deadline = self._clock() + _PATIENCE
        known = start
        for count, answer in enumerate(self._image.extents(start, end - start, deadline)):
            if answer.zero:
                found.append((answer.start, answer.end))
            known = answer.end
            if count >= _MOST_EXTENTS:
                break
        if self._clock() < deadline:
            self._slow = 0
        elif end - start <= _SMALLEST_WINDOW:
            self._slow += 1
        return known


def _up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def _down(value: int, unit: int) -> int:
    return value // unit * unit


def _clip(ranges: Iterable[Range], end: int) -> Iterator[Range]:
    return ((first, min(last, end)) for first, last in ranges if first < end)


def _inward(ranges: Iterable[Range], unit: int, size: int) -> Iterator[Range]:
    """Yield the whole units within `ranges`, which are in order and may touch; the last may be partial."""
    joined: list[Range] = []
    for first, last in ranges:
        if joined and joined[-1][1] >= first:
            joined[-1] = (joined[-1][0], max(joined[-1][1], last))
        else:
            joined.append((first, last))
    for first, last in joined:
        first, last = _up(first, unit), last if last >= size else _down(last, unit)
        if first < last:
            yield first, last


def _merge(
    start: int,
    stop: int,
    live: list[Range],
    reference: list[Range],
    kinds: Mapping[tuple[bool, bool], Kind],
) -> list[Run]:
    """Return the runs of [start, stop) from the zeros of both sides."""
    edges = {start, stop}
    for ranges in (live, reference):
        for first, last in ranges:
            edges.update((first, last))
    points = sorted(edges)
    runs: list[Run] = []
    at_live = at_reference = 0
    for first, last in itertools.pairwise(points):
        at_live = _skip(live, at_live, first)
        at_reference = _skip(reference, at_reference, first)
        zero = (_covers(live, at_live, first), _covers(reference, at_reference, first))
        kind = kinds[zero]
        if runs and runs[-1].kind is kind:
            runs[-1] = replace(runs[-1], end=last)
        else:
            runs.append(Run(first, last, kind))
    return runs


# (live reads as zeros, reference reads as zeros)
_KINDS = {
    (True, True): Kind.EQUAL,
    (True, False): Kind.REFERENCE,
    (False, True): Kind.LIVE,
    (False, False): Kind.COMPARE,
}

_SHORTCUTS = {Kind.EQUAL: ZEROS, Kind.LIVE: ONE_SIDE, Kind.REFERENCE: ONE_SIDE}


def _skip(ranges: list[Range], at: int, position: int) -> int:
    while at < len(ranges) and ranges[at][1] <= position:
        at += 1
    return at


def _covers(ranges: list[Range], at: int, position: int) -> bool:
    return at < len(ranges) and ranges[at][0] <= position


def _cut(runs: Iterable[Run], equal: list[Range], reason: str) -> Iterator[Run]:
    """Yield `runs` with the parts that `equal` covers decided for `reason`."""
    at = 0
    for run in runs:
        if run.kind is Kind.EQUAL:
            yield run
            continue
        start = run.start
        while start < run.end:
            at = _skip(equal, at, start)
            if at == len(equal) or equal[at][0] >= run.end:
                yield replace(run, start=start)
                break
            first, last = max(equal[at][0], start), min(equal[at][1], run.end)
            if start < first:
                yield replace(run, start=start, end=first)
            yield Run(first, last, Kind.EQUAL, reason)
            start = last


def _without_small_savings(runs: Iterable[Run], least: int) -> Iterator[Run]:
    """Yield `runs` with every piece shorter than `least` read together with the reads beside it."""
    current: Run | None = None
    for run in runs:
        if current is None:
            current = run
        elif (current.kind, current.reason) == (run.kind, run.reason):
            current = replace(current, end=run.end)
        elif _together(current, run, least):
            current = Run(current.start, run.end, Kind.COMPARE)
        else:
            yield current
            current = run
    if current is not None:
        yield current


def _together(before: Run, behind: Run, least: int) -> bool:
    if before.kind is Kind.EQUAL and behind.kind is Kind.EQUAL:
        return False
    return _saving(before) + _saving(behind) < least


def _saving(run: Run) -> int:
    """Return the bytes of the disk whose reading `run` saves, one side counting half."""
    if run.kind is Kind.EQUAL:
        return run.length
    return 0 if run.kind is Kind.COMPARE else run.length // 2
