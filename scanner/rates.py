# SPDX-License-Identifier: Apache-2.0
"""How fast a pair is read and compared, and how fast one disk is read: measured on a part of the runs.

    runs        |====|  |=|  |===================|  |=|
    chunks      |====|  |=|  |====|====|====|====|  |=|      cut as a scan takes them
    stretch                       |....|....|....|  |.|      some in a row, as a scan comes to them

A byte of a short run costs more than one of a long run. So chunks are drawn, not bytes: what all those that were
drawn took, for the bytes in all of them, is then the same as of the whole. Both rates are measured with as many
threads as a scan has, and whatever these need is made before the clock starts: a buffer of 32 MiB made
within a measurement on 4000 runs of 64 KiB was nine tenths of it.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from dataclasses import replace

from dirtymap.images import base
from scanner import compare, plan, reader, scan, stock

# The first steps show whether there is time for a larger one: at 1 MiB a second two threads take eight for a chunk
# each. Only the last counts, because many requests in flight make a large one quicker.
_STEPS = (256 << 10, 1 << 20, plan.CHUNK)
# A stretch is about so many bytes, in so many chunks: enough that coming to it does not count.
_BYTES = 32 << 20
_SHORTEST, _LONGEST = 8, 64

Clock = Callable[[], float]
Work = Callable[[plan.Run], int]


def comparing(
    readers: Sequence[reader.Reader],
    runs: Sequence[plan.Run],
    block: int,
    generator: random.Random,
    seconds: float,
    clock: Clock,
) -> float | None:
    """Return how many bytes of the disk a second a scan decides, one thread for each reader.

    Runs are cut at multiples of `block` only. None where nothing was read; raises GoneError.
    """

    def work(desk: reader.Reader) -> Work:
        def decide(run: plan.Run) -> int:
            desk.differing(run.start, run.length, run.kind)
            return run.length

        return decide

    places = _Places(runs, block, generator)
    return _rate([work(desk) for desk in readers], places, seconds, clock)


def reading(
    image: base.Image,
    runs: Sequence[plan.Run],
    generator: random.Random,
    seconds: float,
    clock: Clock,
) -> float | None:
    """Return how many bytes a second are read from one image, which a full backup does.

    What cannot be read takes time and counts nothing. None where nothing was read; raises GoneError.
    """

    def work(memory: memoryview) -> Work:
        def read(run: plan.Run) -> int:
            try:
                image.read_into(run.start, memory[: run.length])
            except base.GoneError:
                raise
            except OSError:
                return 0
            return run.length

        return read

    places = _Places(runs, 1, generator)
    if not places.longest:
        return None
    length = min(places.longest, plan.CHUNK)
    buffers = [compare.buffer(length) for _ in range(scan.WORKERS)]
    for buffer in buffers:
        buffer[:] = 0  # has its pages now, not when it is first read into
    return _rate([work(buffer.data) for buffer in buffers], places, seconds, clock)


class _Places:
    """All chunks, each once, in stretches drawn at random; given out to several threads."""

    def __init__(self, runs: Sequence[plan.Run], block: int, generator: random.Random) -> None:
        self._block = block
        self._stock = stock.Stock.of(runs, self.whole_blocks(plan.CHUNK))
        self._generator = generator
        self._chunks = self._drawn()
        self._rest: plan.Run | None = None
        self._lock = threading.Lock()
        self.longest = max((run.length for run in runs), default=0)

    def whole_blocks(self, length: int) -> int:
        """Return the nearest length that may be taken, at least one block."""
        return max(length // self._block, 1) * self._block

    def _drawn(self) -> Iterator[plan.Run]:
        count = self._stock.count
        length = sum(run.length for run in self._stock.runs)
        stretch = max(_SHORTEST, min(_BYTES * count // max(length, 1), _LONGEST))
        firsts = range(0, count, stretch)
        for first in self._generator.sample(firsts, len(firsts)):
            for number in range(first, min(first + stretch, count)):
                yield self._stock.piece(number)

    def take(self, step: int) -> plan.Run | None:
        """Return at most the next `step` bytes of a chunk, which are whole blocks; None when there are no more."""
        with self._lock:
            chunk = self._rest or next(self._chunks, None)
            if chunk is None:
                return None
            end = min(chunk.start + step, chunk.end)
            self._rest = replace(chunk, start=end) if end < chunk.end else None
            return replace(chunk, end=end)


def _rate(works: Sequence[Work], places: _Places, seconds: float, clock: Clock) -> float | None:
    """Return what `works`, a thread each, do a second; about `seconds`, and one step of each at least."""
    rate = None
    deadline = clock() + seconds
    steps = sorted({places.whole_blocks(min(step, places.longest)) for step in _STEPS})
    with futures.ThreadPoolExecutor(len(works), thread_name_prefix="rate") as pool:
        for step in steps:
            began = clock()
            expected = len(works) * step / rate if rate else 0.0
            if step != steps[0] and began + expected >= deadline:
                break
            until = deadline if step == steps[-1] else began
            parts = [pool.submit(_work_off, work, places, step, until, clock) for work in works]
            done = sum(part.result() for part in parts)
            if done:
                rate = done / max(clock() - began, 1e-6)
    return rate


def _work_off(work: Work, places: _Places, step: int, until: float, clock: Clock) -> int:
    """Return the bytes done by one thread, which ends with the step that is under way at `until`."""
    done = 0
    while (run := places.take(step)) is not None:
        done += work(run)
        if clock() >= until:
            break
    return done
