# SPDX-License-Identifier: Apache-2.0
"""What a running QEMU has: its nodes with their bitmaps, its devices, and whether a reader endangers it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from dirtymap import errors
from posthoc.qemu import qmp

# The first version whose NBD server is safe in an iothread: its clients may go, and be busy when QEMU drains.
SAFE_VERSION = qmp.Version(9, 0, 0)
# A device in QOM, which may be in another: virtio's backend is in what stands on the PCI bus.
_PERIPHERAL = re.compile(r"(/machine/peripheral(-anon)?/([^/]+))(?:/.*)?")


@dataclass(frozen=True)
class DirtyBitmap:
    """A node's bitmap as query-named-block-nodes shows it; granularity in bytes, count in dirty bytes."""

    name: str
    granularity: int
    count: int
    recording: bool
    busy: bool
    persistent: bool
    inconsistent: bool


@dataclass(frozen=True)
class Node:
    """A block node. `size` is bytes as QEMU counts them: whole sectors of 512."""

    name: str
    driver: str
    size: int
    read_only: bool
    direct: bool  # QEMU goes around the host's page cache
    filename: str
    compat: str | None  # of a qcow2: "0.10" or "1.1"
    bitmaps: tuple[DirtyBitmap, ...]

    @property
    def stores_bitmaps(self) -> bool:
        """Whether a persistent bitmap can be added (QEMU: "Can't store persistent bitmaps" if not)."""
        return self.driver == "qcow2" and self.compat != "0.10" and not self.read_only

    @property
    def file(self) -> str:
        """The name of the file at the bottom; "" where that is not told. A filter's is that of what it is on."""
        if not self.filename.startswith("json:"):
            return self.filename
        try:
            options = json.loads(self.filename.removeprefix("json:"))
        except ValueError:
            return ""  # cut off by QEMU
        while isinstance(options.get("file"), dict):
            options = options["file"]
        return str(options.get("filename", ""))

    def bitmap(self, name: str) -> DirtyBitmap | None:
        """Return the bitmap of that name."""
        return next((bitmap for bitmap in self.bitmaps if bitmap.name == name), None)

    def count(self, name: str) -> int:
        """Return how many bytes the bitmap of that name covers; 0 where there is none."""
        found = self.bitmap(name)
        return 0 if found is None else found.count


async def nodes(monitor: qmp.Monitor) -> dict[str, Node]:
    """Return every named node by name."""
    found = await monitor.execute("query-named-block-nodes", {"flat": True})
    with qmp.understanding("query-named-block-nodes"):
        return {node["node-name"]: _node(node) for node in found}


def _node(facts: dict[str, Any]) -> Node:
    image = facts["image"]
    specific = image.get("format-specific", {}).get("data", {})
    return Node(
        name=facts["node-name"],
        driver=facts["drv"],
        size=image["virtual-size"],
        read_only=facts["ro"],
        direct=facts["cache"]["direct"],
        filename=image["filename"],
        compat=specific.get("compat") if facts["drv"] == "qcow2" else None,
        bitmaps=tuple(_bitmap(bitmap) for bitmap in facts.get("dirty-bitmaps", ())),
    )


def _bitmap(facts: dict[str, Any]) -> DirtyBitmap:
    return DirtyBitmap(
        name=facts.get("name", ""),
        granularity=facts["granularity"],
        count=facts["count"],
        recording=facts["recording"],
        busy=facts["busy"],
        persistent=facts["persistent"],
        inconsistent=facts.get("inconsistent", False),
    )


@dataclass(frozen=True)
class Device:
    """A device of the guest, its drive's name where it has one, and the top node of its medium."""

    drive: str
    qdev: str  # its id, or its QOM path
    node: str

    @property
    def names(self) -> list[str]:
        """What it may be called: its drive, its id, its QOM path, and that of the device around it."""
        names = [self.drive]
        if match := _PERIPHERAL.fullmatch(self.qdev):
            path, anonymous, number = match.groups()
            names += [path] if anonymous else [number, path]
        return [name for name in [*names, self.qdev] if name]


async def devices(monitor: qmp.Monitor) -> list[Device]:
    """Return the devices that have a medium; qemu-storage-daemon has none, nor the command."""
    try:
        blocks = await monitor.execute("query-block")
    except qmp.CommandError as error:
        if error.error_class == "CommandNotFound":
            return []
        raise
    with qmp.understanding("query-block"):
        return [
            Device(block["device"], block.get("qdev", ""), block["inserted"]["node-name"])
            for block in blocks
            if block.get("inserted", {}).get("node-name")
        ]


async def tops(monitor: qmp.Monitor) -> set[str]:
    """Return the nodes that the guest's devices use themselves."""
    return {device.node for device in await devices(monitor)}


async def exports(monitor: qmp.Monitor) -> list[str]:
    """Return the id of every export."""
    found = await monitor.execute("query-block-exports")
    with qmp.understanding("query-block-exports"):
        return [entry["id"] for entry in found]


async def node_of_device(monitor: qmp.Monitor, name: str) -> str:
    """Return the node that the guest sees as the device of that name (Device.names)."""
    found = await devices(monitor)
    nodes = {device.node for device in found if name in device.names}
    if len(nodes) == 1:
        return nodes.pop()
    known = ", ".join(sorted(device.names[0] for device in found if device.names)) or "none"
    raise errors.UserError(
        f"{name}: no device of {monitor.name} with a medium is called so (there are: {known})"
    )


async def iothread_danger(monitor: qmp.Monitor, node: str) -> bool:
    """Return whether QEMU may abort when an NBD client of `node` goes.

    QEMU below 9.0 asserts in nbd_blockdev_client_closed when the node is served in an iothread. Where
    that cannot be ruled out, it is a danger.
    """
    if monitor.version >= SAFE_VERSION or not await _has_iothreads(monitor):
        return False
    of_node = [device for device in await devices(monitor) if device.node == node]
    return not of_node or not all([await _in_main_thread(monitor, device) for device in of_node])


async def endangered_exports(monitor: qmp.Monitor) -> list[str]:
    """Return the ids of the NBD exports that may crash QEMU when it drains, as each transaction does.

    Below 9.0 a drain wakes the server's coroutines from the main thread while they run in the iothread. Beside
    a client that wrote, 7.2 crashed after 150 to 1250 transactions, at three different places; 10.0 did not in
    8000, nor did 7.2 with an export by FUSE. Which thread an export is in is not told: with iothreads, any.
    """
    if monitor.version >= SAFE_VERSION or not await _has_iothreads(monitor):
        return []
    found = await monitor.execute("query-block-exports")
    with qmp.understanding("query-block-exports"):
        return [entry["id"] for entry in found if entry["type"] == "nbd"]


async def _has_iothreads(monitor: qmp.Monitor) -> bool:
    """Objects, not query-iothreads: qemu-storage-daemon has no such command."""
    try:
        objects = await monitor.execute("qom-list", {"path": "/objects"})
    except qmp.CommandError as error:
        if error.error_class == "DeviceNotFound":
            return False
        raise
    with qmp.understanding("qom-list"):
        return any(entry["type"] == "child<iothread>" for entry in objects)


async def _in_main_thread(monitor: qmp.Monitor, device: Device) -> bool:
    """Whether the device says of itself that it has no iothread; SCSI disks do not say."""
    try:
        where = {"path": device.qdev, "property": "iothread"}
        thread = await monitor.execute("qom-get", where)
    except qmp.CommandError:
        return False
    return bool(thread == "")
