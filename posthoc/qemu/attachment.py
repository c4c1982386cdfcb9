# SPDX-License-Identifier: Apache-2.0
"""What posthoc adds to a running QEMU for a while, each thing with its way back.

Names are recognisable, so that the next session finds what a killed one has left (leftovers.py):

    posthoc-TOKEN-live-N         the export of disk N
    posthoc-TOKEN-map-N          the node over the carrier of disk N
    posthoc-TOKEN-at-FOLDER      an empty bitmap that tells the session's private folder
    posthoc-TOKEN-for-BITMAP     the recording bitmap, which becomes BITMAP at the end
    posthoc-TOKEN-into-BITMAP    the same where BITMAP is somebody's, and added to
    posthoc-TOKEN-written        what that had when BITMAP took it over, frozen
    posthoc-TOKEN-copy           BITMAP, frozen: a recording one cannot be read
    posthoc-TOKEN-union          the copy and all that was merged into it

Node names have 31 characters at most, bitmap names 1023.
"""

from __future__ import annotations

import functools
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from urllib import parse

from dirtymap import units
from posthoc.qemu import place, qmp, survey
from posthoc.qemu import undo as ways_back

NAME = re.compile(
    r"posthoc-([0-9a-f]{8})-(live-\d+|map-\d+|at-.*|for-.*|into-.*|written|copy|union)", re.DOTALL
)
_SIGN = re.compile(r"posthoc-([0-9a-f]{8})-at-(/.*/posthoc-attach-\1)")
LONGEST_BITMAP_NAME = 1023 - len("posthoc-01234567-into-")
# Between two looks at the exports where no event comes (libvirt's monitor).
_PAUSE = 0.05

Action = dict[str, Any]
# A bitmap to merge: of the same node, or of another.
Source = str | Mapping[str, str]


@dataclass(frozen=True)
class Target:
    """A disk of the VM and the bitmap that it gets. `number` tells the disks of a session apart."""

    number: int
    node: str
    bitmap: str
    granularity: int
    persistent: bool
    exists: bool = False  # merged into, not made
    begun: bool = False  # it exists since a session that was killed has made it
    replaces: bool = False  # an inconsistent one of the same name, which is removed


