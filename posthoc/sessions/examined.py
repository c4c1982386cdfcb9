# SPDX-License-Identifier: Apache-2.0
"""What `attach` was asked for, and everything that is looked at before a running QEMU is changed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import trio

from dirtymap import errors, images, units
from dirtymap.images import base
from dirtymap.qcow2 import carrier
from posthoc.qemu import attachment, leftovers, opened, place, qmp, survey, virsh
from posthoc.sessions import pair
from scanner import scan

# block-export-add, and bitmaps of other nodes in a merge.
OLDEST = qmp.Version(5, 2, 0)


@dataclass(frozen=True)
class Wish:
    """A bitmap for one disk, which is named by its node, by its device, or as libvirt's target."""

    disk: str
    reference: str
    bitmap: str
    by: Literal["node", "device", "target"] = "node"


@dataclass(frozen=True)
class Request:
    """`posthoc attach`'s arguments. Sizes are bytes, the rate bytes a second."""

    wishes: tuple[Wish, ...]
    granularity: int | None = None
    transient: bool = False
    checkpoint: bool = False
    merge: bool = False
    replace: bool = False
    keep_on_failure: bool = False
    accept_iothread_risk: bool = False
    reference_side_only: bool = False
    rate: int | None = None
    workers: int = scan.WORKERS
    without: tuple[str, ...] = ()
    allow_shrunk: bool = False
    directory: str | None = None
    nbd_server: str | None = None
    options: images.Options = field(default_factory=images.Options)


@dataclass(frozen=True)
class Disk:
    """A wish that can be fulfilled; `notes` are for the user. `left` is of the whole QEMU."""

    target: attachment.Target
    node: survey.Node
    reference: base.Image
    notes: tuple[str, ...]
    on_top: bool  # a device of the guest uses the node itself
    left: leftovers.Leftovers

    @property
    def granularity(self) -> int:
        """The bitmap's, in bytes; one that is merged into keeps its own."""
        there = self.node.bitmap(self.target.bitmap)
        if there is None or not self.target.exists:
            return self.target.granularity
        return there.granularity


async def examine(
    monitor: qmp.Monitor, request: Request, stack: contextlib.AsyncExitStack
) -> list[Disk]:
    """Return the disks of `request`; nothing is changed. References are closed with `stack`.

    Raises UserError for everything that would not go well.
    """
    if monitor.version < OLDEST:
        raise errors.UserError(
            f"{monitor.name} is QEMU {monitor.version}: attach needs {OLDEST.major}.{OLDEST.minor} "
            "(block-export-add)"
        )
    await check_draining(monitor, request)
    left = await leftovers.find(monitor)
    nodes = await survey.nodes(monitor)
    tops = await survey.tops(monitor)
    disks: list[Disk] = []
    for number, wish in enumerate(request.wishes):
        node = await _node(monitor, wish, nodes)
        if any(node.name == disk.node.name for disk in disks):
            raise errors.UserError(f"{wish.disk}: the same disk is named twice")
        _check_name(wish.bitmap)
        target = _target(number, wish, node, request, left)
        carrier.layout(node.size, target.granularity)  # what no carrier can hold is said now
        await _check_reading(monitor, node, request)
        reference = await trio.to_thread.run_sync(
            lambda wish=wish: images.open_reference(wish.reference, options=request.options)  # type: ignore[misc]
        )
        stack.callback(reference.close)
        _check_apart(monitor, node, wish, reference)
        reference, sized = await trio.to_thread.run_sync(_fit, node, reference, request)
        notes = [*sized, *_notes(target, node, nodes, tops)]
        on_top = node.name in tops
        disks.append(Disk(target, node, reference, tuple(notes), on_top, left))
    if request.checkpoint:
        assert isinstance(monitor, virsh.Domain)
        await _check_checkpoint(monitor, request, [disk.target for disk in disks])
    return disks


def directory(monitor: qmp.Monitor, request: Request) -> str | None:
    """Return the folder that the private one is made in; None is the one for temporary files."""
    if request.directory is None and monitor.folder and place.has_room(monitor.folder):
        return monitor.folder
    return request.directory


