# SPDX-License-Identifier: Apache-2.0
"""One mount, one scan, one map.

    mount answers -> the scan begins -> ... -> unmounted -> the scan is ended -> the map is written

The write bitmap records from the first moment that the disk can be written through the mount, which is before
the scanner's first read: that order is what makes the map complete (the ordering rule).
"""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import stat
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np
import trio

from dirtymap import bitmap, state
from dirtymap.images import base, file
from dirtymap.qcow2 import carrier
from overlayfs import datapath, filesystem, mount, recorder
from posthoc import exits, report
from posthoc.sessions import control, files, output, pair, ways
from scanner import courtesy, progress, scan

log = logging.getLogger(__name__)

# Seconds between two looks whether the map on disk is still all there is to say.
_LOOK = 1.0


class Session:
    """One mount, one scan, one map. All methods are for the event loop, but `map`."""

    def __init__(
        self,
        legacy: ways.Legacy,
        images: pair.Pair,
        way: datapath.Datapath,
        *,
        adopted: bool = False,
        same_reference: bool = True,
        note: str | None = None,
    ) -> None:
        parameters = legacy.parameters
        self._legacy = legacy
        self._parameters = parameters
        self._notes = images.notes
        self._live = images.live
        self._way = way
        self._adopted = adopted
        self._note = note
        self.was_ready = False
        self._decisions = scan.Decisions(
            images.live.size, parameters.granularity, ways.decisions_memory(way)
        )
        if not same_reference:
            # What was found equal was equal to something else. Before the legacy names the new one (_keep).
            self._decisions.reset()
        self._courtesy = _courtesy(way)
        self._courtesy.enabled = parameters.pacing
        self._scan = scan.Scan(
            images.reader,
            images.reference,
            self._decisions,
            written=self._written,
            workers=parameters.workers,
            rate=parameters.rate,
            paused=parameters.paused,
            without=parameters.without,
            courtesy=self._courtesy,
        )
        if legacy.cancelled:
            self._scan.cancel()
        self._again = trio.Event()
        self._resting = False
        self._unmount = trio.CancelScope()
        self._bug: Exception | None = None
        self._output = output.Output(parameters.output, parameters.bitmap)
        self._keep()

    def _keep(self, *, cancelled: bool | None = None, **changed: Any) -> None:
        """Note what was changed at run time, and leave it for a session that may come after."""
        self._parameters = dataclasses.replace(self._parameters, **changed)
        self._legacy = dataclasses.replace(
            self._legacy,
            parameters=self._parameters,
            cancelled=self._legacy.cancelled if cancelled is None else cancelled,
        )
        ways.leave(self._way, self._legacy)

    async def serve(self, ready: Callable[[report.Facts], None]) -> state.End:
        """Mount, call `ready` with the first status, scan; return after the mount has ended and the map is written."""
        async with trio.open_nursery() as signals:
            await signals.start(self._end_on_signal)
            try:
                await self._serve(ready)
            except BaseException:
                if self.was_ready:
                    # The disk may go on being served, and written to, without this session.
                    with trio.CancelScope(shield=True):
                        await trio.to_thread.run_sync(self._output.begin, self.map())
                raise
            # Unmounted: no write can come any more. A signal now asks for what is being done.
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(self._output.write, self.map())
            signals.cancel_scope.cancel()
        return self._end()

    async def _serve(self, ready: Callable[[report.Facts], None]) -> None:
        async with trio.open_nursery() as nursery:
            try:
                await nursery.start(self._mounted, nursery.cancel_scope)
            except RuntimeError:
                if self._unmount.cancel_called:
                    # By a signal, before there was anything to unmount: trio's word for a start that was given up.
                    raise KeyboardInterrupt from None
                raise
            for note in self._notes:
                log.info("%s", note)
            await trio.to_thread.run_sync(self._output.begin, self.map())
            self.was_ready = True
            ready(await self.facts())
            nursery.start_soon(self._scanning)
            nursery.start_soon(self._watching_output)

    async def _mounted(
        self, session: trio.CancelScope, *, task_status: trio.TaskStatus[str]
    ) -> None:
        """Serve the mount until it is unmounted or `_unmount` is cancelled; then end the session."""
        served = filesystem.Filesystem(
            self._way.disk,
            self._files(),
            read_only=self._parameters.read_only,
            owner=_owner(self._live) if self._parameters.allow_other else None,
        )
        options = datapath.MountOptions(
            allow_other=self._parameters.allow_other, read_only=self._parameters.read_only
        )
        with self._unmount:
            await mount.serve(
                served,
                self._way,
                self._parameters.mountpoint,
                options,
                adopted=self._adopted,
                task_status=task_status,
            )
        session.cancel()

    async def _end_on_signal(self, *, task_status: trio.TaskStatus[None]) -> None:
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as received:
            task_status.started()
            async for number in received:
                log.info("ended by %s", signal.Signals(number).name)
                self._unmount.cancel()

    async def _scanning(self) -> None:
        """Scan, and again whenever asked to. A bug of the scan's never ends the mount: the guest is first."""
        while True:
            self._again = trio.Event()
            try:
                await self._scan.run()
                self._log_scan()
                if self._scan.statistics().state == progress.COMPLETE:
                    dirty = await trio.to_thread.run_sync(self.map)
                    await trio.to_thread.run_sync(self._output.write, dirty)
                    # What was written in between may be looked at by nobody else.
                    await trio.to_thread.run_sync(self._output.check, self.map)
            except Exception as error:  # noqa: BLE001 (kept, told in status and at the end)
                self._bug = error
                log.error("the scan failed:\n%s", "".join(traceback.format_exception(error)))
            self._resting = not self._again.is_set()
            await self._again.wait()

    async def _watching_output(self) -> None:
        """See to it that the map on disk never says too little for longer than a moment."""
        before = None
        while True:
            await trio.sleep(_LOOK)
            guest = self._way.recorder.statistics()
            # Only when there may be something new: making the map takes 20 ms for each 32 MiB of bits. A write
            # has its bits before it is counted; until then it is under way.
            now = (guest.write.operations, guest.discard.operations, self._scan.state)
            if now != before or self._way.recorder.depth:
                try:
                    await trio.to_thread.run_sync(self._output.check, self.map)
                except Exception as error:  # noqa: BLE001 (kept, as a scan's; the guest is first)
                    self._bug = error
                    log.error("the map on disk is not looked at: %r", error)
            before = now

    def _log_scan(self) -> None:
        now = self._scan.statistics()
        log.info(
            "scan %s scanned=%d differing=%d errors=%d",
            now.state,
            now.scanned,
            now.differing,
            now.error_count,
        )

    def map(self) -> bitmap.Bitmap:
        """Return the dirty map as of now; for any thread."""
        return self._decisions.map(self._written())

    def _written(self) -> bitmap.Bitmap:
        return self._way.recorder.written

    # The files beside the disk

    def _files(self) -> list[filesystem.VirtualFile]:
        length = carrier.layout(
            self._decisions.size, self._parameters.granularity, self._parameters.bitmap
        ).length
        return [
            files.Report("status", self._text),
            files.Report("status.json", self._json),
            files.DirtyMap(self._carrier, length),
            files.Control(self._obey),
        ]

    async def _text(self) -> str:
        return report.as_text(await self.facts())

    async def _json(self) -> str:
        return report.as_json(await self.facts())

    def _carrier(self) -> carrier.Carrier:
        """Return the map as a file, for its opener alone; in a thread."""
        dirty = self.map()
        layout = carrier.layout(dirty.size, dirty.granularity, self._parameters.bitmap)
        return carrier.Carrier(layout, dirty.data)

    def _obey(self, text: str) -> None:
        control.obey(self, text)

    def pause(self) -> None:
        """Let the scan rest."""
        self._scan.pause()
        self._keep(paused=True)

    def resume(self) -> None:
        """Let the scan go on."""
        self._scan.resume()
        self._keep(paused=False)

    def cancel(self) -> None:
        """End the scan: what it has not decided stays dirty."""
        self._scan.cancel()
        self._keep(cancelled=True)

    def rescan(self) -> None:
        """Forget what the scan found and begin again."""
        self._scan.rescan()
        self._resting = False
        self._again.set()
        self._keep(cancelled=False)

    def set_rate(self, rate: int | None) -> None:
        """Bound the scan to `rate` bytes a second of each image; None: no bound."""
        self._scan.set_rate(rate)
        self._keep(rate=rate)

    def set_workers(self, workers: int) -> None:
        """Let the scan read with so many threads."""
        self._scan.set_workers(workers)
        self._keep(workers=workers)

    def set_pacing(self, on: bool) -> None:
        """Give way to the guest, or not."""
        self._courtesy.enabled = on
        self._scan.wake()
        self._keep(pacing=on)

    # What is told

    async def facts(self) -> dict[str, Any]:
        """Return the status of this moment, in the contract's order; sizes in bytes."""
        now = self._scan.statistics()
        # After the statistics: the bytes that are dirty then are in the sum.
        written, dirty = await trio.to_thread.run_sync(self._decisions.sums, self._written())
        return {
            "state": progress.FAILED if self._bug else now.state,
            "live": self._parameters.live,
            "reference": self._parameters.reference,
            "size": now.size,
            "granularity": now.granularity,
            "scanned": now.scanned,
            "skipped": now.skipped,
            "differing": now.differing,
            "written": written,
            "dirty": dirty,
            "rate": now.rate,
            "eta": now.eta,
            "errors": now.error_count,
            "error_list": [_error_text(error) for error in now.errors],
            "datapath": self._datapath(),
            "since": self._legacy.since,
            "savings": now.savings,
            "output": self._output.state,
            # Whether a map of this scan is still to be written, and why that failed: for `posthoc wait`.
            "output_due": self._parameters.output is not None and not self._resting,
            "output_failure": self._output.failure,
            "pacing": self._courtesy.allowed if self._courtesy.enabled else None,
            "guest": self._guest(),
            "depth": self._way.depth,
            "pid": os.getpid(),
        }

    def _datapath(self) -> str:
        description = self._way.description()
        return f"{description} ({self._note})" if self._note else description

    def _guest(self) -> dict[str, Any]:
        guest = self._way.recorder.statistics()
        return {
            verb: {
                "operations": counted.operations,
                "bytes": counted.bytes,
                "errors": counted.errors,
                **{
                    f"p{name}_us": None
                    if (value := counted.percentile(share)) is None
                    else value / 1000
                    for name, share in (("50", 50), ("99", 99), ("999", 99.9))
                },
                "latency_us": [
                    (None if bound is None else bound / 1000, count)
                    for bound, count in counted.buckets()
                ],
            }
            for verb, counted in (
                ("reads", guest.read),
                ("writes", guest.write),
                ("flushes", guest.flush),
                ("discards", guest.discard),
            )
        }

    def _end(self) -> state.End:
        now = self._scan.statistics()
        if self._bug is not None:
            return state.End(exits.BUG, f"the scan failed: {self._bug!r}; what it left is dirty")
        if self._output.failure:
            return state.End(
                exits.MISTAKE, f"the map is not safely written: {self._output.failure}"
            )
        if now.state == progress.FAILED:
            return state.End(exits.READ_ERROR, f"the scan failed: {now.failure}; the rest is dirty")
        if now.error_count:
            return state.End(
                exits.READ_ERROR, f"{now.error_count} places could not be read: they count as dirty"
            )
        return state.End(exits.DONE, "")


def _owner(live: base.Image) -> filesystem.Owner | None:
    """Return who owns the disk in a mount that others reach: whoever may use the image itself may use it there.

    None, the mounting user alone, where the image is no file or device.
    """
    if not isinstance(live, file.FileImage):
        return None
    status = os.fstat(live.fd)
    return filesystem.Owner(status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode) & 0o666)


def _courtesy(way: datapath.Datapath) -> courtesy.Courtesy:
    """Return what judges the guest's requests: the latencies of each kind, and how many are under way."""

    def sample() -> courtesy.Histograms:
        guest = way.recorder.statistics()
        kinds = (guest.read, guest.write, guest.flush, guest.discard)
        return np.stack([kind.histogram for kind in kinds])

    bounds = [recorder.bucket_end(bucket) / 1e9 for bucket in range(recorder.BUCKETS)]
    return courtesy.Courtesy(sample, np.array(bounds), depth=lambda: way.depth)


def _error_text(error: progress.ScanError) -> str:
    return f"{error.side} {error.length} bytes at {error.start} ({os.strerror(error.errno)})"