class Attachment:
    """A session's hold on one QEMU. Every change is planned in `undo` before it is made."""

    def __init__(self, monitor: qmp.Monitor, where: place.Place, undo: ways_back.Undo) -> None:
        self.monitor = monitor
        self.undo = undo
        self._prefix = f"posthoc-{where.token}-"
        self._sign = f"{self._prefix}at-{parse.quote(os.fsencode(where.folder))}"

    def recording(self, target: Target) -> str:
        """The name of the recording bitmap of `target`."""
        kind = "into" if target.exists and not target.begun else "for"
        return f"{self._prefix}{kind}-{target.bitmap}"

    def export_name(self, target: Target) -> str:
        """The name and id of the export of `target`."""
        return f"{self._prefix}live-{target.number}"

    def map_node(self, target: Target) -> str:
        """The name of the node over the carrier of `target`."""
        return f"{self._prefix}map-{target.number}"

    async def record(self, targets: Sequence[Target]) -> None:
        """Begin to record the writes to all disks at one instant."""
        added = self._recorders(targets)
        for target, name in added:
            self._plan_removal(target, name)
        await self._transaction(_add(target, name, persistent=False) for target, name in added)

    async def stop_recording(self, targets: Sequence[Target]) -> None:
        """Remove what record() has added, all of it or nothing."""
        added = self._recorders(targets)
        await self._transaction(
            {"type": "block-dirty-bitmap-remove", "data": {"node": target.node, "name": name}}
            for target, name in added
        )
        for target, name in added:
            self.undo.forget(_removal(target, name))

    def _recorders(self, targets: Sequence[Target]) -> list[tuple[Target, str]]:
        """The recording bitmaps, and the sign by which the next session finds the private folder."""
        sign = replace(targets[0], granularity=units.LARGEST_GRANULARITY)
        return [(sign, self._sign), *((target, self.recording(target)) for target in targets)]

    async def serve(self, socket: str) -> None:
        """Start QEMU's NBD server on a unix socket; CommandError when it runs for somebody else.

        The folder is told by a bitmap by now: by the socket's file in it the next session knows whose the
        server was (leftovers.remove).
        """
        address = {"type": "unix", "data": {"path": socket}}
        self.undo.plan("stop the NBD server", stop_server)
        try:
            await self.monitor.execute("nbd-server-start", {"addr": address})
        except qmp.CommandError:
            # Refused: one that runs is another's to stop.
            self.undo.forget("stop the NBD server")
            raise

    async def stop_serving(self) -> None:
        """Stop the NBD server."""
        await self.undo.take(self.monitor, "stop the NBD server")

    async def export(
        self, target: Target, bitmaps: Sequence[str], hang_up: Callable[[], None]
    ) -> None:
        """Export the node of `target` read-only. `hang_up` is called to close the clients' ends."""
        name = self.export_name(target)
        self.undo.plan(
            f"remove export {name}",
            functools.partial(remove_export, name=name, hang_up=hang_up),
        )
        arguments: dict[str, Any] = {"type": "nbd", "id": name, "name": name}
        arguments |= {"node-name": target.node, "writable": False}
        if bitmaps:
            arguments["bitmaps"] = list(bitmaps)
        await self.monitor.execute("block-export-add", arguments)

    async def unexport(self, target: Target) -> None:
        """Take the export away from its clients, which then hang up."""
        await self.undo.take(self.monitor, f"remove export {self.export_name(target)}")

    async def open_map(self, target: Target, path: str) -> None:
        """Add a node over the carrier at `path`."""
        name = self.map_node(target)
        self.undo.plan(f"remove node {name}", functools.partial(remove_node, name=name))
        file = {"driver": "file", "filename": path, "read-only": True}
        arguments = {"driver": "qcow2", "node-name": name, "read-only": True, "file": file}
        await self.monitor.execute("blockdev-add", arguments)

    async def close_map(self, target: Target) -> None:
        """Remove the carrier's node; its file may then be removed."""
        await self.undo.take(self.monitor, f"remove node {self.map_node(target)}")

    async def publish(self, targets: Sequence[Target], carried: str) -> None:
        """Make the bitmaps that were asked for, in one transaction: all of them or none.

        Each begins to record and then gets what the recording bitmap and the carrier's bitmap `carried`
        have: at no moment does a bitmap of that name lack a bit. What it has of the former at least is frozen
        for the verification. An inconsistent one that is replaced is removed at the last moment, and is
        not put back: it was worth nothing.
        """
        actions: list[Action] = []
        for target in targets:
            if target.replaces:
                # Not in the transaction: there the name would stay taken until its end.
                await remove_bitmap(self.monitor, target.node, target.bitmap)
                self.undo.lasting.append(
                    f"the inconsistent bitmap {target.bitmap} of {target.node} is removed"
                )
            actions += self._freeze(target, "written", [self.recording(target)])
            if not target.exists:
                actions.append(_add(target, target.bitmap, persistent=target.persistent))
                self._plan_removal(target, target.bitmap)
            sources: list[Source] = [self.recording(target), self._map(target, carried)]
            actions.append(_merge(target.node, target.bitmap, sources))
        added = [
            f"bitmap {target.bitmap} of {target.node} keeps what was added to it: more than it needs, never less"
            for target in targets
            if target.exists
        ]
        # Before the transaction: one that was cancelled may have been carried out.
        self.undo.lasting += added
        try:
            await self._transaction(actions)
        except qmp.CommandError:
            # Nothing was made: a bitmap of that name which appeared meanwhile is somebody else's.
            self.keep(targets)
            for change in added:
                self.undo.lasting.remove(change)
            raise

    def keep(self, targets: Sequence[Target]) -> None:
        """Leave the bitmaps that publish() made where they are."""
        for target in targets:
            if not target.exists:
                self.undo.forget(_removal(target, target.bitmap))

    def written(self, target: Target) -> str:
        """The name of what was written, by its recording bitmap, until the bitmap of `target` was made."""
        return self._frozen_name("written")

    async def copy(self, target: Target) -> str:
        """Make a frozen copy of the bitmap of `target` and return its name: a recording one cannot be read."""
        await self._transaction(self._freeze(target, "copy", [target.bitmap]))
        return self._frozen_name("copy")

    async def union(self, target: Target, carried: str) -> str:
        """Make a bitmap of that copy and all that publish() merged, and return its name."""
        copy, written = self._frozen_name("copy"), self.written(target)
        sources: list[Source] = [copy, written, self._map(target, carried)]
        await self._transaction(self._freeze(target, "union", sources))
        return self._frozen_name("union")

    async def remove_frozen(self, target: Target) -> None:
        """Remove what publish(), copy() and union() have frozen."""
        for name in map(self._frozen_name, ("union", "copy", "written")):
            await self.undo.take(self.monitor, _removal(target, name))

    def _frozen_name(self, kind: str) -> str:
        return f"{self._prefix}{kind}"

    def _map(self, target: Target, carried: str) -> Mapping[str, str]:
        return {"node": self.map_node(target), "name": carried}

    def _freeze(self, target: Target, kind: str, sources: Sequence[Source]) -> list[Action]:
        name = self._frozen_name(kind)
        self._plan_removal(target, name)
        add = _add(target, name, persistent=False)
        add["data"]["disabled"] = True
        return [add, _merge(target.node, name, sources)]

    def _plan_removal(self, target: Target, name: str) -> None:
        step = functools.partial(remove_bitmap, node=target.node, name=name)
        self.undo.plan(_removal(target, name), step)

    async def _transaction(self, actions: Iterable[Action]) -> None:
        await self.monitor.execute("transaction", {"actions": list(actions)})


