# SPDX-License-Identifier: Apache-2.0
"""`posthoc attach` to a QEMU that does not answer any more, and is not gone."""

import os
import pathlib
import signal
from typing import Any

import pytest
import trio

from dirtymap.images import nbd
from posthoc.qemu import place, qmp, undo
from posthoc.sessions import attached
from tests.posthoc.qemu import running
from tests.scenarios import attaching


@pytest.fixture
def _little_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(undo, "TIME_LIMIT", 0.5)
    monkeypatch.setattr(qmp, "GREETING_TIMEOUT", 0.5)
    monkeypatch.setattr(place, "_PATIENCE", 0.5)


@pytest.mark.usefixtures("_little_patience")
def test_cancel_does_not_wait_for_a_qemu_that_is_stopped(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while a read hangs: what could not be taken back is told, and the next attach does it."""
    disks = attaching.pair(tmp_path)
    ask = nbd.Connection.read

    async def interrupted(vm: running.Qemu) -> bool:
        token = trio.lowlevel.current_trio_token()

        def read(connection: nbd.Connection, *arguments: Any) -> None:
            os.kill(vm.pid, signal.SIGSTOP)
            token.run_sync_soon(scope.cancel)
            ask(connection, *arguments)

        monkeypatch.setattr(nbd.Connection, "read", read)
        with trio.CancelScope() as scope:
            await attached.attach(lambda: qmp.connect(vm.qmp), attaching.request(vm, disks))
        return scope.cancelled_caught

    with running.running(disks.live) as vm:
        before = vm.state()
        try:
            assert trio.run(interrupted, vm)
        finally:
            os.kill(vm.pid, signal.SIGCONT)
        (left,) = [text for text in caplog.messages if text.startswith("left in QEMU")]
        for part in ("(not done within 0.5 s)", "stop the NBD server", "-for-backup0 of disk0"):
            assert part in left
        assert "as it was found, apart from that" in caplog.messages[-1]
        monkeypatch.setattr(nbd.Connection, "read", ask)
        attaching.attach_here(vm, disks)
        vm.client("block-dirty-bitmap-remove", {"node": "disk0", "name": "backup0"})
        assert vm.state() == before
