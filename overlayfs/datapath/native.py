# SPDX-License-Identifier: Apache-2.0
"""The native data path: the disk's requests are served by a program of its own.

    guest ---> kernel ---> server (C) ---> live disk
                             |  ^
              all else       v  |             shared memory: write bitmap, statistics, what a successor needs
                           pyfuse3 in the session

    keeper (C): parent of the server, holds every descriptor; when the server dies it starts the next

The session may be busy, stopped or killed: the disk goes on. What is lost with a process is made good by
another: the server's by the keeper, the keeper by its standby (or by the session, where both are killed), the
session by the keeper (its command line is in the shared memory) or by whoever calls `NativeDatapath.adopt`.

Only for a live disk that is a file descriptor: a raw file or a block device.
"""

from __future__ import annotations

import logging
import os
import socket
import stat
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyfuse3
import trio

from dirtymap import bitmap, errors
from overlayfs import datapath
from overlayfs.datapath import keeper, kernel, shared
from overlayfs.datapath.keeper import NativeUnavailable

__all__ = ["NativeDatapath", "NativeUnavailable"]

log = logging.getLogger(__name__)

# Measured: two threads for what lies in the page cache, four to keep a device busy with O_DIRECT.
CACHED_THREADS, DEVICE_THREADS = 2, 4
# 128 KiB requests beat 1 MiB: they spread over the threads and stay in the processor's cache.
MAX_WRITE = 128 * 1024
# Room in the socket to pyfuse3 for two of the largest packets, well below the usual wmem_max.
SOCKET_BUFFER = 208 * 1024

# From <linux/fuse.h>, INIT's flags.
FUSE_ASYNC_DIO = 1 << 15
FUSE_DIRECT_IO_ALLOW_MMAP = 1 << 36
FUSE_HAS_RESEND = 1 << 39

