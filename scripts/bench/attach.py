#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""posthoc attach against the full backup that it replaces, on a running QEMU with a writer.

Rounds of `posthoc attach`, `blockdev-backup sync=full` to a new qcow2 and `blockdev-mirror sync=full` on one
cached disk: the wall time of each, alone and beside a writer, and how many synchronous 4 KiB writes a second
that writer gets meanwhile (qemu-io by the guest's device, in QEMU's main loop) and before, with none of them
running. Then the incremental backup by attach's bitmap and the one by QEMU's own over the same period: the
space that each file takes. Read the ratios, not the figures.

    scripts/bench/attach.py [--size 4G] [--rounds 3] [--folder DIR]

QEMU 7.2 now and then dies of this writer and a backup job at once (bdrv_node_refresh_perm): run it again.
"""

import argparse
import dataclasses
import pathlib
import random
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from dirtymap import units
from tests import command, qemu
from tests.posthoc.qemu import running

PIECE = 1 << 20
SEGMENT = 64 << 10
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


@dataclasses.dataclass(frozen=True)
class Round:
    """Seconds alone and beside a writer, and that writer's writes a second without and during it."""

    alone: float
    beside: float
    quiet: float
    during: float


def measure(
    vm: running.Qemu, size: int, work: Callable[[], None], clean: Callable[[], None]
) -> Round:
    """Time `work` alone and beside a writer."""
    began = time.monotonic()
    work()
    alone = time.monotonic() - began
    clean()
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
    clean()
    return Round(alone, taken, quiet, during)


def attach(vm: running.Qemu, reference: pathlib.Path) -> None:
    words = ("attach", "--qmp", vm.qmp, "--node", "disk0", "--bitmap", "bench", reference)
    command.posthoc(*words)


def remove_bitmap(vm: running.Qemu) -> None:
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


def one_round(vm: running.Qemu, name: str, reference: pathlib.Path, size: int) -> Round:
    folder = reference.parent
    if name == "attach":
        return measure(vm, size, lambda: attach(vm, reference), lambda: remove_bitmap(vm))
    return measure(vm, size, lambda: job(vm, size, name, folder), lambda: end_job(vm, folder))


def compare_speed(live: pathlib.Path, reference: pathlib.Path, size: int, rounds: int) -> None:
    results: dict[str, list[Round]] = {}
    for _ in range(rounds):
        for name in ("attach", "blockdev-backup", "blockdev-mirror"):
            with running.running(running.Disk("disk0", live), system=True) as vm:
                results.setdefault(name, []).append(one_round(vm, name, reference, size))
    print(f"{units.human(size)}, cached; medians of {rounds} rounds; x is against attach")
    ours = median(results["attach"])
    for name, found in results.items():
        now = median(found)
        kept = statistics.median(each.during / each.quiet for each in found)
        print(
            f"{name:16} alone {now.alone:6.2f} s ({now.alone / ours.alone:.2f} x)  "
            f"beside a writer {now.beside:6.2f} s ({now.beside / ours.beside:.2f} x)"
        )
        print(
            f"{'':16} the writer: {writes(now.during)} during it, {writes(now.quiet)} before, {kept:4.0%} kept"
        )


def median(rounds: Sequence[Round]) -> Round:
    """Return the median of each figure."""
    return Round(*map(statistics.median, zip(*map(dataclasses.astuple, rounds), strict=True)))


def writes(rate: float) -> str:
    """Return a rate of 4 KiB writes for people."""
    return f"{rate:.0f} writes/s ({rate * running.BLOCK / 1e6:.2f} MB/s)"


def compare_incrementals(live: pathlib.Path, reference: pathlib.Path, size: int) -> None:
    """Back up by both bitmaps after up to 2000 writes, of which every other one writes what is there already."""
    chance = random.Random(2)
    with running.running(running.Disk("disk0", live), system=True) as vm:
        segments = chance.sample(range(size // SEGMENT), min(2000, size // SEGMENT // 2))
        for segment in segments:
            vm.write("disk0", segment * SEGMENT, running.BLOCK, 1)
        shutil.copyfile(live, reference)
        arguments = {"node": "disk0", "name": "own", "granularity": SEGMENT}
        vm.client("block-dirty-bitmap-add", arguments)
        for number, segment in enumerate(segments):
            vm.write("disk0", segment * SEGMENT, running.BLOCK, 1 + number % 2)
        attach(vm, reference)
        found = vm.bitmaps("disk0")
        taken = {name: incremental(vm, name, reference, size) for name in ("own", "bench")}
    for what, own, ours in (
        ("dirty", found["own"]["count"], found["bench"]["count"]),
        ("incremental backup's file", taken["own"], taken["bench"]),
    ):
        print(
            f"{what}: by QEMU's own bitmap {units.human(own)}, by attach's {units.human(ours)}, "
            f"{ours / own:.2f} of it"
        )


def incremental(vm: running.Qemu, bitmap: str, reference: pathlib.Path, size: int) -> int:
    """Take the incremental backup by `bitmap` over the reference and return the space that its file takes."""
    path = vm.new_target("target", size, (reference, "raw"))
    vm.backup("target", device="disk0", sync="incremental", bitmap=bitmap)
    vm.client("blockdev-del", {"node-name": "target"})
    taken = path.stat().st_blocks * 512
    path.unlink()
    return taken


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
        compare_incrementals(live, reference, arguments.size)


if __name__ == "__main__":
    main()
