# SPDX-License-Identifier: Apache-2.0
"""A mount whose server is a program of its own, and outlives the processes that serve it.

    kernel <--- /dev/fuse ---> server (C) <--- socket ---> pyfuse3 in the session
                                 |
                      keeper (C): parent of the server, holds every descriptor

What is lost with a process is made good by another: the server's by the keeper, the keeper by its standby (or
by the session, where both are killed); what becomes of a session's death is said by whoever uses this
(native.py, forward.py).
"""

from __future__ import annotations

import logging
import os
import select
import socket
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

import pyfuse3
import trio

from dirtymap import errors
from overlayfs import datapath
from overlayfs.datapath import ending, keeper, kernel, shared

log = logging.getLogger(__name__)

# Room in the socket to pyfuse3 for two of the largest packets, well below the usual wmem_max.
SOCKET_BUFFER = 208 * 1024

# From <linux/fuse.h>, INIT's flags.
FUSE_HAS_RESEND = 1 << 39
NOT_REPLACED = {FUSE_HAS_RESEND: "not replaced when killed"}

_SELF_TEST = 5.0
_STOP_PATIENCE = 15.0
# For an answer of a keeper that is alive, and for a killed process to be gone.
_ANSWER_PATIENCE = 2.0
_KEEPER_TRIES = 5
_PAUSE, _RETRY = 0.002, 0.5


