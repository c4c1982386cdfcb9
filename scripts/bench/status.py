#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""How fast the mount answers `cat status`, and what a guest of the python data path feels of it.

    scripts/bench/status.py [--size 1T] [--granularities 64K,4K,512] [--datapaths python,native] [--folder DIR]

Sparse images, scanned to the end. Printed for each granularity and data path: median and longest of 20 readings of
`status` and of 5 openings of `dirty.qcow2`; then the guest's longest 4 KiB write in some seconds with nobody
asking, with a `cat status` every 0.2 s, and with an opening of `dirty.qcow2` every 0.2 s, in milliseconds.
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
import time
from collections.abc import Callable, Iterator

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from dirtymap import units

ROOT = pathlib.Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
COMMAND = [sys.executable, "-m", "posthoc"]
GUEST_BYTES, BLOCK, BETWEEN = 16 << 20, 4096, 0.2


@contextlib.contextmanager
def mounted(
    folder: pathlib.Path, size: int, granularity: str, datapath: str
) -> Iterator[pathlib.Path]:
    images, mountpoint = [folder / "live", folder / "reference"], folder / "mnt"
    for image in images:
        image.write_bytes(b"x" * GUEST_BYTES)
        os.truncate(image, size)
    mountpoint.mkdir()
    options = ["--granularity", granularity, "--datapath", datapath]
    subprocess.run([*COMMAND, "mount", *options, *images, mountpoint], check=True, env=ENVIRONMENT)
    try:
        subprocess.run([*COMMAND, "wait", mountpoint], check=True, env=ENVIRONMENT)
        yield mountpoint
    finally:
        subprocess.run([*COMMAND, "umount", mountpoint], check=True, env=ENVIRONMENT)


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def ask(path: pathlib.Path) -> None:
    """Open, look at and read the beginning, as cat(1) and qemu-img do."""
    with path.open("rb", buffering=0) as stream:
        os.fstat(stream.fileno())
        stream.read(1 << 16)


def longest_write(mountpoint: pathlib.Path, length: float, asked: pathlib.Path | None) -> float:
    """Return the seconds of the guest's slowest write while `asked` is opened again and again."""
    receiver, sender = os.pipe()
    guest = os.fork()
    if guest == 0:
        os.write(sender, b"%.9f" % _write(mountpoint / "disk", length))
        os._exit(0)
    os.close(sender)
    end = time.monotonic() + length
    while time.monotonic() < end:
        time.sleep(BETWEEN)
        if asked is not None:
            ask(asked)
    os.waitpid(guest, 0)
    with os.fdopen(receiver, "rb") as stream:
        return float(stream.read())


def _write(disk: pathlib.Path, length: float) -> float:
    places, longest = random.Random(1), 0.0
    fd = os.open(disk, os.O_RDWR)
    end = time.monotonic() + length
    while time.monotonic() < end:
        start = places.randrange(GUEST_BYTES // BLOCK) * BLOCK
        longest = max(longest, seconds(lambda: os.pwrite(fd, bytes(BLOCK), start)))  # noqa: B023 (called here)
    return longest


def measure(mountpoint: pathlib.Path, length: float) -> dict[str, float]:
    files = {"status": 20, "dirty.qcow2": 5}
    found = {}
    for name, count in files.items():
        times = [seconds(lambda: ask(mountpoint / name)) for _ in range(count)]  # noqa: B023 (called here)
        found[f"{name}, median"], found[f"{name}, longest"] = statistics.median(times), max(times)
    for name in (None, *files):
        asked = None if name is None else mountpoint / name
        found[f"write, {name or 'alone'}"] = longest_write(mountpoint, length, asked)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=units.parse_size, default=1 << 40)
    parser.add_argument("--granularities", default="64K,4K,512")
    parser.add_argument("--datapaths", default="python,native")
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--folder", help="where the images are made (a temporary folder)")
    arguments = parser.parse_args()
    for datapath in arguments.datapaths.split(","):
        for granularity in arguments.granularities.split(","):
            with (
                tempfile.TemporaryDirectory(dir=arguments.folder) as name,
                mounted(pathlib.Path(name), arguments.size, granularity, datapath) as mountpoint,
            ):
                found = measure(mountpoint, arguments.seconds)
            shown = "  ".join(f"{key} {value * 1e3:.1f}" for key, value in found.items())
            print(f"{datapath} {granularity}: {shown}", flush=True)


if __name__ == "__main__":
    main()