_SELF_TEST = 5.0
_STOP_PATIENCE = 15.0
_KEEPER_TRIES = 5
_PAUSE, _RETRY = 0.002, 0.5


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

    def __init__(
        self, memory: shared.Memory, path: Path, program: Path, log_path: Path | None
    ) -> None:
        self.memory = memory
        self.recorder = shared.SharedRecorder(memory)
        self._path = path
        self._program = program
        self._log = log_path
        self._descriptors: keeper.Descriptors | None = None
        self._connection: socket.socket | None = None
        self._keeper: subprocess.Popen[bytes] | None = None
        self._live = -1
        self._direct: int | None = None
        self._socket_buffer = SOCKET_BUFFER
        self._adopted = self._left = False
        self.disk: datapath.Disk = _ServedElsewhere(-1, memory.size)

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
        device = stat.S_ISBLK(os.fstat(live).st_mode)
        chosen = threads or (DEVICE_THREADS if device or cache == "none" else CACHED_THREADS)
        memory = shared.Memory.create(
            size,
            granularity,
            threads=min(chosen, shared.MOST_THREADS),
            max_write=max_write,
            read_only=read_only,
            scan_length=scan_length,
        )
        made = cls(memory, path, program, log)
        made._live = os.dup(live)
        made._socket_buffer = socket_buffer
        made.disk = _ServedElsewhere(made._live, size)
        if cache == "none":
            made._direct = _open_direct(live, read_only=read_only)
        return made

    @classmethod
    def adopt(cls, path: Path, *, log: Path | None = None) -> NativeDatapath:
        """Become the session of the data path whose keeper listens on `path`.

        `live` is its live disk, `session` what its former session left. Raises UserError.
        """
        connection, descriptors = keeper.adopt(path)
        memory = shared.Memory(descriptors.memory)
        made = cls(memory, path, keeper.program(), log)
        made._adopted = True
        made._connection = connection
        made._descriptors = descriptors
        made._live = os.dup(descriptors.live)
        made.disk = _ServedElsewhere(made._live, memory.size)
        return made

    @property
    def live(self) -> int:
        """The live disk's descriptor, with its locks; valid until `close`."""
        return self._live

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
        header = self.memory.header
        count = int(header.threads)
        parts = [f"native, {count} thread{'s' * (count != 1)}"]
        if header.init_length:
            offered = int(header.kernel_flags)
            for flag, missing in (
                (FUSE_HAS_RESEND, "not replaced when killed"),
                (FUSE_ASYNC_DIO, "without asynchronous direct I/O"),
                (FUSE_DIRECT_IO_ALLOW_MMAP, "without shared mappings"),
            ):
                if not offered & flag:
                    parts.append(missing)
        return "; ".join(parts) + (" (this kernel is too old)" if len(parts) > 1 else "")

    def open_device(self, mountpoint: str, options: datapath.MountOptions) -> str:
        """Mount, start the keeper, see INIT arrive; return pyfuse3's end of the socket as /dev/fd/N.

        Raises NativeUnavailable, with nothing left behind, if the program does not serve within 5 s.
        """
        if not self._adopted:
            self._start(mountpoint, options)
        assert self._descriptors is not None
        # libfuse closes what it is given.
        return f"/dev/fd/{os.dup(self._descriptors.peer.fileno())}"

    def _start(self, mountpoint: str, options: datapath.MountOptions) -> None:
        fuse = kernel.mount(mountpoint, options)
        server_end, our_end = keeper.pair(self._socket_buffer)
        self._descriptors = keeper.Descriptors(
            fuse, os.dup(self._live), self.memory.fd, server_end, our_end, self._direct
        )
        try:
            self._keeper, self._connection = keeper.spawn(
                self._program, self._path, self._descriptors, self._log
            )
            self._test()
        except BaseException:
            kernel.unmount(mountpoint)
            self.close_device()
            raise

    def _test(self) -> None:
        """Wait until the server has read INIT from the kernel."""
        assert self._keeper is not None
        end = time.monotonic() + _SELF_TEST
        while not self.memory.header.init_length:
            status = self._keeper.poll()
            if status is not None:
                raise NativeUnavailable(f"{self._program} ended with status {status}")
            if time.monotonic() > end:
                raise NativeUnavailable(f"{self._program} does not serve within {_SELF_TEST:.0f} s")
            time.sleep(0.001)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Replace a keeper that dies; end pyfuse3 when the mount is gone. Ends the server when cancelled."""
        task_status.started()
        try:
            while await self._hear() != b"gone":
                await trio.to_thread.run_sync(self._replace_keeper)
            pyfuse3.terminate()
            await trio.sleep_forever()
        finally:
            # With it ends the connection, and with that whatever still waits for an answer.
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(self.close_device)

    async def _hear(self) -> bytes:
        """Return the keeper's next word, b"" if it is dead."""
        assert self._connection is not None
        await trio.lowlevel.wait_readable(self._connection)
        try:
            return self._connection.recv(64)
        except OSError:
            return b""

    def _replace_keeper(self) -> None:
        """Go on with the keeper's standby, or start the next keeper where that is dead too.

        What is left of the old ones is ended by the new. Raises after some failures.
        """
        assert self._descriptors is not None
        assert self._connection is not None
        self._reap()
        self._connection.close()
        for attempt in range(_KEEPER_TRIES):
            if self._resumed():
                return
            log.warning("keeper died: the next one is started attempt=%d", attempt + 1)
            try:
                self._keeper, self._connection = keeper.spawn(
                    self._program, self._path, self._descriptors, self._log
                )
            except NativeUnavailable as error:
                # Processes or memory may be short for a moment.
                log.warning("%s", error)
                time.sleep(_RETRY)
                continue
            if self._keeper_stands():
                return
            self._connection.close()
        raise RuntimeError("no keeper can be started")

    def _resumed(self) -> bool:
        """Connect to the standby that has become the keeper; False where nobody is left to become it."""
        header = self.memory.header
        while True:
            # In this order: a standby that takes over is the keeper before it has a standby of its own.
            lives = any(
                keeper.is_alive(pid, start)
                for pid, start in (
                    (header.standby_pid, header.standby_start),
                    (header.keeper_pid, header.keeper_start),
                )
            )
            connection = keeper.resume(self._path)
            if connection is not None:
                self._connection = connection
                return True
            if not lives:
                return False
            time.sleep(_PAUSE)

    def _keeper_stands(self) -> bool:
        """Wait until the keeper that was started keeps, or is dead."""
        assert self._keeper is not None
        while self.memory.header.keeper_pid != self._keeper.pid:
            if self._keeper.poll() is not None:
                return False
            time.sleep(_PAUSE)
        return True

    def _reap(self) -> None:
        if self._keeper is not None:
            self._keeper.wait()
            self._keeper = None

    def leave(self) -> bool:
        """Leave the disk being served to the next session; False where nobody would start one or serve it."""
        header = self.memory.header
        self._left = not header.ending and keeper.is_alive(header.keeper_pid, header.keeper_start)
        return self._left

    def close_device(self) -> None:
        """Let the server finish what it has begun, end it and the keeper, and close the connection.

        After `leave` only the connection is closed.

        Idempotent. The write bitmap and the statistics remain readable.
        """
        descriptors, self._descriptors = self._descriptors, None
        if descriptors is None:
            return
        connection, self._connection = self._connection, None
        if connection is not None:
            if not self._left:
                self._stop(connection)
            connection.close()
        descriptors.close()
        self._direct = None
        if not self._left:
            self._reap()

    def _stop(self, connection: socket.socket) -> None:
        """Ask the keeper to end, and return when it has: its connection ends with it."""
        connection.settimeout(_STOP_PATIENCE)
        try:
            connection.send(b"stop")
            while connection.recv(64):
                pass
        except TimeoutError:
            log.error("the data path does not end: the disk hangs")
        except OSError:
            pass  # it is dead, or has ended because the mount is gone

    async def drain(self) -> None:
        """Return when every write that had begun at the call is done, failed or not."""
        await trio.to_thread.run_sync(self._ask, "drain")

    async def swap(self) -> bitmap.Bitmap:
        """Return the write bitmap and begin an empty one.

        Until the next `swap` or `commit`, the bits that were taken stay in the shared memory, and a session
        that adopts the mount finds them written again: this one died before it made use of them.
        """
        await self.commit()
        await trio.to_thread.run_sync(self._ask, "swap")
        return self.memory.taken.copy()

    async def commit(self) -> None:
        """Forget what the last `swap` took: whoever wanted it has it on stable storage."""
        await trio.to_thread.run_sync(self._ask, "commit")

    def _ask(self, word: str) -> None:
        answer = keeper.ask(self._path, word)
        if answer != "ok":
            raise errors.UserError(f"the data path does not {word}: {answer}")

    def pids(self) -> tuple[int, int]:
        """Return the processes of the keeper and the server (0 while there is none)."""
        keeping, serving, _ = map(int, keeper.ask(self._path, "pids").split())
        return keeping, serving

    def close(self) -> None:
        """Close everything; idempotent."""
        self.close_device()
        if self._live >= 0:
            os.close(self._live)
            self._live = -1
        if self._direct is not None:
            os.close(self._direct)
            self._direct = None
        self.memory.close()


def _open_direct(live: int, *, read_only: bool) -> int:
    """Open the same disk once more, around the page cache; raises NativeUnavailable."""
    flags = (os.O_RDONLY if read_only else os.O_RDWR) | os.O_DIRECT | os.O_CLOEXEC
    try:
        return os.open(f"/proc/self/fd/{live}", flags)
    except OSError as error:
        raise NativeUnavailable(f"--cache none: {errors.reason(error)}") from None
