# SPDX-License-Identifier: Apache-2.0
"""The reference data path: requests through pyfuse3, image I/O in worker threads.

Concurrency, and why no write escapes the map:

1. All of this module but `_write`, `_sync` and the image's own calls runs on the event loop; these run in
   worker threads and touch nothing but the image and memory of their own.
2. `change`, which every write goes through, marks and counts itself in flight before its first `await`: no
   scan, no other request and no checkpoint can come between. Bytes change only later, in the thread.
3. A cancel cannot part the two: before the thread has begun it leaves bits of a write that never was
   (dirty too much), and a thread that has begun is waited for, never abandoned.
4. Bits stay set whatever becomes of the write: an error may have left any part of it on the disk.
5. `swap` awaits nothing, hence falls between two marks. `drain` waits for the writes that were in flight
   at its call, not for later ones: it ends also under a guest that never stops writing.

A new `await` between the mark and the counting, or in `swap`, would break this.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import trio

from dirtymap import bitmap
from dirtymap.images import base
from overlayfs import datapath, recorder

T = TypeVar("T")

# A guest's flushes wait for the disk, each for all writes before it; more than two at a time gain
# nothing, and they must not take the threads that reads and writes need.
_SYNC_THREADS = 2


class PythonDisk:
    """A disk over any image, recorded. The image is closed by whoever opened it."""

    def __init__(
        self, image: base.Image, record: recorder.Recorder, threads: int = datapath.DEFAULT_THREADS
    ) -> None:
        self.size = image.size
        self._read = _guests_read(image)
        # Asked once: a check against a protocol costs more than the rest of a request's Python.
        self._writable = image if isinstance(image, base.WritableImage) else None
        self._recorder = record
        self._threads = trio.CapacityLimiter(threads)
        self._syncs = trio.CapacityLimiter(_SYNC_THREADS)
        self._in_flight: dict[int, trio.Event] = {}
        self._started = 0

    async def read(self, start: int, length: int) -> bytes | bytearray:
        """Return `length` bytes from `start` on; OSError as the image raises it."""
        return await self._request(
            recorder.READ, length, lambda: self._read(start, length), self._threads
        )

    async def write(self, start: int, data: bytes) -> int:
        """Mark, then write all of `data` at `start`; OSError as the image raises it."""
        await self.change(
            recorder.WRITE, start, len(data), lambda: self._write(start, data), self._threads
        )
        return len(data)

    async def change(
        self,
        kind: int,
        start: int,
        length: int,
        work: Callable[[], None],
        limiter: trio.CapacityLimiter,
    ) -> None:
        """Mark, then do `work`, which changes bytes [start, start + length) and no others."""
        self._recorder.mark(start, length)
        self._started += 1
        number, done = self._started, trio.Event()
        self._in_flight[number] = done
        try:
            await self._request(kind, length, work, limiter)
        finally:
            del self._in_flight[number]
            done.set()

    async def sync(self, datasync: bool) -> None:
        """Return when all that was written before is on stable storage."""
        await self._request(recorder.FLUSH, 0, lambda: self._sync(datasync), self._syncs)

    async def drain(self) -> None:
        """Return when every write that was in flight at the call is done."""
        for done in list(self._in_flight.values()):
            await done.wait()

    async def _request(
        self, kind: int, length: int, work: Callable[[], T], limiter: trio.CapacityLimiter
    ) -> T:
        """Do `work` in a thread and account for it; the wait for a free thread is part of its time."""
        started = time.monotonic_ns()
        failed = True
        self._recorder.depth += 1
        try:
            result = await trio.to_thread.run_sync(work, limiter=limiter)
            failed = False
        finally:
            self._recorder.depth -= 1
            self._recorder.account(kind, length, time.monotonic_ns() - started, failed=failed)
        return result

    # In worker threads

    def _write(self, start: int, data: bytes) -> None:
        # The file system lets no write through to a disk that was opened for reading.
        assert self._writable is not None
        self._writable.write(start, data)

    def _sync(self, datasync: bool) -> None:
        if self._writable is not None:
            self._writable.flush(datasync)


def _guests_read(image: base.Image) -> Callable[[int, int], bytes | bytearray]:
    """Return how a guest reads `image`: where that has a cache of its own, through it."""
    if isinstance(image, base.CachedImage):
        return image.read

    def read(start: int, length: int) -> bytearray:
        buffer = bytearray(length)
        image.read_into(start, memoryview(buffer))
        return buffer

    return read


def threads(count: int) -> str:
    """Return the number of threads in words."""
    return f"{count} thread{'s' * (count != 1)}"


class PythonDatapath:
    """The data path that needs nothing but pyfuse3."""

    def __init__(
        self, image: base.Image, record: recorder.Recorder, threads: int = datapath.DEFAULT_THREADS
    ) -> None:
        self.recorder = record
        self.disk = PythonDisk(image, record, threads)
        self._threads = threads

    @property
    def depth(self) -> int:
        """How many requests are being worked on."""
        return self.recorder.depth

    def description(self) -> str:
        """Return what `status` says of it."""
        return f"python, {threads(self._threads)}"

    def open_device(self, mountpoint: str, options: datapath.MountOptions) -> str:
        """Return the mountpoint: pyfuse3 mounts by itself."""
        return mountpoint

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Nothing has to run beside pyfuse3."""
        task_status.started()
        await trio.sleep_forever()

    def leave(self) -> bool:
        """The disk ends with this process."""
        return False

    def close_device(self) -> None:
        """pyfuse3 closes its own device."""

    async def drain(self) -> None:
        """Return when every write that was in flight at the call is done."""
        await self.disk.drain()

    async def swap(self) -> bitmap.Bitmap:
        """Return the write bitmap and begin an empty one, with no await between the two."""
        return self.recorder.swap()

    def close(self) -> None:
        """There is nothing to close: the image is the caller's."""
