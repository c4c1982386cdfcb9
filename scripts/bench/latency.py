#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What a scan costs the guest: latencies of 4 KiB writes with the scan off, on with pacing, on without.

    scripts/bench/latency.py [--size 2G] [--seconds 5] [--rounds 3] [--depths 1,4] [--folder DIR]

The images are cached, which is the scan at its fastest; the guest writes to 16 MiB of them, so that the rest has to be
read, and a scan that is complete begins again. Target: the 99th percentile at most 1.2 of that without a scan.
"""

import argparse
import contextlib
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from dirtymap import units
from scripts.bench import contest

ROOT = pathlib.Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
COMMAND = [sys.executable, "-m", "posthoc"]

# What is written to `control` to come into each condition.
CONDITIONS = {
    "off": "cancel",
    "paced": "pacing on\nrescan",
    "not paced": "pacing off\nrescan",
}
PERCENTILES = {"p50": "50.000000", "p99": "99.000000", "p99.9": "99.900000"}


@contextlib.contextmanager
def mounted(folder: pathlib.Path, size: int) -> Iterator[pathlib.Path]:
    images, mountpoint = [folder / "live", folder / "reference"], folder / "mnt"
    for image in images:
        contest.make(image, size)
    contest.cache(*images)
    mountpoint.mkdir()
    subprocess.run([*COMMAND, "mount", *images, mountpoint], check=True, env=ENVIRONMENT)
    try:
        yield mountpoint
    finally:
        subprocess.run([*COMMAND, "umount", mountpoint], check=True, env=ENVIRONMENT)


@contextlib.contextmanager
def scanning(mountpoint: pathlib.Path, condition: str) -> Iterator[Callable[[], int]]:
    """Hold the condition: a scan that is complete begins again; yield what tells the bytes scanned so far.

    Without a scan it is looked at just as often: a thread that wakes up is felt, whoever it belongs to.
    """
    (mountpoint / "control").write_text(CONDITIONS[condition] + "\n")
    over = threading.Event()
    former = 0

    def status() -> dict[str, Any]:
        return cast(dict[str, Any], json.loads((mountpoint / "status.json").read_bytes()))

    def again() -> None:
        nonlocal former
        while not over.wait(0.05):
            if (now := status())["state"] == "complete":
                former += now["size"]
                (mountpoint / "control").write_text("rescan\n")

    thread = threading.Thread(target=again)
    thread.start()
    yield lambda: former + status()["scanned"]
    over.set()
    thread.join()


def fio(mountpoint: pathlib.Path, depth: int, seconds: int) -> dict[str, float]:
    """Return microseconds by percentile."""
    command = ["fio", "--name=writes", f"--filename={mountpoint / 'disk'}", "--size=16M"]
    command += ["--rw=randwrite", "--bs=4k", f"--iodepth={depth}", "--direct=1", "--norandommap=1"]
    command += ["--ioengine=libaio", "--time_based=1", f"--runtime={seconds}", "--ramp_time=2"]
    # Submission and completion: in which of the two an early answer is seen depends on the CPUs.
    command += ["--lat_percentiles=1"]
    done = subprocess.run(
        [*command, "--output-format=json"], check=True, capture_output=True, text=True
    )
    found = json.loads(done.stdout)["jobs"][0]["write"]["lat_ns"]["percentile"]
    return {name: found[key] / 1000 for name, key in PERCENTILES.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=units.parse_size, default=2 << 30)
    parser.add_argument("--seconds", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--depths", default="1,4")
    parser.add_argument("--folder", help="where the disk is made (a temporary folder)")
    arguments = parser.parse_args()
    depths = [int(depth) for depth in arguments.depths.split(",")]
    results: dict[tuple[int, str], list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        with mounted(pathlib.Path(name), arguments.size) as mountpoint:
            for _ in range(arguments.rounds):
                for depth in depths:
                    for condition in CONDITIONS:
                        with scanning(mountpoint, condition) as scanned:
                            began, before = time.monotonic(), scanned()
                            found = fio(mountpoint, depth, arguments.seconds)
                            found["scan"] = (scanned() - before) / (time.monotonic() - began) / 1e9
                        results.setdefault((depth, condition), []).append(found)
    for depth in depths:
        print(
            f"\ndepth {depth:<9}"
            + "".join(f"{p + ' us':>12}" for p in PERCENTILES)
            + "   scan GB/s"
        )
        base: dict[str, float] = {}
        for condition in CONDITIONS:
            rounds = results[depth, condition]
            middle = {p: statistics.median(one[p] for one in rounds) for p in rounds[0]}
            base = base or middle
            ratios = ", ".join(f"{p} {middle[p] / base[p]:.2f}" for p in PERCENTILES)
            print(
                f"  {condition:13}"
                + "".join(f"{middle[p]:12.1f}" for p in PERCENTILES)
                + f"{middle['scan']:12.2f}   {ratios}"
            )


if __name__ == "__main__":
    main()
