# SPDX-License-Identifier: Apache-2.0
"""`posthoc attach` on a QEMU that, below 9.0, aborts when a reader of a disk in an iothread goes away.

With --accept-iothread-risk no connection is closed while the export stands, whatever makes posthoc give one up.
Each test stops QEMU for as long as it takes posthoc to lose its patience.
"""

import dataclasses
import os
import pathlib
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from dirtymap.images import nbd
from tests import wait
from tests.posthoc.qemu import running
from tests.scenarios import attaching


@dataclasses.dataclass
class Stopper:
    """Stops a QEMU until posthoc has lost its patience, once."""

    vm: running.Qemu
    stopped: bool = False
    gave_up: bool = False

    def stop(self) -> None:
        if not self.stopped:
            self.stopped = True
            os.kill(self.vm.pid, signal.SIGSTOP)
            # A thread on another processor goes on for a moment, and might answer what is asked next.
            wait.until(self._is_still, "every thread of QEMU has stopped")

    def _is_still(self) -> bool:
        tasks = pathlib.Path(f"/proc/{self.vm.pid}/task").iterdir()
        states = [(task / "stat").read_text().rpartition(")")[2].split()[0] for task in tasks]
        return set(states) == {"T"}

    def go_on(self) -> None:
        self.gave_up = True
        os.kill(self.vm.pid, signal.SIGCONT)


@pytest.fixture
def disks(tmp_path: pathlib.Path) -> attaching.Pair:
    return attaching.pair(tmp_path)


@pytest.fixture
def stopper(disks: attaching.Pair) -> Iterator[Stopper]:
    with running.running(disks.live, system=True, iothread=True) as vm:
        yield Stopper(vm)
        os.kill(vm.pid, signal.SIGCONT)


def attach_and_live(stopper: Stopper, disks: attaching.Pair) -> None:
    """Attach; the bitmap is right and QEMU runs on."""
    attaching.attach_here(stopper.vm, disks, accept_iothread_risk=True, workers=1)
    assert stopper.gave_up
    assert stopper.vm.process is not None
    assert stopper.vm.bitmaps("disk0")["backup0"]["count"] == 4 * attaching.GRANULARITY
    assert stopper.vm.process.poll() is None
    assert attaching.agree(stopper.vm, disks)


def test_block_status_that_takes_too_long(
    stopper: Stopper, disks: attaching.Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scan's second of patience passes: the connection is of no use any more, and stays open."""
    ask = nbd.Connection.status

    def status(connection: nbd.Connection, *arguments: Any) -> list[tuple[int, int]]:
        stopper.stop()
        try:
            return ask(connection, *arguments)
        except nbd.SlowError:
            stopper.go_on()
            raise

    monkeypatch.setattr(nbd.Connection, "status", status)
    attach_and_live(stopper, disks)


def test_read_that_is_not_answered(
    stopper: Stopper, disks: attaching.Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection counts as lost, another one is made, and the first stays open."""
    ask = nbd.Connection.read
    monkeypatch.setattr(nbd, "ANSWER_PATIENCE", 0.2)

    def read(connection: nbd.Connection, *arguments: Any) -> None:
        stopper.stop()
        try:
            ask(connection, *arguments)
        except nbd.LostError:
            stopper.go_on()
            raise

    monkeypatch.setattr(nbd.Connection, "read", read)
    attach_and_live(stopper, disks)
