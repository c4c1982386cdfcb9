# SPDX-License-Identifier: Apache-2.0
"""A monitor that fails at each command in turn: attach ends with one line and leaves QEMU as it was.

The monitor is a real QEMU's behind a proxy, so that what is left behind is really there.
"""

import contextlib
import dataclasses
import itertools
import pathlib
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
import trio

from dirtymap import errors
from posthoc.qemu import place, qmp
from posthoc.sessions import attached, examined
from tests import qemu
from tests.posthoc.qemu import proxy, running

SIZE = 4 << 20
Forward = Callable[[], Awaitable[proxy.Message]]


class Bench:
    """A storage daemon with one disk, a proxy before its monitor, and attach."""

    def __init__(self, vm: running.Qemu, monitor: proxy.Proxy, reference: pathlib.Path) -> None:
        self.vm = vm
        self.monitor = monitor
        self.private = vm.folder / "private"
        self.private.mkdir()
        self.request = examined.Request(
            wishes=(examined.Wish("disk0", str(reference), "backup0"),),
            workers=1,
            directory=str(self.private),
        )

    async def attach(self, path: str | None = None) -> list[attached.Outcome]:
        with trio.fail_after(60):
            return await attached.attach(
                lambda: self.connect(path or self.monitor.path), self.request
            )

    @contextlib.asynccontextmanager
    async def connect(self, path: str) -> AsyncIterator[qmp.Monitor]:
        """Connect, with QEMU for the peer and not what stands before it."""
        async with qmp.connect(path) as monitor:
            monitor._peer = qmp.process_owner(self.vm.pid)
            yield monitor

    def forget(self) -> None:
        """Remove the result, for the next run."""
        self.vm.client("block-dirty-bitmap-remove", {"node": "disk0", "name": "backup0"})

    def break_at(
        self, number: int, fault: Callable[[proxy.Message, Forward], Awaitable[Any]]
    ) -> None:
        self.monitor.commands.clear()
        self.monitor.fired = False
        self.monitor.at = number
        self.monitor.fault = fault

    async def fails(self, path: str | None = None) -> errors.UserError | None:
        """Attach and return its error; None when it went well."""
        try:
            await self.attach(path)
        except errors.UserError as error:
            return error
        return None

    @property
    def last(self) -> str:
        """The last command of the session: what met the fault, or what came after."""
        return self.monitor.commands[-1]


@contextlib.asynccontextmanager
async def bench(
    folder: pathlib.Path, *, system: bool = False, iothread: bool = False
) -> AsyncIterator[Bench]:
    live, reference = folder / "live.raw", folder / "reference.raw"
    qemu.create(live, SIZE)
    qemu.create(reference, SIZE)
    qemu.io(live, "write -P 1 1M 64k")
    disk = running.Disk("disk0", live)
    with running.running(disk, system=system, iothread=iothread) as vm:
        async with proxy.standing_before(str(vm.folder / "proxy"), vm.qmp) as monitor:
            yield Bench(vm, monitor, reference)


async def refuse(command: proxy.Message, forward: Forward) -> proxy.Message:
    """QEMU refuses the command and does nothing."""
    return {"error": {"class": "GenericError", "desc": "no, not today"}, "id": command["id"]}


async def hang_up_before(command: proxy.Message, forward: Forward) -> proxy.Message:
    """The monitor is closed before QEMU has the command."""
    raise proxy.HangUp


async def hang_up_after(command: proxy.Message, forward: Forward) -> proxy.Message:
    """The monitor is closed when QEMU has carried out the command, before its reply."""
    await forward()
    raise proxy.HangUp


async def speak_nonsense(command: proxy.Message, forward: Forward) -> bytes:
    """The command is carried out and the reply is no JSON."""
    await forward()
    return b"%%%\n"


async def answer_oddly(command: proxy.Message, forward: Forward) -> proxy.Message:
    """The command is carried out and the reply is of a shape nobody expects."""
    await forward()
    return {"return": [7], "id": command["id"]}


@pytest.mark.parametrize("fault", [refuse, hang_up_before, hang_up_after, speak_nonsense])
async def test_fault_at_each_command_leaves_qemu_as_it_was(
    tmp_path: pathlib.Path, fault: Callable[[proxy.Message, Forward], Awaitable[Any]]
) -> None:
    """Whichever command fails, nothing of ours is left: no bitmap, node, export, server or file.

    Where only the monitor's connection was lost, it is taken back through a new one.
    """
    async with bench(tmp_path) as here:
        before = here.vm.state()
        # As many commands as it takes: how often one looks whether an export has gone is not fixed.
        for number in itertools.count():
            here.break_at(number, fault)
            error = await here.fails()
            if not here.monitor.fired:
                break
            assert error is not None, (number, here.last)
            assert "\n" not in str(error)
            assert here.vm.state() == before, (number, here.last, str(error))
            assert list(here.private.iterdir()) == []
        assert number > 20
        assert error is None
        assert here.vm.bitmaps("disk0").keys() == {"backup0"}


@pytest.mark.parametrize("fault", [hang_up_before, hang_up_after])
async def test_monitor_lost_does_not_take_a_vm_with_an_iothread_along(
    tmp_path: pathlib.Path, fault: Callable[[proxy.Message, Forward], Awaitable[Any]]
) -> None:
    """The reader's connections stay until the export was removed, through whichever monitor."""
    async with bench(tmp_path, system=True, iothread=True) as here:
        here.request = dataclasses.replace(here.request, accept_iothread_risk=True)
        before = here.vm.state()
        for number in itertools.count():
            here.break_at(number, fault)
            await here.fails()
            if not here.monitor.fired:
                break
            assert here.vm.state() == before, (number, here.last)
        assert number > 20


