# SPDX-License-Identifier: Apache-2.0
"""What is asked of a QEMU before anything is changed, where a real one cannot be made to say it."""

import contextlib
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import trio

from dirtymap import errors
from posthoc.qemu import leftovers, place, qmp, survey
from tests import qemu
from tests.posthoc.qemu import running

DISK = "/machine/peripheral/vda/virtio-backend"


class Scripted:
    """A monitor with fixed answers; what is not among them is an unknown command."""

    name = "vm"
    peer = None
    folder = None

    def __init__(self, version: tuple[int, int, int], answers: Mapping[str, Any]) -> None:
        self.version = qmp.Version(*version)
        self.answers = answers

    async def execute(
        self, command: str, arguments: Mapping[str, Any] | None = None, within: float = 1
    ) -> Any:
        await trio.lowlevel.checkpoint()
        if command not in self.answers:
            error = {
                "class": "CommandNotFound",
                "desc": f"The command {command} has not been found",
            }
            raise qmp.CommandError(command, arguments, {"error": error})
        return self.answers[command]

    @contextlib.contextmanager
    def listen(self, *events: str) -> Iterator[qmp.Listener]:
        raise NotImplementedError
        yield

    async def wait_lost(self) -> qmp.MonitorError:
        raise NotImplementedError


def block(qdev: str, node: str) -> dict[str, Any]:
    return {"device": "", "qdev": qdev, "inserted": {"node-name": node}}


IOTHREAD = [{"name": "io0", "type": "child<iothread>"}]


@pytest.mark.parametrize(
    ("version", "objects", "blocks", "thread", "danger"),
    [
        ((8, 2, 9), IOTHREAD, [block(DISK, "disk0")], "/objects/io0", True),
        ((8, 2, 9), IOTHREAD, [block(DISK, "disk0")], "", False),
        ((8, 2, 9), IOTHREAD, [block(DISK, "other")], "", True),
        ((8, 2, 9), [], [block(DISK, "disk0")], "", False),
        ((9, 0, 0), IOTHREAD, [block(DISK, "disk0")], "/objects/io0", False),
    ],
    ids=["in-a-thread", "in-the-main-thread", "no-device", "no-iothread", "9.0"],
)
async def test_iothread_danger(
    version: tuple[int, int, int],
    objects: list[dict[str, str]],
    blocks: list[dict[str, Any]],
    thread: str,
    danger: bool,
) -> None:
    """Only what is surely in the main thread, or a QEMU from 9.0 on, is no danger."""
    answers = {"qom-list": objects, "query-block": blocks, "qom-get": thread}
    assert await survey.iothread_danger(Scripted(version, answers), "disk0") == danger


@pytest.mark.parametrize(
    ("version", "objects", "endangered"),
    [((8, 2, 9), IOTHREAD, ["pull"]), ((8, 2, 9), [], []), ((9, 0, 0), IOTHREAD, [])],
    ids=["in-a-thread", "no-iothread", "9.0"],
)
async def test_endangered_exports(
    version: tuple[int, int, int], objects: list[dict[str, str]], endangered: list[str]
) -> None:
    exports = [{"id": "pull", "type": "nbd"}, {"id": "mount", "type": "fuse"}]
    answers = {"qom-list": objects, "query-block-exports": exports}
    assert await survey.endangered_exports(Scripted(version, answers)) == endangered


async def test_scsi_disk_does_not_say_its_thread() -> None:
    """Where a device has no such property there is a danger: the controller's may have."""
    answers = {"qom-list": IOTHREAD, "query-block": [block("scsi0-0-0", "disk0")]}
    assert await survey.iothread_danger(Scripted((7, 2, 0), answers), "disk0")


BLOCKS: list[dict[str, Any]] = [
    # As QEMU shows them: -drive with a device that has an id and without, -blockdev with a virtio and a SCSI disk.
    {**block(DISK, "disk0"), "device": "drive0"},
    {**block("/machine/peripheral-anon/device[0]/virtio-backend", "disk1"), "device": "virtio7"},
    block("/machine/peripheral/vdb/virtio-backend", "disk2"),
    block("scsi0-0-0", "disk3"),
    {"device": "cd", "qdev": "cd"},
]


@pytest.mark.parametrize(
    ("name", "node"),
    [
        ("vda", "disk0"),
        ("drive0", "disk0"),
        (DISK, "disk0"),
        ("/machine/peripheral/vda", "disk0"),
        ("virtio7", "disk1"),
        ("/machine/peripheral-anon/device[0]", "disk1"),
        ("vdb", "disk2"),
        ("scsi0-0-0", "disk3"),
    ],
)
async def test_device_by_any_of_its_names(name: str, node: str) -> None:
    """Its id, its QOM path, that of what holds it, or an old drive's name."""
    assert await survey.node_of_device(Scripted((9, 0, 0), {"query-block": BLOCKS}), name) == node


@pytest.mark.parametrize(
    "name",
    ["cd", "peripheral", "machine", "virtio-backend", "/machine/peripheral", "device[0]", ""],
)
async def test_device_that_is_not_there(name: str) -> None:
    """A device without a medium, or of another name, is told with those that are there."""
    with pytest.raises(errors.UserError, match="there are: drive0, scsi0-0-0, vdb, virtio7"):
        await survey.node_of_device(Scripted((9, 0, 0), {"query-block": BLOCKS}), name)


async def test_devices_of_a_real_qemu(tmp_path: pathlib.Path) -> None:
    """An old drive with a device of one's own, and one with the device that QEMU makes for it."""
    for name in ("a", "b"):
        qemu.create(tmp_path / name, 1 << 20)
    drives = ["-drive", f"if=none,id=drive0,file={tmp_path}/a,format=raw"]
    drives += ["-device", "virtio-blk-pci,drive=drive0,id=vda"]
    drives += ["-drive", f"if=virtio,id=virtio7,file={tmp_path}/b,format=raw"]
    with running.running(system=True, arguments=drives) as vm:
        async with qmp.connect(vm.qmp) as monitor:
            path = "/machine/peripheral/vda"
            names = ("drive0", "vda", path, f"{path}/virtio-backend", "virtio7")
            nodes = [await survey.node_of_device(monitor, name) for name in names]
    assert len(set(nodes[:4])) == 1
    assert nodes[4] != nodes[0]


async def test_living_session_on_the_same_qemu_is_left_alone() -> None:
    """What another posthoc is at work with is no leftover: attaching is refused."""
    with running.folder() as parent:
        async with place.made(str(parent), None) as made:
            answers = {
                "query-block-exports": [{"id": f"posthoc-{made.token}-live-0"}],
                "query-named-block-nodes": [],
            }
            monitor = Scripted((9, 0, 0), answers)
            with pytest.raises(errors.UserError, match="another posthoc is attached"):
                await leftovers.find(monitor)
        found = await leftovers.find(monitor)
        assert found.exports == (f"posthoc-{made.token}-live-0",)
