# SPDX-License-Identifier: Apache-2.0
"""The native data path: the disk's requests are served by a program of its own.

    guest ---> kernel ---> server (C) ---> live disk
                             |  ^
              all else       v  |             shared memory: write bitmap, statistics, what a successor needs
                           pyfuse3 in the session

The session may be busy, stopped or killed: the disk goes on. A session that is lost is made good by the
keeper (its command line is in the shared memory) or by whoever calls `NativeDatapath.adopt`.

Only for a live disk that is a file descriptor: a raw file or a block device. (forward.py: for others.)
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import trio

from dirtymap import bitmap, errors
from overlayfs import datapath
from overlayfs.datapath import keeper, kept, shared
from overlayfs.datapath.keeper import NativeUnavailable
from overlayfs.datapath.kept import SOCKET_BUFFER

__all__ = ["NativeDatapath", "NativeUnavailable"]

# Measured: two threads for what lies in the page cache, four where a device is behind it. With O_DIRECT one has many
# requests with the device at a time (native/direct.c).
CACHED_THREADS, DEVICE_THREADS, DIRECT_THREADS = 2, 4, 1
# 128 KiB requests beat 1 MiB: they spread over the threads and stay in the processor's cache.
MAX_WRITE = 128 * 1024

# From <linux/fuse.h>, INIT's flags.
FUSE_ASYNC_DIO = 1 << 15
FUSE_DIRECT_IO_ALLOW_MMAP = 1 << 36
_ABILITIES = {
    **kept.NOT_REPLACED,
    FUSE_ASYNC_DIO: "without asynchronous direct I/O",
    FUSE_DIRECT_IO_ALLOW_MMAP: "without shared mappings",
}
# The protocol's minor version from which FOPEN_PARALLEL_DIRECT_WRITES means something.
_MINORS = {38: "without parallel direct writes"}


class _ServedElsewhere:
    """The disk's requests that would reach pyfuse3: there are none, and none may change the disk."""

    def __init__(self, live: int, size: int) -> None:
        self._live = live
        self.size = size

    async def read(self, start: int, length: int) -> bytes:
        """Read from the live disk."""
        return await trio.to_thread.run_sync(os.pread, self._live, length, start)

    async def write(self, start: int, data: bytes) -> int:
        """Refuse: marks of this process would race with the server's."""
        raise OSError(5, "the native data path has missed a write")

    async def sync(self, datasync: bool) -> None:
        """Bring the live disk to stable storage."""
        await trio.to_thread.run_sync(os.fdatasync if datasync else os.fsync, self._live)


