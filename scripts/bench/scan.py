#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Scan of two cached images against cmp, qemu-img compare and the bare cost of reading both.

All contenders take turns in each round, at the priority that the scan's threads have, and the medians are
compared: read the ratios, not the figures. Where other programs run too, CPU seconds (of all threads and of
the kernel, by the least round) say more than the clock. Nothing here is part of a test run.

    scripts/bench/scan.py [--size 4G] [--rounds 5] [--granularity 64K] [--changed 0] [--folder DIR]

Targets: 2.5 x cmp, 2 x qemu-img compare, 0.85 of bare pread with as many threads.
"""

import argparse
import mmap
import os
import pathlib
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import trio

from dirtymap import units
from dirtymap.images import file
from scanner import scan

PIECE = 1 << 20
LOWEST = 19

# Contender -> the (seconds, CPU seconds) of each round.
Times = dict[str, list[tuple[float, float]]]


def make(path: pathlib.Path, size: int, changed: int) -> None:
    """Write `size` bytes that no file system makes sparse, `changed` of them not like in other files."""
    chance = random.Random(1)
    block = bytearray(chance.randbytes(PIECE))
    with path.open("wb") as out:
        for number in range(-(-size // PIECE)):
            block[:8] = number.to_bytes(8, "little")
            out.write(block[: min(PIECE, size - number * PIECE)])
    own = random.Random(path.name)
    with path.open("r+b") as out:
        for _ in range(changed):
            out.seek(chance.randrange(size))
            out.write(own.randbytes(1))
        out.flush()
        os.fsync(out.fileno())


def cached(path: pathlib.Path) -> None:
    """Read all of it into the page cache."""
    with path.open("rb", buffering=0) as source:
        while source.read(8 * PIECE):
            pass


def posthoc(
    live: str, reference: str, granularity: int, workers: int, without: Collection[str] = ()
) -> None:
    ours, theirs = file.open_file(live), file.open_file(reference)
    try:
        decisions = scan.Decisions(ours.size, granularity)
        trio.run(scan.Scan(ours, theirs, decisions, workers=workers, without=without).run)
        assert decisions.complete
    finally:
        ours.close()
        theirs.close()


def bare(live: str, reference: str, workers: int) -> None:
    """Only read both files, piece by piece, into reused buffers."""
    descriptors = [os.open(path, os.O_RDONLY) for path in (live, reference)]
    size = os.fstat(descriptors[0]).st_size
    pieces = iter(range(0, size, PIECE))
    lock = threading.Lock()

    def work() -> None:
        buffers = [mmap.mmap(-1, PIECE) for _ in descriptors]
        while True:
            with lock:
                start = next(pieces, None)
            if start is None:
                return
            for descriptor, buffer in zip(descriptors, buffers, strict=True):
                os.preadv(descriptor, [buffer], start)

    threads = [threading.Thread(target=work) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for descriptor in descriptors:
        os.close(descriptor)


def tool(*command: str) -> None:
    """Run a comparing tool; 0 and 1 say equal and different."""
    status = subprocess.run(command, check=False, stdout=subprocess.DEVNULL).returncode
    assert status in (0, 1), f"{command[0]} ended with {status}"


def cpu() -> float:
    """Return the CPU seconds of this process and of the tools that have ended."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def seconds(work: Callable[[], None]) -> tuple[float, float]:
    """Return what `work` takes by the clock, and of CPU."""
    began, used = time.perf_counter(), cpu()
    work()
    return time.perf_counter() - began, cpu() - used


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=units.parse_size, default=4 << 30)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--granularity", type=units.parse_size, default=units.DEFAULT_GRANULARITY)
    parser.add_argument("--workers", type=int, default=scan.WORKERS)
    parser.add_argument(
        "--changed", type=int, default=0, help="bytes that differ (cmp stops there)"
    )
    parser.add_argument("--folder", help="where the images are made (a temporary folder)")
    arguments = parser.parse_args()
    os.nice(LOWEST)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        live, reference = pathlib.Path(folder, "live"), pathlib.Path(folder, "reference")
        for path in (live, reference):
            make(path, arguments.size, arguments.changed)
            cached(path)
        names = str(live), str(reference)
        contenders: dict[str, Callable[[], None]] = {
            "posthoc": lambda: posthoc(*names, arguments.granularity, arguments.workers),
            "bare pread": lambda: bare(*names, arguments.workers),
            "cmp": lambda: tool("cmp", "-s", *names),
            "qemu-img compare": lambda: tool(
                "qemu-img", "compare", "-f", "raw", "-F", "raw", *names
            ),
        }
        times: Times = {name: [] for name in contenders}
        for _ in range(arguments.rounds):
            for name, work in contenders.items():
                times[name].append(seconds(work))
    report(times, arguments.size)


def report(times: Times, size: int) -> None:
    clocks = {name: statistics.median(clock for clock, _ in taken) for name, taken in times.items()}
    used = {name: min(used for _, used in taken) for name, taken in times.items()}
    print(f"{'':18}{'seconds':>9}{'GB/s':>8}{'spread':>8}{'CPU':>8}   posthoc is")
    for name, taken in times.items():
        spread = (max(taken)[0] - min(taken)[0]) / clocks[name]
        # Bytes of the disk, each of which is read from both images.
        speed = size / clocks[name] / 1e9
        faster, cheaper = clocks[name] / clocks["posthoc"], used[name] / used["posthoc"]
        print(
            f"{name:18}{clocks[name]:9.3f}{speed:8.2f}{spread:8.0%}{used[name]:8.3f}"
            f"   {faster:.2f} x as fast, {cheaper:.2f} x as cheap"
        )


if __name__ == "__main__":
    main()
