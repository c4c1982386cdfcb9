#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Scan of two cached images of a format, each behind a qemu-nbd, against qemu-img compare of the same two.

    scripts/bench/formats.py [--format qcow2] [--size 2G] [--rounds 5] [--workers N] [--folder DIR]

Starting the servers counts. Target: 1.5 x qemu-img compare for qcow2. Read the ratios, not the figures.
Nothing here is part of a test run.
"""

import argparse
import contextlib
import pathlib
import subprocess
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from dirtymap import images, units
from scanner import scan
from scripts.bench import contest


def posthoc(live: str, reference: str, workers: int, connections: int | None) -> None:
    options = images.Options(connections=connections)
    with contextlib.ExitStack() as stack:
        opened = []
        for spec in (live, reference):
            opened.append(images.open(spec, options=options))
            stack.callback(opened[-1].close)
        contest.scanned(*opened, workers=workers)


def compare(kind: str, live: pathlib.Path, reference: pathlib.Path) -> None:
    words = ["qemu-img", "compare", "-f", kind, "-F", kind, str(live), str(reference)]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--format", default="qcow2")
    parser.add_argument("--size", type=units.parse_size, default=2 << 30)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=scan.WORKERS)
    parser.add_argument("--connections", type=int)
    parser.add_argument("--folder", help="where the images are made (a temporary folder)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = pathlib.Path(name)
        raw, paths = folder / "raw", (folder / "live", folder / "reference")
        contest.make(raw, arguments.size)
        for path in paths:
            words = ["qemu-img", "convert", "-f", "raw", "-O", arguments.format]
            subprocess.run([*words, str(raw), str(path)], check=True)
        raw.unlink()
        contest.cache(*paths)
        specs = [f"{arguments.format}:{path}" for path in paths]
        times = contest.take_turns(
            {
                "posthoc": lambda: posthoc(*specs, arguments.workers, arguments.connections),
                "qemu-img compare": lambda: compare(arguments.format, *paths),
            },
            arguments.rounds,
        )
    contest.report(times, arguments.size, "posthoc")


if __name__ == "__main__":
    main()
