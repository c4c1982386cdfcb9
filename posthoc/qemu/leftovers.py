# SPDX-License-Identifier: Apache-2.0
"""Cleaning up after a session that was killed: what it added to QEMU is known by its names, its folder too.

What is left of a bitmap under its final name is never half of one (attachment.publish), hence is not touched
here; that it was on its way is told by its recording bitmap.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterator
from dataclasses import dataclass

from dirtymap import errors
from posthoc.qemu import attachment, place, qmp, survey


@dataclass(frozen=True)
class Leftovers:
    """What killed sessions have left in a QEMU; bitmaps are (node, name)."""

    tokens: frozenset[str]
    exports: tuple[str, ...]
    nodes: tuple[str, ...]
    bitmaps: tuple[tuple[str, str], ...]

    def was_becoming(self, node: str, name: str) -> bool:
        """Return whether a killed session was making the bitmap `name` of `node`, not adding to one."""
        return any(
            at == node and left.split("-", 2)[2] == f"for-{name}" for at, left in self.bitmaps
        )

    @property
    def folders(self) -> list[pathlib.Path]:
        """The private folders of the killed sessions."""
        found = (attachment.folder_in(name) for _, name in self.bitmaps)
        return [folder for folder in found if folder is not None]


async def find(monitor: qmp.Monitor) -> Leftovers:
    """Return what is left of killed sessions; UserError when a living one is at work on this QEMU."""
    exports = await survey.exports(monitor)
    nodes = await survey.nodes(monitor)
    bitmaps = [(node.name, bitmap.name) for node in nodes.values() for bitmap in node.bitmaps]
    found = Leftovers(
        tokens=frozenset(_tokens([*exports, *nodes, *(name for _, name in bitmaps)])),
        exports=tuple(name for name in exports if attachment.NAME.fullmatch(name)),
        nodes=tuple(name for name in nodes if attachment.NAME.fullmatch(name)),
        bitmaps=tuple(pair for pair in bitmaps if attachment.NAME.fullmatch(pair[1])),
    )
    for token in found.tokens:
        if place.is_alive(token):
            raise errors.UserError(
                f"{monitor.name}: another posthoc is attached to this QEMU (session {token})"
            )
    return found


def _tokens(names: list[str]) -> Iterator[str]:
    matches: Iterator[re.Match[str] | None] = map(attachment.NAME.fullmatch, names)
    return (match[1] for match in matches if match)


async def remove(monitor: qmp.Monitor, left: Leftovers) -> None:
    """Take away what is left, in the reverse order of its making."""
    for name in left.exports:
        await attachment.remove_export(monitor, name)
    if any(map(place.has_socket, left.folders)):
        # QEMU removes the socket's file with the server: this one is of such a session and runs. A server
        # whose socket is elsewhere is somebody else's.
        await attachment.stop_server(monitor)
    for name in left.nodes:
        await attachment.remove_node(monitor, name)
    for folder in left.folders:
        place.remove(folder)
    # At last: until then the folder is known by one of them.
    for node, name in left.bitmaps:
        await attachment.remove_bitmap(monitor, node, name)
