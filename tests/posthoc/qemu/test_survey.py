# SPDX-License-Identifier: Apache-2.0
"""What is asked of a QEMU before anything is changed, where a real one cannot be made to say it."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import trio

from dirtymap import errors
from posthoc.qemu import leftovers, place, qmp, survey
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


async def test_scsi_disk_does_not_say_its_thread() -> None:
    """Where a device has no such property there is a danger: the controller's may have."""
    answers = {"qom-list": IOTHREAD, "query-block": [block("scsi0-0-0", "disk0")]}
    assert await survey.iothread_danger(Scripted((7, 2, 0), answers), "disk0")


@pytest.mark.parametrize("name", ["vda", DISK])
async def test_device_by_id_or_path(name: str) -> None:
    """A device is found by its id within its QOM path, and by the whole path."""
    answers = {"query-block": [block(DISK, "disk0"), block("/machine/peripheral/vdb/x", "disk1")]}
    assert await survey.node_of_device(Scripted((9, 0, 0), answers), name) == "disk0"


async def test_device_that_is_not_there() -> None:
    """A device without a medium, or of another name, is told with those that are there."""
    answers = {"query-block": [block(DISK, "disk0"), {"device": "cd", "qdev": "cd"}]}
    with pytest.raises(errors.UserError, match=f"there are: {DISK}"):
        await survey.node_of_device(Scripted((9, 0, 0), answers), "cd")


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
