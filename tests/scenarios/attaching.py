# SPDX-License-Identifier: Apache-2.0
"""What the scenarios of `attach` share: disks, the command, and a posthoc that meets a signal at a step."""

import contextlib
import dataclasses
import pathlib
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import trio

from posthoc.qemu import qmp
from posthoc.sessions import attached, examined
from tests import command, oracle, qemu
from tests.posthoc.qemu import running

SIZE = 32 << 20
GRANULARITY = 64 << 10
# Segments in which the disk differs from the reference before anything is attached.
CHANGED = frozenset({3, 4, 100, 511})
# With it a scan takes about a second.
RATE = "32M"


@dataclasses.dataclass(frozen=True)
class Pair:
    """A disk and the backup it is compared with."""

    live: running.Disk
    reference: pathlib.Path


def pair(
    folder: pathlib.Path,
    format: str = "raw",  # noqa: A002
    node: str = "disk0",
) -> Pair:
    """Make a reference, half of it data, and a disk that differs from it in CHANGED."""
    reference, live = folder / f"{node}-reference.raw", folder / f"{node}.{format}"
    data = random.Random(node).randbytes(SIZE // 2)
    reference.write_bytes(data + bytes(SIZE // 2))
    qemu.convert(reference, live, format)
    writes = [f"write -P 1 {segment * GRANULARITY + 512} 512" for segment in sorted(CHANGED)]
    qemu.io(live, *writes, format=format)
    return Pair(running.Disk(node, live, format), reference)


def server(vm: running.Qemu) -> list[str]:
    """The options for a storage daemon whose NBD server the test writes through."""
    return [] if vm.system else ["--nbd-server", str(vm.server)]


@contextlib.contextmanager
def begun(vm: running.Qemu, disks: Pair, *options: str) -> Iterator["subprocess.Popen[str]"]:
    """Run `posthoc attach` beside the block, which waits for its end."""
    words = ("attach", "--qmp", vm.qmp, "--node", "disk0", "--bitmap", "backup0", *options)
    with subprocess.Popen(
        command.words(*words, disks.reference),
        env=command.environment(),
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        yield process


def attach(
    vm: running.Qemu, disks: Pair, *options: str, status: int | None = 0
) -> subprocess.CompletedProcess[str]:
    """Run `posthoc attach` for one disk, whose bitmap is called backup0."""
    return command.posthoc(
        *("attach", "--qmp", vm.qmp, "--node", disks.live.node, "--bitmap", "backup0"),
        *("--directory", private(vm), *options, disks.reference),
        status=status,
    )


def request(vm: running.Qemu, *pairs: Pair, **options: Any) -> examined.Request:
    """What `attach` would be asked for, with `options` of the Request's own."""
    wishes = (examined.Wish(pair.live.node, str(pair.reference), "backup0") for pair in pairs)
    return examined.Request(tuple(wishes), **{"directory": str(private(vm)), **options})


def attach_all_here(vm: running.Qemu, *pairs: Pair, **options: Any) -> list[attached.Outcome]:
    """The same within this process, which is quicker; raises what the command would tell."""
    wanted = request(vm, *pairs, **options)
    return trio.run(attached.attach, lambda: qmp.connect(vm.qmp), wanted)


def attach_here(vm: running.Qemu, disks: Pair, **options: Any) -> attached.Outcome:
    """The same of one disk."""
    (outcome,) = attach_all_here(vm, disks, **options)
    return outcome


def private(vm: running.Qemu) -> pathlib.Path:
    """The folder for private folders; empty when nothing is left behind."""
    folder = vm.folder / "private"
    folder.mkdir(exist_ok=True)
    return folder


def agree(vm: running.Qemu, disks: Pair) -> bool:
    """Whether an incremental backup by the bitmap, over the reference, is the disk."""
    return vm.backups_agree(disks.live.node, "backup0", (disks.reference, "raw"), SIZE)


def missed(disks: Pair, dirty: set[int]) -> set[int]:
    """The segments of a raw disk that differ and are not `dirty`."""
    return oracle.differing(disks.live.path, disks.reference, GRANULARITY) - dirty


# Sends a signal when posthoc logs a step as done: to itself, or to QEMU. If asked, once more whenever
# something is taken back from QEMU.
_HOOK = """
import logging, os, sys
from posthoc import cli
from posthoc.qemu import attachment

step, number, process, again, *arguments = sys.argv[1:]

def look(record):
    if record.getMessage() == step:
        os.kill(int(process) or os.getpid(), int(number))
    return record.levelno > logging.DEBUG

def signalling(step_back):
    async def step(*words, **more):
        os.kill(int(process) or os.getpid(), int(number))
        await step_back(*words, **more)
    return step

if again == "True":
    for name in ("remove_bitmap", "remove_export", "stop_server"):
        setattr(attachment, name, signalling(getattr(attachment, name)))
logger = logging.getLogger("posthoc.sessions.attached")
logger.setLevel(logging.DEBUG)
logger.addFilter(look)
sys.exit(cli.main(arguments))
"""


def attach_with_signal_at(
    step: str,
    number: signal.Signals,
    vm: running.Qemu,
    disks: Pair,
    *options: str,
    to_qemu: bool = False,
    again: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Run `posthoc attach` for one disk and send a signal when `step` is done, and `again` at all steps back."""
    words = ("--node", disks.live.node, "--bitmap", "backup0", *options, str(disks.reference))
    return command_with_signal_at(step, number, vm, *words, to_qemu=to_qemu, again=again)


def command_with_signal_at(
    step: str,
    number: signal.Signals,
    vm: running.Qemu,
    *words: str,
    to_qemu: bool = False,
    again: bool = False,
) -> subprocess.CompletedProcess[str]:
    """The same with the disks among the `words`."""
    process = vm.pid if to_qemu else 0
    arguments = ["attach", "--qmp", vm.qmp, "--directory", str(private(vm)), *words]
    return subprocess.run(
        [sys.executable, "-c", _HOOK, step, str(int(number)), str(process), str(again), *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=command.TIMEOUT,
        env=command.environment(),
    )
