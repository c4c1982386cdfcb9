#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Digests: how fast one is made, and a scan against one beside a scan of the image itself; all cached.

    scripts/bench/digest.py [--size 4G] [--rounds 5] [--folder DIR]

The bare hash is BLAKE3 over the same segments from memory in one thread: what b3sum's speed on one core is.
Read the ratios, not the figures. Nothing here is part of a test run.
"""

import argparse
import pathlib
import random
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from dirtymap import images, units
from dirtymap.images import digest
from scripts.bench import contest

SEGMENT = units.DEFAULT_GRANULARITY


def bytes_read() -> int:
    """Return what this process has read through system calls so far."""
    return int(pathlib.Path("/proc/self/io").read_text().split()[1])


def bare_hash(memory: memoryview, size: int) -> None:
    for _ in range(size // len(memory)):
        for at in range(0, len(memory), SEGMENT):
            digest.hash_of(memory[at : at + SEGMENT])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=units.parse_size, default=4 << 30)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="where the images are made (a temporary folder)")
    arguments = parser.parse_args()
    memory = memoryview(random.Random(1).randbytes(8 << 20))
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = pathlib.Path(name)
        paths = folder / "live", folder / "reference"
        for path in paths:
            contest.make(path, arguments.size)
        contest.cache(*paths)
        manifest = f"{folder}/full.digest"
        live, reference = (images.open(str(path)) for path in paths)

        def against_digest() -> None:
            opened = images.open_reference(manifest)
            contest.scanned(live, opened)
            opened.close()

        def make(workers: int) -> None:
            digest.write(manifest, reference, SEGMENT, workers=workers)

        make(1)
        times = contest.take_turns(
            {
                "digest made, 1 thread": lambda: make(1),
                "digest made, 2 threads": lambda: make(2),
                "bare BLAKE3, 1 thread": lambda: bare_hash(memory, arguments.size),
                "scan against a digest": against_digest,
                "scan against the image": lambda: contest.scanned(live, reference),
            },
            arguments.rounds,
        )
        contest.report(times, arguments.size, "scan against a digest")
        for what, work in (
            ("the digest", against_digest),
            ("the image", lambda: contest.scanned(live, reference)),
        ):
            before = bytes_read()
            work()
            print(f"bytes read against {what}: {units.describe(bytes_read() - before)}")
        print(f"the digest's length: {units.describe(pathlib.Path(manifest).stat().st_size)}")


if __name__ == "__main__":
    main()
