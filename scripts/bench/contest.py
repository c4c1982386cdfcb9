# SPDX-License-Identifier: Apache-2.0
"""What the benches of this folder share: images, rounds in turns, and a table of medians."""

import os
import pathlib
import random
import statistics
import time
from collections.abc import Callable, Collection, Iterable, Mapping

import trio

from dirtymap import units
from dirtymap.images import base
from scanner import scan

PIECE = 1 << 20
LOWEST = 19


def make(path: pathlib.Path, size: int) -> None:
    """Write `size` bytes that nothing makes sparse or smaller, the same for every path."""
    block = bytearray(random.Random(1).randbytes(PIECE))
    with path.open("wb") as out:
        for number in range(-(-size // PIECE)):
            block[:8] = number.to_bytes(8, "little")
            out.write(block[: min(PIECE, size - number * PIECE)])
        out.flush()
        os.fsync(out.fileno())


def change(path: pathlib.Path, offsets: Iterable[int]) -> None:
    """Change the byte at each of `offsets`."""
    with path.open("r+b", buffering=0) as out:
        for offset in offsets:
            byte = os.pread(out.fileno(), 1, offset)
            os.pwrite(out.fileno(), bytes([byte[0] ^ 0xFF]), offset)
        os.fsync(out.fileno())


def cache(*paths: pathlib.Path) -> None:
    """Read all of them into the page cache."""
    for path in paths:
        with path.open("rb", buffering=0) as source:
            while source.read(8 * PIECE):
                pass


def scanned(
    live: base.Image,
    reference: base.Image,
    *,
    without: Collection[str] = (),
    workers: int = scan.WORKERS,
) -> scan.Scan:
    """Scan the pair to its end."""
    decisions = scan.Decisions(live.size, units.DEFAULT_GRANULARITY)
    work = scan.Scan(live, reference, decisions, without=without, workers=workers)
    trio.run(work.run)
    assert decisions.complete
    return work


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def take_turns(
    contenders: Mapping[str, Callable[[], object]], rounds: int
) -> dict[str, list[float]]:
    """Let all run once in each round, at the priority that the scan's threads have; return their seconds."""
    os.setpriority(os.PRIO_PROCESS, 0, LOWEST)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, work in contenders.items():
            times[name].append(seconds(work))
    return times


def report(times: Mapping[str, list[float]], size: int, ours: str) -> None:
    """Print medians, and how the first-named compares."""
    best = statistics.median(times[ours])
    width = max(map(len, times)) + 2
    print(f"{'':{width}}{'seconds':>9}{'GB/s':>8}{'spread':>8}   {ours} is")
    for name, taken in times.items():
        median = statistics.median(taken)
        spread = (max(taken) - min(taken)) / median
        speed = size / median / 1e9
        ratio = median / best
        print(f"{name:{width}}{median:9.3f}{speed:8.2f}{spread:8.0%}   {ratio:.2f} x as fast")