class KeptMount:
    """The mount that `descriptors` and `memory` make, served by `program` with its keeper listening on `path`.

    The descriptors become its own, the memory remains the caller's. `connection` is the session's to the
    keeper of a mount that is adopted; otherwise `open_device` mounts. `log_path` is what the keeper and what
    it starts append to, standard error if None.
    """

    def __init__(
        self,
        memory: shared.Memory,
        descriptors: keeper.Descriptors,
        path: Path,
        *,
        program: Path,
        log_path: Path | None = None,
        connection: socket.socket | None = None,
    ) -> None:
        self._memory = memory
        self._descriptors: keeper.Descriptors | None = descriptors
        self._path = path
        self._program = program
        self._log = log_path
        self._connection = connection
        self._keeper: subprocess.Popen[bytes] | None = None
        self._left = False

    def lacks(self, abilities: Mapping[int, str], minors: Mapping[int, str] | None = None) -> str:
        """Return for `status` what is missing here.

        Of this kernel: `abilities` (a flag of INIT's) and `minors` (the protocol's minor version), each with the
        words for its absence. Of this process: memory that may be locked.
        """
        header = self._memory.header
        if not header.init_length:
            return ""
        missing = [words for flag, words in abilities.items() if not header.kernel_flags & flag]
        for minor, words in (minors or {}).items():
            if self._memory.fuse_minor < minor:
                missing.append(words)
        told = "".join(f"; {words}" for words in missing)
        told += " (this kernel is too old)" if missing else ""
        if not header.locked:
            told += "; a kill may fail a request (buffers not locked: raise RLIMIT_MEMLOCK)"
        return told

    def has_waiting(self) -> bool:
        """Tell whether there are requests that the server has not read yet; for any thread."""
        descriptors = self._descriptors
        # Once: another thread may be closing it.
        fuse = -1 if descriptors is None else descriptors.fuse
        if fuse < 0:
            return False
        watch = select.poll()
        watch.register(fuse, select.POLLIN)
        # At once: nothing is left behind that each request would wake.
        return any(event & select.POLLIN for _, event in watch.poll(0))

    def open_device(self, mountpoint: str, options: datapath.MountOptions) -> str:
        """Mount, start the keeper, see INIT arrive; return pyfuse3's end of the socket as /dev/fd/N.

        Raises NativeUnavailable, with nothing left behind, if the program does not serve within 5 s.
        """
        assert self._descriptors is not None
        if self._connection is None:
            self._start(self._descriptors, mountpoint, options)
        # libfuse closes what it is given.
        return f"/dev/fd/{os.dup(self._descriptors.peer.fileno())}"

    def _start(
        self, descriptors: keeper.Descriptors, mountpoint: str, options: datapath.MountOptions
    ) -> None:
        descriptors.fuse = kernel.mount(mountpoint, options)
        try:
            self._keeper, self._connection = self._spawn(descriptors)
            self._test()
        except BaseException:
            kernel.unmount(mountpoint)
            if self._keeper is not None:
                # Whatever it is doing, it does not serve: it is not asked to end.
                self._memory.header.ending = 1
                self._keeper.kill()
            self.close()
            raise

    def _spawn(
        self, descriptors: keeper.Descriptors
    ) -> tuple[subprocess.Popen[bytes], socket.socket]:
        return keeper.spawn(self._program, self._path, descriptors, self._log)

    def _test(self) -> None:
        """Wait until the server has read INIT from the kernel."""
        assert self._keeper is not None
        end = time.monotonic() + _SELF_TEST
        while not self._memory.header.init_length:
            status = self._keeper.poll()
            if status is not None:
                raise keeper.NativeUnavailable(f"{self._program} ended with status {status}")
            if time.monotonic() > end:
                raise keeper.NativeUnavailable(
                    f"{self._program} does not serve within {_SELF_TEST:.0f} s"
                )
            time.sleep(0.001)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Replace a keeper that dies; end pyfuse3 when the mount is gone. Ends the server when cancelled.

        After an error of its own the mount is as it was: `leave` or `close` it.
        """
        task_status.started()
        broken = False
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._watch)
                while await self._hear() != b"gone":
                    await trio.to_thread.run_sync(self._replace_keeper)
                pyfuse3.terminate()
                await trio.sleep_forever()
        except Exception:
            broken = True
            raise
        finally:
            if not broken:
                # With it ends the connection, and with that whatever still waits for an answer.
                with trio.CancelScope(shield=True):
                    await trio.to_thread.run_sync(self.close)

    async def _watch(self) -> None:
        """See what a keeper cannot tell: that INIT is not answered, or that the mount is gone and the keeper stuck.

        Raises NativeUnavailable in the first case, and ends pyfuse3 in the second.
        """
        assert self._descriptors is not None
        fuse = self._descriptors.fuse
        with trio.move_on_after(_SELF_TEST) as waited:
            while not self._memory.header.answered:  # noqa: ASYNC110 (another process answers)
                await trio.sleep(0.005)
        if waited.cancelled_caught:
            await self._give_up(f"INIT is not answered within {_SELF_TEST:.0f} s")
        await ending.until_gone(fuse)
        while await trio.to_thread.run_sync(  # noqa: ASYNC110 (another process answers)
            self._keeper_answers, abandon_on_cancel=True
        ):
            await trio.sleep(_ANSWER_PATIENCE)
        log.warning("the mount is gone and the keeper does not answer")
        pyfuse3.terminate()

    async def _give_up(self, reason: str) -> None:
        """End pyfuse3, which must not see its socket end before, and raise NativeUnavailable."""
        pyfuse3.terminate()
        try:
            await trio.sleep_forever()
        except trio.Cancelled:
            raise keeper.NativeUnavailable(reason) from None

    def _keeper_answers(self) -> bool:
        try:
            return bool(keeper.ask(self._path, "pids", _ANSWER_PATIENCE))
        except OSError:
            return False

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
                self._keeper, self._connection = self._spawn(self._descriptors)
            except keeper.NativeUnavailable as error:
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
        while True:
            lives = self._is_kept()
            connection = keeper.resume(self._path)
            if connection is not None:
                self._connection = connection
                return True
            if not lives:
                return False
            time.sleep(_PAUSE)

    def _is_kept(self) -> bool:
        """Return whether there is a keeper, or a standby that is about to become it."""
        header = self._memory.header
        # In this order: a standby that takes over is the keeper before it has a standby of its own.
        return any(
            keeper.is_alive(pid, start)
            for pid, start in (
                (header.standby_pid, header.standby_start),
                (header.keeper_pid, header.keeper_start),
            )
        )

    def _keeper_stands(self) -> bool:
        """Wait until the keeper that was started keeps, or is dead."""
        assert self._keeper is not None
        while self._memory.header.keeper_pid != self._keeper.pid:
            if self._keeper.poll() is not None:
                return False
            time.sleep(_PAUSE)
        return True

    def _reap(self) -> None:
        if self._keeper is None:
            return
        try:
            self._keeper.wait(_ANSWER_PATIENCE)
        except subprocess.TimeoutExpired:
            # It has closed its connection or was told to end; whatever keeps it, nobody needs it any more.
            self._keeper.kill()
            self._keeper.wait()
        self._keeper = None

    def ask(self, word: str) -> None:
        """Have the keeper do what `word` says (drain, swap, commit, back); raises UserError if it does not."""
        answer = keeper.ask(self._path, word)
        if answer != "ok":
            raise errors.UserError(f"the data path does not {word}: {answer}")

    def leave(self) -> bool:
        """Leave the disk being served to the next session; False where nobody would start one or serve it."""
        self._left = not self._memory.header.ending and self._is_kept()
        return self._left

    def close(self) -> None:
        """Let the server finish what it has begun, end it and the keeper, and close the connection; idempotent.

        After `leave` only the connection is closed.
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
        if not self._left:
            self._reap()

    def _stop(self, connection: socket.socket) -> None:
        """Ask the keeper to end, and return when it has: its connection ends with it. One that is stuck is killed."""
        header = self._memory.header
        # A keeper that dies from now on is not to be replaced by its standby.
        header.ending = 1
        try:
            connection.send(b"stop")
            if _ends(connection, _ANSWER_PATIENCE):
                return
            if self._keeper_answers() and _ends(connection, _STOP_PATIENCE):
                return
        except OSError:
            return  # it is dead, or has ended because the mount is gone
        log.warning("the keeper does not end: killed")
        ending.kill(header.keeper_pid, header.keeper_start, _ANSWER_PATIENCE)
        # Dies with its keeper, unless the disk holds it.
        if not ending.kill(header.server_pid, header.server_start, _ANSWER_PATIENCE):
            log.error("the server does not end: the disk hangs")


def _ends(connection: socket.socket, patience: float) -> bool:
    """Return whether the other end closes a connection within `patience` seconds; OSError if it is dead."""
    connection.settimeout(patience)
    try:
        while connection.recv(64):
            pass
    except TimeoutError:
        return False
    return True
