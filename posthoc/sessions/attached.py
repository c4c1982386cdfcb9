# SPDX-License-Identifier: Apache-2.0
"""A session with a running QEMU: it records the writes, posthoc compares, the two become one bitmap.

THE ORDER, which is the argument for "never too clean" (held in `Session.run`, nowhere else):

    1  record     a recording bitmap on every disk, in one transaction: one instant for the whole VM
    2  export     the disk as the guest sees it, read-only, on a private socket
    3  scan       read it, compare it with the reference; what differs is the map
    4  close      the export goes, clients first, then the reader
    5  publish    one transaction: the bitmap that was asked for begins to record, *then* gets the
                  recording bitmap's bits and the map's
    6  verify     a frozen copy of it is read back and must have every bit of the map, and of the recording
                  bitmap as 5 found it

A segment that differs from the reference at any time after 5 was written before 1 was done, or after.
Written after: QEMU sets the bit when a write or discard completes, hence in the recording bitmap of 1, or,
from 5 on, in the published one, which records before it takes over the other's bits. Written before: 3 read
the segment after 1 and found it different, or a later write changed what it read, which is the other case.
The same holds for what 3 did not read: an answer of QEMU's that a range is zeros was right when it was
given, after 1. An I/O error leaves its segments set. (Adding the bitmap after the scan missed 116 of 393
segments.) QEMU knows no bitmap of the name asked for before it is right.

Everything added to QEMU has its way back planned before it is made (undo.py). When a session ends early
these are taken, through a new connection if the old one is lost; what a killed session leaves behind the
next one finds by name (leftovers.py).
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import trio

from dirtymap import bitmap, errors
from dirtymap.images import base
from dirtymap.qcow2 import carrier
from posthoc.qemu import attachment, leftovers, place, qmp, source, survey, virsh
from posthoc.qemu import undo as ways_back
from posthoc.sessions import examined
from scanner import progress, scan

log = logging.getLogger(__name__)

Connect = Callable[[], contextlib.AbstractAsyncContextManager[qmp.Monitor]]
Watch = Callable[[str, progress.ScanStatistics], None]

# Logged, in this order, as each is done.
STEPS = (
    "examined",
    "cleared",
    "recording",
    "serving",
    "exported",
    "scanned",
    "unexported",
    "stopped",
    "written",
    "opened",
    "published",
    "verifying",
    "verified",
    "closed",
    "ended",
)
# The bitmap's name within a carrier.
_CARRIED = "posthoc"
_REFRESH = 0.25
# Seconds after which a disk that went away did so for another reason than its QEMU's end.
_LAST_WORDS = 2.0


@dataclass(frozen=True)
class Outcome:
    """What became of one disk. `held` is how many bytes the bitmap in QEMU covered when it was verified."""

    disk: examined.Disk
    statistics: progress.ScanStatistics
    dirty: bitmap.Bitmap
    held: int


async def attach(
    connect: Connect, request: examined.Request, *, watch: Watch | None = None
) -> list[Outcome]:
    """Give every disk of `request` its bitmap; `watch` is called with the scans' statistics.

    Raises UserError. Then, and when cancelled, QEMU is left as it was found, or with
    `request.keep_on_failure` with the bitmaps that were asked for and every bit of them set; what is not as it
    was is logged. A cancel that comes when all is done is too late, and the outcomes are returned.
    """
    undo = ways_back.Undo()
    outcomes: list[Outcome] = []
    try:
        with trio.CancelScope() as ending:
            async with contextlib.AsyncExitStack() as stack, connect() as monitor:
                parent = examined.directory(monitor, request)
                # First: what stands in the way of this session may be all that a killed one has left.
                place.remove_dead(parent)
                disks = await examined.examine(monitor, request, stack)
                where = await stack.enter_async_context(place.made(parent, monitor.peer))
                session = Session(monitor, request, disks, where, undo, watch, ending)
                stack.callback(session.source.hang_up)
                # With the stack, hence after this connection is closed: a monitor serves one at a time.
                stack.push_async_callback(_make_up, connect, undo)
                try:
                    outcomes = await _while_there(monitor, session)
                finally:
                    await undo.take_all(monitor)
    finally:
        if not outcomes:
            _tell_what_is_left(undo, interrupted=trio.current_effective_deadline() == -math.inf)
    return outcomes


async def _make_up(connect: Connect, undo: ways_back.Undo) -> None:
    """Take back through a new connection what could not be: the monitor may have gone, and QEMU not."""
    if not undo.left:
        return
    with trio.move_on_after(ways_back.TIME_LIMIT, shield=True):
        try:
            async with connect() as monitor:
                await undo.take_all(monitor)
        except qmp.Disconnected:
            # Gone, and told already: nothing is left that could be taken back.
            undo.give_up()
        except errors.UserError as error:
            log.debug("not reached again: %s", error)


def _tell_what_is_left(undo: ways_back.Undo, *, interrupted: bool) -> None:
    for change in undo.lasting:
        log.warning("%s", change)
    if undo.left:
        log.warning("left in QEMU, for the next attach to remove: %s", "; ".join(undo.left))
    if interrupted:
        apart = ", apart from that" if undo.lasting or undo.left else ""
        log.warning("interrupted: QEMU is left as it was found%s", apart)


async def _while_there(monitor: qmp.Monitor, session: Session) -> list[Outcome]:
    """Run the session; when the monitor is lost, end it at once with that error."""
    lost: list[qmp.MonitorError] = []
    outcomes: list[Outcome] = []
    failures: list[BaseException] = []

    async def look(scope: trio.CancelScope) -> None:
        try:
            lost.append(await monitor.wait_lost())
        finally:
            # Lost or cancelled: a thread that reads would wait for QEMU, or try to reach it again.
            session.source.close_reader()
        scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(look, nursery.cancel_scope)
        try:
            outcomes = await session.run()
        except (errors.PosthocError, OSError) as error:
            # Out of the nursery as itself, not in an exception group.
            failures.append(error)
        nursery.cancel_scope.cancel()
    if failures and isinstance(failures[0], errors.ImageError) and not lost:
        # A disk that went away because its QEMU did: the socket tells it first.
        with trio.move_on_after(_LAST_WORDS):
            lost.append(await monitor.wait_lost())
    if lost or failures:
        raise (lost or failures)[0]
    return outcomes


class Session:
    """The work on one QEMU; the caller takes what is left in `undo` afterwards."""

    def __init__(
        self,
        monitor: qmp.Monitor,
        request: examined.Request,
        disks: Sequence[examined.Disk],
        where: place.Place,
        undo: ways_back.Undo,
        watch: Watch | None,
        ending: trio.CancelScope,
    ) -> None:
        self.monitor = monitor
        self.request = request
        self.disks = disks
        self.targets = [disk.target for disk in disks]
        self.place = where
        self.qemu = attachment.Attachment(monitor, where, undo)
        self.source = source.Source(
            self.qemu, where.socket, request.nbd_server, request.options.connections
        )
        self.watch = watch
        self.ending = ending

    async def run(self) -> list[Outcome]:
        """Take the steps in THE ORDER of this module's docstring."""
        _done("examined")
        await leftovers.remove(self.monitor, self.disks[0].left)
        _done("cleared")
        recorded = False
        try:
            await self.qemu.record(self.targets)
            recorded = True
            _done("recording")
            scans = await self._scan_all()
            maps = [scanned.decisions.map() for scanned in scans]
            await self._publish(maps)
            held = await self._verify_all(maps)
            await self._close_maps()
            await self._look_for_snapshots()
        except BaseException:
            if recorded and self.request.keep_on_failure:
                await self._keep_everything()
            raise
        self.ending.shield = True  # from here on it is done, and a cancel comes too late
        if self.request.checkpoint:
            await self._register_checkpoint()
        # Last: as long as the recording bitmap is there, the next session knows whose the other is.
        await self.qemu.stop_recording(self.targets)
        self.qemu.keep(self.targets)
        _done("ended")
        return [
            Outcome(disk, scanned.statistics(), dirty, count)
            for disk, scanned, dirty, count in zip(self.disks, scans, maps, held, strict=True)
        ]

    # 2, 3, 4

    async def _scan_all(self) -> list[scan.Scan]:
        if self.request.reference_side_only:
            return [await self._scan_file(disk) for disk in self.disks]
        async with self.source.serving():
            _done("serving")
            scans = [await self._scan_export(disk) for disk in self.disks]
        _done("stopped")
        return scans

    async def _scan_export(self, disk: examined.Disk) -> scan.Scan:
        async with self.source.exported(disk.target) as image:
            _done("exported")
            scanned = await self._scan(disk, image)
        _done("unexported")
        return scanned

    async def _scan_file(self, disk: examined.Disk) -> scan.Scan:
        """Read the disk's raw file beside QEMU: what it holds is what was written, bit for bit."""
        image = await trio.to_thread.run_sync(examined.open_beside, disk, self.monitor)
        try:
            return await self._scan(disk, image)
        finally:
            image.close()

    async def _scan(self, disk: examined.Disk, live: base.Image) -> scan.Scan:
        if carrier.virtual_size(live.size) != disk.node.size:
            raise errors.ImageError(
                disk.target.node, f"is {live.size} bytes where QEMU says {disk.node.size}"
            )
        decisions = scan.Decisions(live.size, disk.target.granularity)
        scanned = scan.Scan(
            live,
            disk.reference,
            decisions,
            workers=self.request.workers,
            rate=self.request.rate,
            without=self.request.without,
        )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._look, disk, scanned)
            await scanned.run()
            nursery.cancel_scope.cancel()
        if self.watch is not None:
            self.watch(disk.target.node, scanned.statistics())
        _done("scanned")
        return scanned

    async def _look(self, disk: examined.Disk, scanned: scan.Scan) -> None:
        while self.watch is not None:
            self.watch(disk.target.node, scanned.statistics())
            await trio.sleep(_REFRESH)

    # 5

    async def _publish(self, maps: Sequence[bitmap.Bitmap]) -> None:
        for target, dirty in zip(self.targets, maps, strict=True):
            path = self.place.carrier(target.number)
            await trio.to_thread.run_sync(carrier.write, path, dirty, _CARRIED)
            self.place.give_to_qemu(path)
        _done("written")
        for target in self.targets:
            await self.qemu.open_map(target, str(self.place.carrier(target.number)))
        _done("opened")
        # Again: another program may have begun to export during a scan of hours.
        await examined.check_draining(self.monitor, self.request)
        await self.qemu.publish(self.targets, _CARRIED)
        _done("published")

    async def _close_maps(self) -> None:
        for target in self.targets:
            await self.qemu.remove_frozen(target)
            await self.qemu.close_map(target)
        _done("closed")

    # 6

    async def _verify_all(self, maps: Sequence[bitmap.Bitmap]) -> list[int]:
        """Return how many bytes each bitmap covers; UserError if one lacks a bit that was merged into it."""
        pairs = list(zip(self.targets, maps, strict=True))
        if self.request.reference_side_only:
            return [await self._count(target, dirty) for target, dirty in pairs]
        async with self.source.serving():
            return [await self._read_back(target, dirty) for target, dirty in pairs]

    async def _read_back(self, target: attachment.Target, dirty: bitmap.Bitmap) -> int:
        names = [await self.qemu.copy(target), self.qemu.written(target)]
        found, written = (bitmap.Bitmap(dirty.size, dirty.granularity) for _ in names)
        async with self.source.exported(target, names) as image:
            _done("verifying")
            for name, into in zip(names, (found, written), strict=True):
                await trio.to_thread.run_sync(source.read_bitmap, image, name, into)
        if np.any((dirty.data | written.data) & ~found.data):
            raise _lacking(target)
        _done("verified")
        return found.dirty_bytes()

    async def _count(self, target: attachment.Target, dirty: bitmap.Bitmap) -> int:
        """Without a client QEMU counts: merged once more into the copy, nothing may be added to it."""
        copy, union = await self.qemu.copy(target), await self.qemu.union(target, _CARRIED)
        _done("verifying")
        nodes = await survey.nodes(self.monitor)
        carried = nodes[self.qemu.map_node(target)].count(_CARRIED)
        held, all_of_it = (nodes[target.node].count(name) for name in (copy, union))
        if carried < dirty.dirty_bytes() or held != all_of_it:
            raise _lacking(target)
        _done("verified")
        return held

    async def _look_for_snapshots(self) -> None:
        """Tell of disks whose guest writes elsewhere by now: its bitmap is right, and not of what comes."""
        tops = await survey.tops(self.monitor)
        for disk in self.disks:
            if disk.on_top and disk.target.node not in tops:
                log.warning(
                    "%s is not the guest's node any more (a snapshot was taken meanwhile?): what is written "
                    "since is not in its bitmap",
                    disk.target.node,
                )

    async def _register_checkpoint(self) -> None:
        """Make the bitmaps a checkpoint of libvirt's. If it takes none, those that were made go again."""
        assert isinstance(self.monitor, virsh.Domain)
        name = self.request.wishes[0].bitmap
        try:
            await self.monitor.register_checkpoint(
                name, [wish.disk for wish in self.request.wishes]
            )
        except errors.UserError as error:
            if self.request.keep_on_failure:
                self.qemu.keep(self.targets)
                self.qemu.undo.lasting += [
                    f"bitmap {name} of {target.node} is kept, and is right"
                    for target in self.targets
                    if not target.exists
                ]
            raise errors.UserError(
                f"libvirt did not take {name} as a checkpoint: {error}"
            ) from error

    # When it fails

    async def _keep_everything(self) -> None:
        """Leave recording bitmaps with every bit set: valid, as if nothing were known of the disks."""
        with trio.move_on_after(ways_back.TIME_LIMIT, shield=True) as scope:
            try:
                await self.qemu.undo.take_all(self.monitor)
                await self._publish_full([disk for disk in self.disks if not disk.target.exists])
            except errors.UserError as error:
                log.warning("no bitmap could be kept: %s", error)
        if scope.cancelled_caught:
            log.warning("no bitmap could be kept: QEMU does not answer")

    async def _publish_full(self, disks: Sequence[examined.Disk]) -> None:
        if not disks:
            return
        self.targets = [disk.target for disk in disks]
        maps = [bitmap.Bitmap(disk.node.size, disk.target.granularity) for disk in disks]
        for full in maps:
            full.fill()
        # That may be what it failed of.
        await examined.check_draining(self.monitor, self.request)
        await self.qemu.record(self.targets)
        await self._publish(maps)
        await self._close_maps()
        self.qemu.keep(self.targets)
        self.qemu.undo.lasting += [
            f"bitmap {target.bitmap} of {target.node} is kept, with every bit set"
            for target in self.targets
        ]


def _lacking(target: attachment.Target) -> errors.UserError:
    return errors.UserError(
        f"bitmap {target.bitmap} of {target.node} lacks bits that QEMU was to merge into it: it is not "
        "to be used, and is removed where it was made"
    )


def _done(step: str) -> None:
    assert step in STEPS
    log.debug("%s", step)
