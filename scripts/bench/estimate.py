#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The estimate on disks of which 0.1, 1, 10 and 60 % differ: its time, its error, and what the scan takes.

    scripts/bench/estimate.py [--size 4G] [--folder DIR]

Changes come in runs of 1 to 64 segments, as files are written. Nothing here is part of a test run.
"""

import argparse
import pathlib
import random
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=units.parse_size, default=4 << 30)
    parser.add_argument("--folder", help="where the images are made (a temporary folder)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        live, reference = pathlib.Path(name, "live"), pathlib.Path(name, "reference")
        contest.make(reference, arguments.size)
        print(f"{'truth':>8}{'told':>9}{'interval':>20}{'seconds':>9}{'scan said':>11}{'took':>8}")
        for share in (0.001, 0.01, 0.1, 0.6):
            contest.make(live, arguments.size)
            found = changes(arguments.size // SEGMENT, share)
            contest.change(live, (segment * SEGMENT + 99 for segment in found))
            pair = [images.open(str(path)) for path in (live, reference)]
            told = estimate.estimate(*pair, SEGMENT, seed=4)
            took = contest.seconds(lambda pair=pair: contest.scanned(*pair))
            for image in pair:
                image.close()
            truth = len(found) * SEGMENT / arguments.size
            inside = f"{told.low:.2%} - {told.high:.2%}"
            said = told.scan_seconds or 0.0
            print(
                f"{truth:8.2%}{told.share:9.2%}{inside:>20}{told.took:9.2f}{said:11.2f}{took:8.2f}"
            )


if __name__ == "__main__":
    main()
