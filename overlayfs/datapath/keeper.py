# SPDX-License-Identifier: Apache-2.0
"""The session's side of the keeper (native/keeper.c): start one, become its session, ask it things.

Every conversation is over SOCK_SEQPACKET, a word a packet. A session has one connection for as long as it
lives, on which it hears "gone"; the end of that connection tells either side that the other is dead.
What is asked (drain, swap, ...) goes over a connection of its own.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from dirtymap import errors
from overlayfs.datapath import ending

PROGRAM = "posthoc-datapath"
_LONGEST_WORD = 256
# A keeper that was killed is replaced within milliseconds; a machine may be busy.
_PATIENCE = 10.0
_PAUSE = 0.005


class NativeUnavailable(errors.UserError):
    """The native data path cannot be used here; `reason` says why, and python can serve instead."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"the native data path cannot be used: {reason}")
        self.reason = reason


def program() -> Path:
    """Return the program: $POSTHOC_DATAPATH, or beside this package, or where pip installed it."""
    chosen = os.environ.get("POSTHOC_DATAPATH")
    if chosen:
        return _usable(Path(chosen))
    beside = Path(__file__).with_name(PROGRAM)
    if beside.exists():
        return _usable(beside)
    try:
        installed = metadata.distribution("posthoc").locate_file(f"overlayfs/datapath/{PROGRAM}")
    except metadata.PackageNotFoundError:
        raise NativeUnavailable(f"{PROGRAM} was not built") from None
    return _usable(Path(str(installed)))


def _usable(path: Path) -> Path:
    if not path.is_file():
        raise NativeUnavailable(f"{path} was not built")
    if not os.access(path, os.X_OK):
        raise NativeUnavailable(f"{path} cannot be executed")
    return path


@dataclass
class Descriptors:
    """What must outlive every process: each of them holds all of it. -1 is none.

    There is no `fuse` before it is mounted, no `live` where the session serves the disk, and `direct` only
    where the page cache is gone around.
    """

    memory: int
    session: socket.socket  # the server's end
    peer: socket.socket  # pyfuse3's end
    fuse: int = -1
    live: int = -1
    direct: int = -1

    def close(self) -> None:
        """Close them, but not the memory, whose owner has mapped it; idempotent."""
        for fd in (self.fuse, self.live, self.direct):
            if fd >= 0:
                os.close(fd)
        self.fuse = self.live = self.direct = -1
        self.session.close()
        self.peer.close()


def _sequenced() -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def spawn(
    command: Path, path: Path, descriptors: Descriptors, log: Path | None = None
) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """Start a keeper that listens on `path`; return it and this session's connection to it.

    It outlives this process, and appends to `log` what it has to say (None: to our standard error). Raises
    NativeUnavailable.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    numbers = [
        descriptors.fuse,
        descriptors.live,
        descriptors.direct,
        descriptors.memory,
        descriptors.session.fileno(),
        theirs.fileno(),
    ]
    with theirs, contextlib.ExitStack() as stack:
        try:
            output = sys.stderr if log is None else stack.enter_context(log.open("ab"))
            process = subprocess.Popen(
                [os.fspath(command), "keeper", *map(str, numbers), os.fspath(path)],
                pass_fds=[number for number in numbers if number >= 0],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        except OSError as error:
            ours.close()
            raise NativeUnavailable(f"{command}: {errors.reason(error)}") from None
    return process, ours


def ask(path: Path, word: str, patience: float = _PATIENCE) -> str:
    """Send one word to the keeper that listens on `path` and return its answer.

    Waits for a keeper that is being replaced. Raises OSError when there is none, or it does not answer. A
    drain takes as long as the slowest write.
    """
    end = time.monotonic() + patience
    while True:
        try:
            with _sequenced() as connection:
                connection.settimeout(None if word == "drain" else patience)
                connection.connect(os.fspath(path))
                connection.send(word.encode())
                answer = connection.recv(_LONGEST_WORD)
            if answer:
                return answer.decode()
        except (ConnectionError, FileNotFoundError):
            pass
        if time.monotonic() > end:
            raise OSError(errno.ETIMEDOUT, f"{path}: no keeper answers")
        time.sleep(_PAUSE)


def resume(path: Path) -> socket.socket | None:
    """Return the connection of this session, whose keeper has died, to the next one; None while it is not there.

    Raises UserError where another session has taken the mount.
    """
    connection = _sequenced()
    connection.settimeout(_PATIENCE)
    try:
        connection.connect(os.fspath(path))
        connection.send(b"resume")
        word = connection.recv(_LONGEST_WORD)
    except OSError:
        word = b""
    if word == b"ok":
        connection.settimeout(None)
        return connection
    connection.close()
    if word:
        raise errors.UserError("another session serves this mount")
    return None


def is_alive(pid: int, start: int) -> bool:
    """Return whether process `pid`, which began at `start` (clock ticks since boot), still runs."""
    found = ending.state_and_start(pid)
    return found is not None and found[0] not in "ZX" and found[1] == start


def adopt(path: Path) -> tuple[socket.socket, Descriptors]:
    """Become the session of the keeper that listens on `path`.

    Returns the connection and every descriptor. Raises UserError where there is no keeper or it has a
    session that lives.
    """
    connection = _sequenced()
    try:
        connection.connect(os.fspath(path))
        connection.send(b"session")
        word, fds, _, _ = socket.recv_fds(connection, _LONGEST_WORD, 8)
    except OSError as error:
        connection.close()
        reason = (
            "nothing to adopt" if isinstance(error, FileNotFoundError) else errors.reason(error)
        )
        raise errors.UserError(f"{path}: {reason}") from None
    if word != b"ok" or len(fds) < 5:
        connection.close()
        for fd in fds:
            os.close(fd)
        pid = word.decode().partition(" ")[2]
        raise errors.UserError(f"a session serves this mount already (process {pid})")
    for fd in fds:
        os.set_inheritable(fd, False)
    peer, session = (socket.socket(fileno=fd) for fd in fds[:2])
    memory, fuse, live, *direct = fds[2:]
    return connection, Descriptors(memory, session, peer, fuse, live, direct[0] if direct else -1)


def pair(buffer: int) -> tuple[socket.socket, socket.socket]:
    """Return the two ends of the control requests' way, each with room for `buffer` bytes if it may."""
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    so_sndbufforce = 32
    for end in ends:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
        if os.geteuid() == 0:
            # Above net.core.wmem_max, which is 208 KiB on most machines.
            with contextlib.suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, so_sndbufforce, buffer)
    return ends


def room(end: socket.socket) -> int:
    """Return the bytes of data that a packet may carry beside its header: whole pages."""
    whole = end.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) // mmap.PAGESIZE - 2
    return max(whole, 1) * mmap.PAGESIZE
