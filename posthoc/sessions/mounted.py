# SPDX-License-Identifier: Apache-2.0
"""A mounted session: the live disk served as a file while it is compared with the reference.

    mount answers -> the scan begins -> ... -> unmounted -> the scan is ended -> the map is written

The write bitmap records from the first moment that the disk can be written through the mount, which is before
the scanner's first read: that order is what makes the map complete (DESIGN: the ordering rule).
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

import trio

from dirtymap import bitmap, errors, state
from dirtymap.qcow2 import carrier
from overlayfs import datapath, filesystem, mount, recorder
from overlayfs.datapath import python
from posthoc import background, exits, report
from posthoc.sessions import control, files, pair
from posthoc.sessions.parameters import Parameters
from scanner import progress, scan

log = logging.getLogger(__name__)


def run(parameters: Parameters, *, ready_fd: int | None = None) -> int:
    """Serve until the file system is unmounted or a signal comes; return the exit code.

    `ready_fd`, if given, is where `background.start` waits for the session to be ready. Raises UserError
    before that; afterwards everything is told in the session's log and at its end.
    """
    folder = state.Folder(parameters.mountpoint)
    if parameters.output:
        pair.check_output(parameters.output, parameters.live, parameters.reference)
    folder.make()
    folder.lock()
    folder.remove("end.json")

    def ready() -> None:
        folder.write("session.json", {"pid": os.getpid(), "parameters": parameters.stored()})
        if ready_fd is not None:
            background.detach(ready_fd, folder.log)

    try:
        end = trio.run(_serve, parameters, ready)
    except BaseException as error:
        folder.write("end.json", {"exit_code": exits.BUG, "message": f"a bug ended it: {error!r}"})
        raise
    folder.write("end.json", {"exit_code": end.exit_code, "message": end.message})
    folder.remove("session.json")
    if end.message:
        print(f"posthoc: {end.message}", file=sys.stderr)
    return end.exit_code


async def _serve(parameters: Parameters, ready: Callable[[], None]) -> state.End:
    with contextlib.ExitStack() as stack:
        images = stack.enter_context(
            pair.open_pair(
                parameters.live,
                parameters.reference,
                writable=not parameters.read_only,
                options=parameters.options,
                allow_shrunk=parameters.allow_shrunk,
            )
        )
        way = python.PythonDatapath(
            images.live,
            recorder.Recorder(images.live.size, parameters.granularity),
            parameters.threads or datapath.DEFAULT_THREADS,
        )
        stack.callback(way.close)
        session = Session(parameters, images, way)
        return await session.serve(ready)


class Session:
    """One mount, one scan, one map. All methods are for the event loop."""

    def __init__(self, parameters: Parameters, images: pair.Pair, way: datapath.Datapath) -> None:
        self._parameters = parameters
        self._notes = images.notes
        self._way = way
        self._since = datetime.datetime.now(datetime.UTC).astimezone().isoformat("T", "seconds")
        self._decisions = scan.Decisions(images.live.size, parameters.granularity)
        self._scan = scan.Scan(
            images.reader,
            images.reference,
            self._decisions,
            written=self._written,
            workers=parameters.workers,
            rate=parameters.rate,
            paused=parameters.paused,
            read_all=parameters.read_all,
        )
        self._again = trio.Event()
        self._unmount = trio.CancelScope()
        self._bug: Exception | None = None
        self._output = _Output(parameters)

    async def serve(self, ready: Callable[[], None]) -> state.End:
        """Mount, call `ready`, scan; return after the mount has ended and the map is written."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self._end_on_signal)
            await nursery.start(self._mounted, nursery.cancel_scope)
            for note in self._notes:
                log.info("%s", note)
            ready()
            nursery.start_soon(self._scanning)
        # Unmounted: no write can come any more.
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(self._output.write, self.map())
        return self._end()

    async def _mounted(
        self, session: trio.CancelScope, *, task_status: trio.TaskStatus[str]
    ) -> None:
        """Serve the mount until it is unmounted or `_unmount` is cancelled; then end the session."""
        served = filesystem.Filesystem(
            self._way.disk, self._files(), read_only=self._parameters.read_only
        )
        options = datapath.MountOptions(
            allow_other=self._parameters.allow_other, read_only=self._parameters.read_only
        )
        with self._unmount:
            await mount.serve(
                served, self._way, self._parameters.mountpoint, options, task_status=task_status
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
            except Exception as error:  # noqa: BLE001 (kept, told in status and at the end)
                self._bug = error
                log.error("the scan failed:\n%s", "".join(traceback.format_exception(error)))
            self._log_scan()
            if self._scan.statistics().state == progress.COMPLETE:
                await trio.to_thread.run_sync(self._output.write, self.map())
            await self._again.wait()

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
        """Return the dirty map as of now."""
        return self._decisions.map(self._written())

    def _written(self) -> bitmap.Bitmap:
        return self._way.recorder.written

    # The files beside the disk

    def _files(self) -> list[filesystem.VirtualFile]:
        length = carrier.layout(
            self._decisions.size, self._parameters.granularity, self._parameters.bitmap
        ).length
        return [
            files.Report("status", lambda: report.as_text(self.facts())),
            files.Report("status.json", lambda: report.as_json(self.facts())),
            files.DirtyMap(lambda: carrier.pieces(self.map(), self._parameters.bitmap), length),
            files.Control(self._obey),
        ]

    def _obey(self, text: str) -> None:
        control.obey(self, text)

    def pause(self) -> None:
        """Let the scan rest."""
        self._scan.pause()

    def resume(self) -> None:
        """Let the scan go on."""
        self._scan.resume()

    def cancel(self) -> None:
        """End the scan: what it has not decided stays dirty."""
        self._scan.cancel()

    def rescan(self) -> None:
        """Forget what the scan found and begin again."""
        self._scan.rescan()
        self._again.set()

    def set_rate(self, rate: int | None) -> None:
        """Bound the scan to `rate` bytes a second of each image; None: no bound."""
        self._scan.set_rate(rate)

    def set_workers(self, workers: int) -> None:
        """Let the scan read with so many threads."""
        self._scan.set_workers(workers)

    # What is told

    def facts(self) -> dict[str, Any]:
        """Return the status of this moment, in the contract's order; sizes in bytes."""
        now = self._scan.statistics()
        written = self._written()
        return {
            "state": progress.FAILED if self._bug else now.state,
            "live": self._parameters.live,
            "reference": self._parameters.reference,
            "size": now.size,
            "granularity": now.granularity,
            "scanned": now.scanned,
            "skipped": now.skipped,
            "differing": now.differing,
            "written": written.dirty_bytes(),
            "dirty": self.map().dirty_bytes(),
            "rate": now.rate,
            "eta": now.eta,
            "errors": now.error_count,
            "error_list": [_error_text(error) for error in now.errors],
            "datapath": self._way.description(),
            "since": self._since,
            "savings": now.savings,
            "output": self._output.state,
            "guest": self._guest(),
            "pid": os.getpid(),
        }

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
            return state.End(exits.MISTAKE, f"the map is not written: {self._output.failure}")
        if now.state == progress.FAILED:
            return state.End(exits.READ_ERROR, f"the scan failed: {now.failure}; the rest is dirty")
        if now.error_count:
            return state.End(
                exits.READ_ERROR, f"{now.error_count} places could not be read: they count as dirty"
            )
        return state.End(exits.DONE, "")


class _Output:
    """The map on disk (--output), and whether writing it went well. Called in worker threads, one at a time."""

    def __init__(self, parameters: Parameters) -> None:
        self._path = parameters.output
        self._bitmap = parameters.bitmap
        self.failure: str | None = None
        self._done = False

    def write(self, dirty: bitmap.Bitmap) -> None:
        """Replace the map by `dirty`; a failure is logged, told in `failure`, and leaves the map before."""
        if self._path is None:
            return
        try:
            carrier.write(self._path, dirty, self._bitmap)
        except (errors.UserError, OSError) as error:
            self.failure = errors.reason(error)
            log.error("the map is not written: %s", self.failure)
        else:
            self.failure = None
            self._done = True
            log.info("map written path=%s dirty=%d", self._path, dirty.dirty_bytes())

    @property
    def state(self) -> str | None:
        """What `status` says of it, or None where no map was asked for."""
        if self._path is None:
            return None
        if self.failure:
            return f"failed: {self.failure}"
        return f"{self._path} ({'written' if self._done else 'not written yet'})"


def _error_text(error: progress.ScanError) -> str:
    return f"{error.side} {error.length} bytes at {error.start} ({os.strerror(error.errno)})"
