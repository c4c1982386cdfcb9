# SPDX-License-Identifier: Apache-2.0
"""The data path of a disk that is no file, an NBD export: python, behind the native program.

    guest ---> kernel ---> server (C) <---> pyfuse3 and PythonDisk in the session ---> export
                             |
                           keeper (C)

The server passes every request on, and FALLOCATE, which pyfuse3 does not know, in another form
(native/forward.c, allocation.py): so a guest's discards and zeroes reach the export. The write bitmap is
this session's, hence the mount ends with the session; server and keeper are replaced when they die.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import trio

from dirtymap import bitmap, units
from dirtymap.images import base
from overlayfs import datapath, mountpoint, recorder
from overlayfs.datapath import keeper, kept, python, shared

# Passing requests on is done by one thread; the disk's are the session's.
_READERS = 1
# As the native data path: pyfuse3 on its own would have 1 MiB, which no socket's packet holds.
_MAX_WRITE = 128 * 1024
# Discards may take as long as the server likes; they must not take the threads that reads and writes need.
_DISCARD_THREADS = 2


class ForwardDisk(python.PythonDisk):
    """A disk over any image, recorded, that takes discards and zeroes too."""

    def __init__(
        self, image: base.Image, record: recorder.Recorder, threads: int = datapath.DEFAULT_THREADS
    ) -> None:
        super().__init__(image, record, threads)
        self._zeroed = image if isinstance(image, base.ZeroingImage) else None
        self._discards = trio.CapacityLimiter(_DISCARD_THREADS)

    async def discard(self, start: int, length: int) -> None:
        """Mark, then make the bytes read as zeros and give up their space; OSError as the image raises it."""
        assert self._zeroed is not None
        await self._make_zero(start, length, self._zeroed.discard)

    async def zero(self, start: int, length: int) -> None:
        """Mark, then make the bytes read as zeros and keep their space; OSError as the image raises it."""
        assert self._zeroed is not None
        await self._make_zero(start, length, self._zeroed.zero)

    async def _make_zero(self, start: int, length: int, how: Callable[[int, int], None]) -> None:
        await self.change(
            recorder.DISCARD, start, length, lambda: how(start, length), self._discards
        )


class ForwardDatapath:
    """The data path of an image that is no file; made by `create`, closed by the caller."""

    def __init__(
        self,
        memory: shared.Memory,
        mount: kept.KeptMount,
        disk: ForwardDisk,
        record: recorder.Recorder,
        threads: int,
    ) -> None:
        self.recorder = record
        self.disk = disk
        self._memory = memory
        self._mount = mount
        self._threads = threads

    @classmethod
    def create(
        cls,
        image: base.Image,
        record: recorder.Recorder,
        path: Path,
        *,
        threads: int = datapath.DEFAULT_THREADS,
        socket_buffer: int = kept.SOCKET_BUFFER,
        log: Path | None = None,
    ) -> ForwardDatapath:
        """Prepare to serve `image`, which stays the caller's, with `threads` at work on it.

        `path` is the keeper's socket, in a folder that is private to this user; `log` is what the keeper and the
        server append to, standard error if None. Raises NativeUnavailable.
        """
        program = keeper.program()
        ends = keeper.pair(socket_buffer)
        # The bitmaps in this memory are nobody's here: as small as they can be.
        memory = shared.Memory.create(
            image.size,
            units.LARGEST_GRANULARITY,
            threads=_READERS,
            max_write=min(_MAX_WRITE, keeper.room(ends[0])),
        )
        descriptors = keeper.Descriptors(memory.fd, *ends)
        mount = kept.KeptMount(memory, descriptors, path, program=program, log_path=log)
        return cls(memory, mount, ForwardDisk(image, record, threads), record, threads)

    @property
    def depth(self) -> int:
        """How many requests are being worked on."""
        return self.recorder.depth

    def description(self) -> str:
        """Return what `status` says of it, with what this kernel cannot do."""
        count = python.threads(self._threads)
        return f"python, {count}, behind the native server" + self._mount.lacks(kept.NOT_REPLACED)

    def open_device(self, where: str, options: datapath.MountOptions) -> str:
        """Mount; return pyfuse3's end of the socket. Raises NativeUnavailable."""
        self._memory.write_restart(_unmount_command(where))
        return self._mount.open_device(where, options)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep the mount served. Ends the server when cancelled."""
        await self._mount.run(task_status=task_status)

    def leave(self) -> bool:
        """The disk ends with this process."""
        return False

    def close_device(self) -> None:
        """End server, keeper and connection."""
        self._mount.close()

    async def drain(self) -> None:
        """Return when every write that was in flight at the call is done."""
        await self.disk.drain()

    async def swap(self) -> bitmap.Bitmap:
        """Return the write bitmap and begin an empty one, with no await between the two."""
        return self.recorder.swap()

    def close(self) -> None:
        """Close everything but the image; idempotent."""
        self.close_device()
        self._memory.close()


def _unmount_command(where: str) -> list[str]:
    """Return what the keeper does when the session is killed, [] where the tool is missing.

    It is what the shared memory calls the restart of a session: here there is none to start.
    """
    name, *words = mountpoint.unmount_command(where, lazy=True)
    tool = shutil.which(name)
    return [] if tool is None else [os.path.abspath(tool), *words]