class NativeDatapath:
    """The data path of a raw file or block device, served by posthoc-datapath.

    Made by `create` for a new mount or by `adopt` for one that is being served; closed by the caller.
    """

    def __init__(self, memory: shared.Memory, mount: kept.KeptMount, live: int) -> None:
        self.memory = memory
        self.recorder = shared.SharedRecorder(memory)
        self._mount = mount
        self._live = live
        self.disk: datapath.Disk = _ServedElsewhere(live, memory.size)

    @classmethod
    def create(
        cls,
        live: int,
        size: int,
        granularity: int,
        path: Path,
        *,
        read_only: bool = False,
        threads: int | None = None,
        cache: str = "writeback",
        max_write: int = MAX_WRITE,
        socket_buffer: int = SOCKET_BUFFER,
        scan_length: int = 0,
        log: Path | None = None,
    ) -> NativeDatapath:
        """Prepare to serve the disk behind the descriptor `live`, which is duplicated.

        `path` is the keeper's socket, in a folder that is private to this user. `cache`: "writeback" goes
        through the page cache, "none" around it where a request is aligned. `threads`: None chooses. `log` is
        what the keeper and what it starts append to, standard error if None. Raises NativeUnavailable.
        """
        program = keeper.program()
        chosen = threads or _threads(live, cache)
        direct = _open_direct(live, read_only=read_only) if cache == "none" else -1
        memory = shared.Memory.create(
            size,
            granularity,
            threads=min(chosen, shared.MOST_THREADS),
            max_write=max_write,
            read_only=read_only,
            scan_length=scan_length,
        )
        descriptors = keeper.Descriptors(
            memory.fd, *keeper.pair(socket_buffer), live=os.dup(live), direct=direct
        )
        mount = kept.KeptMount(memory, descriptors, path, program=program, log_path=log)
        return cls(memory, mount, os.dup(live))

    @classmethod
    def adopt(cls, path: Path, *, log: Path | None = None) -> NativeDatapath:
        """Become the session of the data path whose keeper listens on `path`.

        `live` is its live disk, `session` what its former session left. Raises UserError.
        """
        connection, descriptors = keeper.adopt(path)
        memory = shared.Memory(descriptors.memory)
        mount = kept.KeptMount(
            memory,
            descriptors,
            path,
            program=keeper.program(),
            log_path=log,
            connection=connection,
        )
        return cls(memory, mount, os.dup(descriptors.live))

    @property
    def live(self) -> int:
        """The live disk's descriptor, with its locks; valid until `close`."""
        return self._live

    @property
    def depth(self) -> int:
        """How many requests the server is in, and one more for all that it has not read yet."""
        return self.recorder.depth + self._mount.has_waiting()

    @property
    def scan(self) -> npt.NDArray[np.uint8]:
        """Memory for the scanner's decisions: zero at first, and kept from session to session."""
        return self.memory.scan

    @property
    def session(self) -> bytes:
        """What was left with `remember`; empty at first."""
        return self.memory.session

    def remember(self, session: bytes, restart: Sequence[str] = ()) -> None:
        """Leave `session` for the session that adopts this mount, and the command line that starts it.

        The command's first word is an absolute path; () leaves the mount to wait for a session.
        Raises ValueError where it is too long.
        """
        self.memory.write_session(session)
        self.memory.write_restart(list(restart))

    def description(self) -> str:
        """Return what `status` says of it, with what this kernel cannot do."""
        count = int(self.memory.header.threads)
        lacks = self._mount.lacks(_ABILITIES, _MINORS)
        return f"native, {count} thread{'s' * (count != 1)}{lacks}"

    def open_device(self, mountpoint: str, options: datapath.MountOptions) -> str:
        """Mount, unless it is adopted; return pyfuse3's end of the socket. Raises NativeUnavailable."""
        return self._mount.open_device(mountpoint, options)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep the mount served. Ends the server when cancelled."""
        await self._mount.run(task_status=task_status)

    def leave(self) -> bool:
        """Leave the disk being served to the next session; False where nobody would start one or serve it."""
        return self._mount.leave()

    def close_device(self) -> None:
        """End server, keeper and connection; after `leave` the connection only.

        The write bitmap and the statistics remain readable.
        """
        self._mount.close()

    async def drain(self) -> None:
        """Return when every write that had begun at the call is done, failed or not."""
        await trio.to_thread.run_sync(self._mount.ask, "drain")

    async def swap(self) -> bitmap.Bitmap:
        """Return the write bitmap and begin an empty one.

        Until the next `swap` or `commit`, the bits that were taken stay in the shared memory, and a session
        that adopts the mount finds them written again: this one died before it made use of them.
        """
        await self.commit()
        await trio.to_thread.run_sync(self._mount.ask, "swap")
        return self.memory.taken.copy()

    async def commit(self) -> None:
        """Forget what the last `swap` took: whoever wanted it has it on stable storage."""
        await trio.to_thread.run_sync(self._mount.ask, "commit")

    def close(self) -> None:
        """Close everything; idempotent."""
        self.close_device()
        if self._live >= 0:
            os.close(self._live)
            self._live = -1
        self.memory.close()


def _threads(live: int, cache: str) -> int:
    """Return how many threads what lies behind the descriptor `live` wants."""
    if cache == "none":
        return DIRECT_THREADS
    return DEVICE_THREADS if stat.S_ISBLK(os.fstat(live).st_mode) else CACHED_THREADS


def _open_direct(live: int, *, read_only: bool) -> int:
    """Open the same disk once more, around the page cache; raises NativeUnavailable."""
    flags = (os.O_RDONLY if read_only else os.O_RDWR) | os.O_DIRECT | os.O_CLOEXEC
    try:
        return os.open(f"/proc/self/fd/{live}", flags)
    except OSError as error:
        raise NativeUnavailable(f"--cache none: {errors.reason(error)}") from None