async def _node(monitor: qmp.Monitor, wish: Wish, nodes: dict[str, survey.Node]) -> survey.Node:
    name = wish.disk
    if wish.by == "target":
        assert isinstance(monitor, virsh.Domain)
        name = await monitor.device_of(name)
    if wish.by != "node":
        name = await survey.node_of_device(monitor, name)
    if name not in nodes:
        known = ", ".join(sorted(name for name in nodes if not name.startswith("#")))
        raise errors.UserError(f"{name}: {monitor.name} has no such node (it has: {known})")
    return nodes[name]


def _check_name(name: str) -> None:
    if not name or len(name.encode()) > attachment.LONGEST_BITMAP_NAME:
        raise errors.UserError(
            f"a bitmap's name has 1 to {attachment.LONGEST_BITMAP_NAME} bytes: {name[:40]!r}"
        )
    if attachment.NAME.fullmatch(name):
        raise errors.UserError(f"{name}: names like this one are posthoc's own, for a while")


def _target(
    number: int,
    wish: Wish,
    node: survey.Node,
    request: Request,
    left: leftovers.Leftovers,
) -> attachment.Target:
    """Return what is to be made of the bitmap of that name, or say why it cannot be."""
    there = node.bitmap(wish.bitmap)
    what = f"bitmap {wish.bitmap} of {node.name}"
    target = attachment.Target(
        number,
        node.name,
        wish.bitmap,
        request.granularity or units.DEFAULT_GRANULARITY,
        persistent=node.stores_bitmaps and not request.transient,
    )
    if request.checkpoint and not target.persistent:
        raise errors.UserError(
            f"{node.name} ({node.driver}) cannot hold a persistent bitmap, which a checkpoint needs"
        )
    if there is None:
        return target
    if there.inconsistent:
        if not request.replace:
            raise errors.UserError(
                f"{what} is inconsistent: QEMU or its host went down while it recorded, and it is worth "
                "nothing; --replace makes it anew"
            )
        return replace(target, replaces=True)
    # A killed session that was making this very bitmap has made it whole or not at all: adding to it
    # what differs now is right.
    begun = left.was_becoming(node.name, wish.bitmap)
    if not request.merge and not begun:
        raise errors.UserError(
            f"{what} exists and is good: --merge adds the difference to it, or name another"
        )
    if there.busy:
        raise errors.UserError(f"{what} is in use (a job, an export): end that first")
    if not there.recording:
        raise errors.UserError(
            f"{what} does not record: enable it (block-dirty-bitmap-enable) before it is of use"
        )
    if request.checkpoint and not there.persistent:
        raise errors.UserError(f"{what} is not persistent, which a checkpoint needs")
    if request.granularity not in (None, there.granularity):
        raise errors.UserError(
            f"{what} has a granularity of {there.granularity}: leave --granularity out"
        )
    # Finer would be found out for nothing, coarser would dirty more than it needs.
    granularity = min(there.granularity, units.LARGEST_GRANULARITY)
    return replace(
        target, exists=True, begun=begun, persistent=there.persistent, granularity=granularity
    )


async def _check_checkpoint(
    domain: virsh.Domain, request: Request, targets: Sequence[attachment.Target]
) -> None:
    """Refuse a name that a checkpoint of libvirt's has: registering another in its place would lose it.

    It may stay where its bitmaps are the very ones that are added to, or made anew.
    """
    name = request.wishes[0].bitmap
    there = await domain.checkpoint(name)
    if there is None:
        return
    same = there == {wish.disk: name for wish in request.wishes}
    if not same or not all(target.exists or target.replaces for target in targets):
        raise errors.UserError(
            f"domain {domain.name} has a checkpoint {name} already, of {', '.join(sorted(there))}: name "
            "another, or give that one up (virsh checkpoint-delete; --metadata where its bitmap is lost)"
        )


