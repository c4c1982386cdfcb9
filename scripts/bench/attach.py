#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""posthoc attach against the full backup that it replaces, on a running QEMU with a writer.

Rounds of `posthoc attach`, `blockdev-backup sync=full` to a new qcow2 and `blockdev-mirror sync=full` on one
cached disk: the wall time of each, and how many synchronous 4 KiB writes a second a writer gets meanwhile
(qemu-io by the guest's device, in QEMU's main loop) against none of them running. Then the size of what is
called dirty, against QEMU's own bitmap over the same period. Read the ratios, not the figures.

    scripts/bench/attach.py [--size 4G] [--rounds 3] [--folder DIR]

QEMU 7.2 now and then dies of this writer and a backup job at once (bdrv_node_refresh_perm): run it again.
"""

import argparse
import pathlib
import random
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from dirtymap import units
from tests import command, qemu
from tests.posthoc.qemu import running

PIECE = 1 << 20
QUIET = 2.0


def make(path: pathlib.Path, size: int) -> None:
    """Write `size` bytes that no file system makes sparse."""
    block = bytearray(random.Random(1).randbytes(PIECE))
    with path.open("wb") as out:
        for number in range(size // PIECE):
            block[:8] = number.to_bytes(8, "little")
            out.write(block)


class Writer(threading.Thread):
    """Writes random blocks one after the other until stopped."""

    def __init__(self, vm: running.Qemu, size: int) -> None:
        super().__init__(daemon=True)
        self.vm, self.size = vm, size
        self.random = random.Random(1)
        self.count = 0
        self.ending = False

    def run(self) -> None:
        while not self.ending:
            start = self.random.randrange(self.size // running.BLOCK) * running.BLOCK
            self.vm.write("disk0", start, running.BLOCK, self.random.randrange(256))
            self.count += 1


def measure(vm: running.Qemu, size: int, work: Callable[[], None]) -> tuple[float, float]:
    """Return the seconds that `work` took, and the writes a second meanwhile over those without it."""
    writer = Writer(vm, size)
    writer.start()
    try:
        began, before = time.monotonic(), writer.count
        time.sleep(QUIET)
        quiet = (writer.count - before) / (time.monotonic() - began)
        began, before = time.monotonic(), writer.count
        work()
        taken = time.monotonic() - began
        during = (writer.count - before) / taken
    finally:
        writer.ending = True
        writer.join()
    return taken, during / quiet


def attach(vm: running.Qemu, reference: pathlib.Path) -> None:
    words = ("attach", "--qmp", vm.qmp, "--node", "disk0", "--bitmap", "bench", reference)
    command.posthoc(*words)
    vm.client("block-dirty-bitmap-remove", {"node": "disk0", "name": "bench"})


def job(vm: running.Qemu, size: int, kind: str, folder: pathlib.Path) -> None:
    """Copy the disk to a new qcow2 by a job of QEMU's, until it is done (a mirror: ready)."""
    path = folder / "target.qcow2"
    qemu.create(path, size, "qcow2")
    vm.client("blockdev-add", running.Disk("target", path, "qcow2").blockdev())
    arguments = {"job-id": "job", "device": "disk0", "target": "target", "sync": "full"}
    vm.client(kind, arguments)
    while any(entry["id"] == "job" and not _over(entry) for entry in vm.client("query-jobs")):
        time.sleep(0.02)


def _over(entry: dict[str, object]) -> bool:
    return entry["status"] in ("ready", "concluded")


def end_job(vm: running.Qemu, folder: pathlib.Path) -> None:
    """Remove what job() has made. Not counted."""
    vm.client.ask("block-job-cancel", {"device": "job", "force": True})
    while vm.client("query-jobs"):
        time.sleep(0.02)
    vm.client("blockdev-del", {"node-name": "target"})
    (folder / "target.qcow2").unlink()


def compare_speed(live: pathlib.Path, reference: pathlib.Path, size: int, rounds: int) -> None:
    folder = live.parent
    results: dict[str, list[tuple[float, float]]] = {}
    for _ in range(rounds):
        for name in ("attach", "blockdev-backup", "blockdev-mirror"):
            with running.running(running.Disk("disk0", live), system=True) as vm:
                if name == "attach":
                    found = measure(vm, size, lambda vm=vm: attach(vm, reference))  # type: ignore[misc]
                else:
                    found = measure(
                        vm,
                        size,
                        lambda vm=vm, name=name: job(vm, size, name, folder),  # type: ignore[misc]
                    )
                    end_job(vm, folder)
            results.setdefault(name, []).append(found)
    own = statistics.median(taken for taken, _ in results["attach"])
    print(f"{units.human(size)}, cached; medians of {rounds} rounds")
    for name, found in results.items():
        taken = statistics.median(seconds for seconds, _ in found)
        writes = statistics.median(share for _, share in found)
        print(
            f"{name:16} {taken:6.2f} s  {taken / own:5.2f} x attach  writes {writes:4.0%} of quiet"
        )


def compare_bits(live: pathlib.Path, reference: pathlib.Path, size: int) -> None:
    """Count both bitmaps after 2000 writes, of which every other one writes what is there already."""
    chance = random.Random(2)
    with running.running(running.Disk("disk0", live), system=True) as vm:
        segments = chance.sample(range(size // 65536), 2000)
        for segment in segments:
            vm.write("disk0", segment * 65536, 4096, 1)
        shutil.copyfile(live, reference)
        arguments = {"node": "disk0", "name": "own", "granularity": 65536}
        vm.client("block-dirty-bitmap-add", arguments)
        for number, segment in enumerate(segments):
            vm.write("disk0", segment * 65536, 4096, 1 + number % 2)
        words = ("attach", "--qmp", vm.qmp, "--node", "disk0", "--bitmap", "posthoc", reference)
        command.posthoc(*words)
        found = vm.bitmaps("disk0")
    own, ours = found["own"]["count"], found["posthoc"]["count"]
    print(
        f"dirty: QEMU's own {units.human(own)}, attach {units.human(ours)}, {ours / own:.2f} of it"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=units.parse_size, default=4 << 30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="posthoc-bench-", dir=arguments.folder) as name:
        folder = pathlib.Path(name)
        live, reference = folder / "live.raw", folder / "reference.raw"
        make(live, arguments.size)
        shutil.copyfile(live, reference)
        compare_speed(live, reference, arguments.size, arguments.rounds)
        compare_bits(live, reference, arguments.size)


if __name__ == "__main__":
    main()