def folder_in(name: str) -> pathlib.Path | None:
    """Return the private folder that a bitmap of this name tells, if it tells one."""
    match = _SIGN.fullmatch(name)
    return pathlib.Path(os.fsdecode(parse.unquote_to_bytes(match[2]))) if match else None


def _add(target: Target, name: str, *, persistent: bool) -> Action:
    data = {"node": target.node, "name": name, "granularity": target.granularity}
    return {"type": "block-dirty-bitmap-add", "data": {**data, "persistent": persistent}}


def _removal(target: Target, name: str) -> str:
    return f"remove bitmap {name} of {target.node}"


def _merge(node: str, name: str, sources: Sequence[Source]) -> Action:
    data = {"node": node, "target": name, "bitmaps": list(sources)}
    return {"type": "block-dirty-bitmap-merge", "data": data}


# The ways back. Each succeeds where there is nothing to take away.


async def remove_bitmap(monitor: qmp.Monitor, node: str, name: str) -> None:
    """Remove a bitmap if it is there."""
    await _unless_gone(monitor, "block-dirty-bitmap-remove", {"node": node, "name": name})


async def remove_node(monitor: qmp.Monitor, name: str) -> None:
    """Remove a node if it is there."""
    await _unless_gone(monitor, "blockdev-del", {"node-name": name})


async def stop_server(monitor: qmp.Monitor) -> None:
    """Stop the NBD server if it runs."""
    await _unless_gone(monitor, "nbd-server-stop", {})


async def remove_export(
    monitor: qmp.Monitor, name: str, hang_up: Callable[[], None] = lambda: None
) -> None:
    """Remove an export if it is there, its clients first, and wait until QEMU has let go of it.

    mode=hard closes the connections from QEMU's side: below 9.0 a client that goes by itself takes a VM
    with an iothread along. Then the clients hang up: where QEMU was sending to one that does not listen any
    more, its export waits for that (7.2). An export that is going keeps its bitmaps busy for a moment more.
    """
    with monitor.listen("BLOCK_EXPORT_DELETED") as deleted:
        await _unless_gone(monitor, "block-export-del", {"id": name, "mode": "hard"})
        hang_up()
        while name in await survey.exports(monitor):
            await deleted.wait(_PAUSE)


# What QEMU says of something that is not there: GenericError with one of these texts (7.2 to 10.0).
_GONE = re.compile(
    r"Dirty bitmap '.*' not found|Node '.*' not found|Failed to find node with node-name="
    r"|Export '.*' is not found|NBD server not running",
    re.DOTALL,
)


async def _unless_gone(monitor: qmp.Monitor, command: str, arguments: Mapping[str, Any]) -> None:
    try:
        await monitor.execute(command, arguments)
    except qmp.CommandError as error:
        if not _GONE.search(error.description):
            raise
