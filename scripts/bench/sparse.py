#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""A huge sparse pair with little data against that data alone, and against qemu-img compare.

    scripts/bench/sparse.py [--size 1T] [--data 1G] [--extents 64] [--rounds 5] [--folder DIR]

The data lies in so many extents all over the disk. Target: at most 1.2 x the time of the data alone.
Read the ratios, not the figures. Nothing here is part of a test run.
"""

import argparse
import os
import pathlib
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import trio

from dirtymap import units
from dirtymap.images import file
from scanner import scan

LOWEST = 19


def make(path: pathlib.Path, size: int, data: int, extents: int) -> None:
    """Write `data` bytes in `extents` places of a disk of `size`, and read them into the page cache."""
    piece = random.Random(1).randbytes(1 << 20)
    length = data // extents
    with path.open("w+b", buffering=0) as out:
        os.truncate(out.fileno(), size)
        for number in range(extents):
            start = number * (size // extents) // 65536 * 65536
            for at in range(start, start + length, len(piece)):
                os.pwrite(out.fileno(), piece[: min(len(piece), start + length - at)], at)
        os.fsync(out.fileno())
        for number in range(extents):
            start = number * (size // extents) // 65536 * 65536
            os.pread(out.fileno(), length, start)


def posthoc(live: pathlib.Path, reference: pathlib.Path) -> None:
    ours, theirs = file.open_file(str(live)), file.open_file(str(reference))
    try:
        decisions = scan.Decisions(ours.size, units.DEFAULT_GRANULARITY)
        trio.run(scan.Scan(ours, theirs, decisions).run)
        assert decisions.complete
    finally:
        ours.close()
        theirs.close()


def qemu_img(live: pathlib.Path, reference: pathlib.Path) -> None:
    subprocess.run(
        ["qemu-img", "compare", "-f", "raw", "-F", "raw", str(live), str(reference)],
        stdout=subprocess.DEVNULL,
        check=True,
    )


def seconds(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=units.parse_size, default=1 << 40)
    parser.add_argument("--data", type=units.parse_size, default=1 << 30)
    parser.add_argument("--extents", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="where the images are made (a temporary folder)")
    arguments = parser.parse_args()
    os.nice(LOWEST)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = pathlib.Path(name)
        for side in ("live", "reference"):
            make(folder / f"huge-{side}", arguments.size, arguments.data, arguments.extents)
            make(folder / f"small-{side}", arguments.data, arguments.data, 1)
        huge = folder / "huge-live", folder / "huge-reference"
        small = folder / "small-live", folder / "small-reference"
        contenders: dict[str, Callable[[], None]] = {
            "posthoc, sparse": lambda: posthoc(*huge),
            "posthoc, the data alone": lambda: posthoc(*small),
            "qemu-img, sparse": lambda: qemu_img(*huge),
        }
        times: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(arguments.rounds):
            for contender, work in contenders.items():
                times[contender].append(seconds(work))
    ours = statistics.median(times["posthoc, sparse"])
    print(f"{'':26}{'seconds':>9}{'spread':>8}   the sparse scan takes")
    for contender, taken in times.items():
        median = statistics.median(taken)
        spread = (max(taken) - min(taken)) / median
        print(f"{contender:26}{median:9.3f}{spread:8.0%}   {ours / median:.2f} x as long")


if __name__ == "__main__":
    main()