async def test_odd_answers_are_told_or_do_not_matter(tmp_path: pathlib.Path) -> None:
    """An answer of an unknown shape never ends in a traceback, and nothing is left behind."""
    async with bench(tmp_path) as here:
        before = here.vm.state()
        for number in itertools.count():
            here.break_at(number, answer_oddly)
            error = await here.fails()
            if error is None:
                here.forget()
            if not here.monitor.fired:
                break
            if here.monitor.commands[number].startswith("query-"):
                assert isinstance(error, qmp.ProtocolError), (number, here.last)
            assert here.vm.state() == before, (number, here.last)
        assert number > 20


@pytest.mark.parametrize("fault", [hang_up_before, hang_up_after])
async def test_monitor_lost_for_good_is_made_up_for_by_the_next_attach(
    tmp_path: pathlib.Path,
    fault: Callable[[proxy.Message, Forward], Awaitable[Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """When the monitor cannot be reached again, QEMU keeps our things until the next attach comes.

    This is what kill -9 leaves, at every command of the whole session.
    """
    monkeypatch.setattr(place, "_PATIENCE", 0.05)
    async with bench(tmp_path) as here:

        async def for_good(message: proxy.Message, forward: Forward) -> Any:
            here.monitor.closed = True
            return await fault(message, forward)

        for number in itertools.count():
            here.break_at(number, for_good)
            error = await here.fails()
            if not here.monitor.fired:
                break
            assert error is not None, (number, here.last)
            here.monitor.closed = False
            error = await here.fails(here.vm.qmp)
            if error is not None:
                # The last command, when all was done but the saying so.
                assert "exists and is good" in str(error), (number, here.last)
                assert here.last == "transaction"
                place.remove_dead(str(here.private))
            assert here.vm.bitmaps("disk0")["backup0"]["count"] == 64 << 10, (number, here.last)
            assert here.vm.bitmaps("disk0").keys() == {"backup0"}
            assert list(here.private.iterdir()) == []
            here.forget()
        assert number > 20


def forget_the_map(source: object) -> bool:
    """Keep the carrier's bitmap out of the merge, as if QEMU had lost it."""
    return not isinstance(source, str)


def forget_the_writes(source: object) -> bool:
    """Keep the recording bitmap out of it."""
    return isinstance(source, str)


@pytest.mark.parametrize("forgotten", [forget_the_map, forget_the_writes])
@pytest.mark.parametrize("beside", [False, True], ids=["read-back", "counted"])
async def test_bitmap_that_lacks_what_was_merged_is_not_left(
    tmp_path: pathlib.Path, beside: bool, forgotten: Callable[[object], bool]
) -> None:
    """The verification can fail: a bitmap without the map's bits, or the recorded ones, is told and removed."""
    async with bench(tmp_path, system=True) as here:
        before = here.vm.state()
        here.request = dataclasses.replace(here.request, reference_side_only=beside)

        def change(command: proxy.Message) -> None:
            if command["execute"] == "blockdev-add":
                # Behind the scan: only the recording bitmap has it.
                here.vm.write("disk0", 2 << 20, 4096, 7)
            for action in command.get("arguments", {}).get("actions", ()):
                if action["data"].get("target") == "backup0":
                    sources = action["data"]["bitmaps"]
                    action["data"]["bitmaps"] = [s for s in sources if not forgotten(s)]

        here.monitor.change = change
        error = await here.fails()
        assert "bitmap backup0 of disk0 lacks bits" in str(error)
        assert here.vm.state() == before
        here.monitor.change = None
        await here.attach()
        assert here.vm.bitmaps("disk0")["backup0"]["count"] == 2 * (64 << 10)


async def test_several_disks_begin_and_end_in_one_transaction(tmp_path: pathlib.Path) -> None:
    """One instant for all: the recording bitmaps are added together, and together become what was asked for."""
    async with bench(tmp_path) as here:
        other = tmp_path / "other.raw"
        qemu.create(other, SIZE)
        here.vm.client("blockdev-add", running.Disk("disk1", other).blockdev())
        (wish,) = here.request.wishes
        wishes = (wish, dataclasses.replace(wish, disk="disk1"))
        here.request = dataclasses.replace(here.request, wishes=wishes)
        added: list[list[tuple[str, str]]] = []

        def look(command: proxy.Message) -> None:
            actions = command.get("arguments", {}).get("actions", ())
            assert command["execute"] != "block-dirty-bitmap-add"
            added.append(
                [
                    (action["data"]["node"], re.sub("^posthoc-.{8}-", "", action["data"]["name"]))
                    for action in actions
                    if action["type"] == "block-dirty-bitmap-add"
                ]
            )

        here.monitor.change = look
        await here.attach()
    recording, publishing, *_ = [names for names in added if names]
    assert recording[1:] == [("disk0", "for-backup0"), ("disk1", "for-backup0")]
    assert ("disk0", "backup0") in publishing
    assert ("disk1", "backup0") in publishing


async def test_size_changed_meanwhile_is_told(tmp_path: pathlib.Path) -> None:
    """A disk that grows between the scan and the merge is a refusal of QEMU's, and nothing is left."""
    async with bench(tmp_path) as here:
        before = here.vm.state()

        def grow(command: proxy.Message) -> None:
            if command["execute"] == "blockdev-add":
                here.vm.client("block_resize", {"node-name": "disk0", "size": 2 * SIZE})

        here.monitor.change = grow
        error = await here.fails()
        assert "different sizes" in str(error)
        assert here.vm.state() == before
