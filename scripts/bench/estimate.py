#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The estimate on disks of which 0.1, 1, 10 and 60 % differ: its time, its error, and what it tells takes.

    scripts/bench/estimate.py [--size 4G] [--folder DIR]

Changes come in runs of 1 to 64 segments, as files are written. The disk with holes has a segment of data in each
MiB, of which single ones differ. A full backup is qemu-img convert that reads LIVE and writes nothing. Nothing
here is part of a test run.
"""

import argparse
import os
import pathlib
import random
import subprocess
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from dirtymap import images, units
from scanner import estimate
from scripts.bench import contest

SEGMENT = units.DEFAULT_GRANULARITY


def changes(segments: int, share: float) -> set[int]:
    """Return which segments to change: runs until the share is reached."""
    chosen, found = random.Random(3), set[int]()
    while len(found) < share * segments:
        first = chosen.randrange(segments)
        count = min(chosen.randint(1, 64), segments - first, round(share * segments) - len(found))
        found.update(range(first, first + max(1, count)))
    return found


def make_with_holes(path: pathlib.Path, size: int) -> None:
    """Make a disk of `size` bytes with a segment of data at the begin of each MiB."""
    block = random.Random(1).randbytes(SEGMENT)
    with path.open("wb", buffering=0) as out:
        out.truncate(size)
        for start in range(0, size, contest.PIECE):
            os.pwrite(out.fileno(), block, start)
        os.fsync(out.fileno())


def full_backup(path: pathlib.Path, size: int) -> None:
    nowhere = f"driver=null-co,size={size}"
    subprocess.run(
        ["qemu-img", "convert", "-n", "-f", "raw", "--target-image-opts", str(path), nowhere],
        check=True,
    )


def measure(
    live: pathlib.Path, reference: pathlib.Path, size: int, found: set[int], kind: str
) -> None:
    """Change the segments `found` of LIVE, and print a line."""
    contest.change(live, (segment * SEGMENT + 99 for segment in found))
    pair = [images.open(str(path)) for path in (live, reference)]
    told = estimate.estimate(*pair, SEGMENT, seed=4)
    scan = contest.seconds(lambda: contest.scanned(*pair))
    for image in pair:
        image.close()
    full = contest.seconds(lambda: full_backup(live, size))
    truth = len(found) * SEGMENT / size
    inside = f"{told.low:.2%} - {told.high:.2%}"
    said = told.data / told.read_rate if told.read_rate else 0.0
    print(
        f"{kind:8}{truth:8.2%}{told.share:8.2%}{inside:>18}{told.took:9.2f}"
        f"{told.scan_seconds or 0.0:10.2f}{scan:8.2f}{said:10.2f}{full:8.2f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=units.parse_size, default=4 << 30)
    parser.add_argument("--folder", help="where the images are made (a temporary folder)")
    arguments = parser.parse_args()
    size = arguments.size
    chosen = random.Random(5)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        live, reference = pathlib.Path(name, "live"), pathlib.Path(name, "reference")
        print(
            f"{'disk':8}{'truth':>8}{'told':>8}{'interval':>18}{'seconds':>9}"
            f"{'scan said':>10}{'took':>8}{'full said':>10}{'took':>8}"
        )
        contest.make(reference, size)
        for share in (0.001, 0.01, 0.1, 0.6):
            contest.make(live, size)
            measure(live, reference, size, changes(size // SEGMENT, share), "data")
        make_with_holes(reference, size)
        for share in (0.1, 0.6):
            make_with_holes(live, size)
            pieces = range(0, size // SEGMENT, contest.PIECE // SEGMENT)
            found = set(chosen.sample(pieces, round(share * len(pieces))))
            measure(live, reference, size, found, "holes")


if __name__ == "__main__":
    main()
