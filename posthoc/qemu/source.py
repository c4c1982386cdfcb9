# SPDX-License-Identifier: Apache-2.0
"""Reading a running QEMU's disk and bitmaps: its own NBD server, on posthoc's private socket or as found.

A live image is never read from outside (its metadata is QEMU's, and changes); what its in-process export
gives is the disk as the guest sees it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Sequence
from typing import Any

import trio

from dirtymap import bitmap, errors
from dirtymap.images import export, nbd
from posthoc.qemu import attachment, qmp


class Source:
    """QEMU's NBD server, with one export and one reader at a time.

    It is started on the unix socket at `socket`, or `running` already: a socket's path, or HOST:PORT.
    """

    def __init__(
        self,
        qemu: attachment.Attachment,
        socket: str,
        running: str | None = None,
        connections: int | None = None,
    ) -> None:
        self._qemu = qemu
        self._socket = socket
        self._running = running
        self._connections = connections
        self._reader: export.NbdImage | None = None
        # Connections that are done with, whose ends stay open until QEMU has closed its own.
        self._parked: list[Any] = []

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """Run the NBD server; when the body fails, stopping it is left to the way back."""
        if self._running is not None:
            yield
            return
        try:
            await self._qemu.serve(self._socket)
        except qmp.CommandError as error:
            if "already running" not in error.description:
                raise
            raise errors.UserError(
                f"{self._qemu.monitor.name}: QEMU's NBD server, of which it has one, runs already (for a "
                "backup of libvirt's, a migration, other exports): end that, or say where it listens with "
                "--nbd-server"
            ) from error
        yield
        await self._qemu.stop_serving()

    @contextlib.asynccontextmanager
    async def exported(
        self, target: attachment.Target, frozen: Sequence[str] = ()
    ) -> AsyncIterator[export.NbdImage]:
        """Export a disk, with `frozen` bitmaps of it, and open it.

        No connection is closed, not even one that is given up, before QEMU has closed its end: below 9.0 it
        would take a VM with an iothread along (attachment.remove_export).
        """
        await self._qemu.export(target, frozen, self.hang_up)
        contexts = (nbd.BASE_ALLOCATION, *map(_context, frozen))
        uri = self._uri(self._qemu.export_name(target))
        address = nbd.Address(uri, contexts=contexts, part=self._parked.append)
        try:
            yield await trio.to_thread.run_sync(self._open, target.node, address)
        finally:
            await self._qemu.unexport(target)

    def _uri(self, name: str) -> str:
        where = self._running or self._socket
        if self._running is not None and not os.path.isabs(where):
            return f"nbd://{where}/{name}"
        return nbd.uri(where, name)

    def _open(self, name: str, address: nbd.Address) -> export.NbdImage:
        # Kept here and not by the caller: a cancel that comes while the thread works must find it.
        self._reader = export.open_export(name, address, connections=self._connections)
        return self._reader

    def close_reader(self) -> None:
        """End the reader and whatever waits for it; its connections stay."""
        if self._reader is not None:
            self._reader.close()

    def hang_up(self) -> None:
        """Close all connections: QEMU has closed its ends, or is out of reach for good."""
        self.close_reader()
        self._reader = None
        while self._parked:
            nbd.part(self._parked.pop())


def read_bitmap(image: export.NbdImage, name: str, found: bitmap.Bitmap) -> None:
    """Set in `found` what the exported bitmap `name` has; UserError where QEMU does not show it. Blocks."""
    for start, length, flags in image.flagged(_context(name), 0, found.size):
        if flags is None:
            raise errors.UserError(f"bitmap {name} of {image.name} cannot be read back")
        if flags & 1:  # NBD_STATE_DIRTY (QEMU, docs/interop/nbd.txt)
            found.set_range(start, length)


def _context(name: str) -> str:
    return f"qemu:dirty-bitmap:{name}"
