#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""A reflink copy with some places changed: the scan that asks where the bytes lie against reading both.

    scripts/bench/reflinks.py [--file-system xfs] [--size 20G] [--changed 100] [--rounds 3] [--folder DIR]

Needs root: the file system is made on a loop device. Target: under 1 % of the time of reading both, once.
Read the ratio, not the figures. Nothing here is part of a test run.
"""

import argparse
import contextlib
import os
import pathlib
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from dirtymap import images, units
from scanner import plan
from scripts.bench import contest


@contextlib.contextmanager
def mounted(folder: pathlib.Path, kind: str, size: int) -> Iterator[pathlib.Path]:
    """Make a file system of `size` bytes in a file of `folder` and mount it."""
    disk, point = folder / "disk", folder / "mnt"
    point.mkdir()
    with disk.open("wb") as stream:
        stream.truncate(size)
    environment = {**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
    subprocess.run([f"mkfs.{kind}", "-q", "-f", str(disk)], check=True, env=environment)
    subprocess.run(["mount", "-o", "loop", str(disk), str(point)], check=True)
    try:
        yield point
    finally:
        subprocess.run(["umount", str(point)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--file-system", choices=("xfs", "btrfs"), default="xfs")
    parser.add_argument("--size", type=units.parse_size, default=20 << 30)
    parser.add_argument("--changed", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help="where the file system is made (a temporary folder)")
    arguments = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(dir=arguments.folder) as name,
        mounted(
            pathlib.Path(name), arguments.file_system, arguments.size * 9 // 8 + (1 << 30)
        ) as point,
    ):
        live, reference = point / "live", point / "reference"
        contest.make(reference, arguments.size)
        subprocess.run(["cp", "--reflink=always", str(reference), str(live)], check=True)
        chosen = random.Random(2)
        contest.change(live, (chosen.randrange(arguments.size) for _ in range(arguments.changed)))
        pair = [images.open(str(path)) for path in (live, reference)]
        try:
            rounds = contest.take_turns({"ours": lambda: contest.scanned(*pair)}, arguments.rounds)
            now = contest.scanned(*pair).statistics()
            whole = contest.seconds(lambda: contest.scanned(*pair, without=plan.REASONS))
        finally:
            for image in pair:
                image.close()
    ours = statistics.median(rounds["ours"])
    print(f"with extents: {ours:.3f} s; reading both: {whole:.1f} s; {ours / whole:.2%} of that")
    print(
        f"read of each: {units.describe(now.size - now.skipped)}, differing: {units.describe(now.differing)}"
    )


if __name__ == "__main__":
    main()