async def check_draining(monitor: qmp.Monitor, request: Request) -> None:
    """Refuse where a transaction may crash QEMU, unless that is accepted.

    What a killed session has exported nobody uses.
    """
    if request.accept_iothread_risk:
        return
    exports = [
        name
        for name in await survey.endangered_exports(monitor)
        if not attachment.NAME.fullmatch(name)
    ]
    if exports:
        safe = f"{survey.SAFE_VERSION.major}.{survey.SAFE_VERSION.minor}"
        raise errors.UserError(
            f"{monitor.name}: QEMU {monitor.version} with iothreads may crash when bitmaps are made while a "
            f"client of an NBD export is busy (mended in {safe}), and exports {', '.join(exports)}: end that "
            "first; --accept-iothread-risk goes on, which is safe where no client uses it or no iothread runs it"
        )


async def _check_reading(monitor: qmp.Monitor, node: survey.Node, request: Request) -> None:
    """Refuse where the way of reading is impossible or a danger to the VM."""
    if request.reference_side_only:
        opened.open_raw(node, monitor.peer).close()
        return
    if not await survey.iothread_danger(monitor, node.name):
        return
    safe = f"{survey.SAFE_VERSION.major}.{survey.SAFE_VERSION.minor}"
    beside = "--reference-side-only reads a raw disk's file instead"
    if node.name not in await survey.tops(monitor):
        # What holds it in the iothread is no device but an export: when another export goes, QEMU moves the
        # disk and the clients of all others back to the main loop (bdrv_root_unref_child), and aborts there.
        raise errors.UserError(
            f"{node.name}: QEMU {monitor.version} may abort when one of several exports of a disk in an "
            f"iothread goes away, and no device of a guest uses this disk (mended in {safe}): {beside}"
        )
    if not request.accept_iothread_risk:
        raise errors.UserError(
            f"{node.name}: QEMU {monitor.version} aborts the VM when a reader of a disk in an iothread goes "
            f"away (mended in {safe}): {beside}; --accept-iothread-risk makes QEMU close the connection "
            "first, which is safe unless posthoc is killed"
        )


def _check_apart(
    monitor: qmp.Monitor, node: survey.Node, wish: Wish, reference: base.Image
) -> None:
    """Refuse a reference that QEMU writes: the disk compared with itself would be clean."""
    try:
        written = opened.writes(monitor.peer, reference)
    except errors.UserError:
        # What QEMU has open cannot be seen: its names for it are left, and its locks on it.
        written = os.path.isabs(node.filename) and images.same_file(node.filename, wish.reference)
    if written:
        raise errors.UserError(
            f"{wish.reference} is a file that QEMU has open for writing: a reference stays as it is"
        )


def open_beside(disk: Disk, monitor: qmp.Monitor) -> base.Image:
    """Open the raw file of a disk for reading while QEMU has it and records. The caller closes it."""
    image = opened.open_raw(disk.node, monitor.peer)
    if disk.node.direct:
        # A direct write drops the page that caches what it changes, but not where that page is in use
        # (mm/filemap.c, kiocb_invalidate_post_direct_write). What was cached so before the recording began
        # would be compared in the disk's place.
        os.posix_fadvise(image.fd, 0, 0, os.POSIX_FADV_DONTNEED)
    return image


def _fit(
    node: survey.Node, reference: base.Image, request: Request
) -> tuple[base.Image, tuple[str, ...]]:
    """Return the reference as it is compared with the disk, and what is to be told of their sizes."""
    reference, rounded = pair.fit(reference, node.size)
    # QEMU counts in sectors: up to one of them is no difference.
    beyond = carrier.virtual_size(reference.size) - node.size
    allow_shrunk = request.allow_shrunk
    return reference, rounded + pair.size_notes(
        node.name, reference.name, beyond, allow_shrunk=allow_shrunk
    )


def _notes(
    target: attachment.Target, node: survey.Node, nodes: dict[str, survey.Node], tops: set[str]
) -> Sequence[str]:
    notes = []
    if tops and node.name not in tops:
        notes.append(
            f"{node.name} is not the node that a device of the guest uses: writes that do not pass "
            "through it are not recorded"
        )
    if not target.persistent and not node.stores_bitmaps:
        below = [n.name for n in nodes.values() if n.stores_bitmaps and n.file == node.file != ""]
        instead = f"; {below[0]} below it can (--node {below[0]})" if below else ""
        notes.append(
            f"{node.name} ({node.driver}) holds no persistent bitmap: this one is lost when QEMU ends{instead}"
        )
    return notes
