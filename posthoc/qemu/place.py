# SPDX-License-Identifier: Apache-2.0
"""The private folder in which posthoc and QEMU meet: a socket of QEMU's, map files of posthoc's.

    PARENT/posthoc-attach-TOKEN/     posthoc's; everybody may pass, nobody else may look or write
        lock                         locked (flock) as long as the session lives, however it ends
        nbd/s                        the NBD server's socket; the folder is QEMU's, mode 0700
        N.qcow2                      carriers; posthoc's, QEMU's user may read them

QEMU often runs as a user of its own. Its folder is apart from posthoc's files, so that root writes nothing
where another user could put a link.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pathlib
import re
import secrets
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

import trio

from dirtymap import errors
from posthoc.qemu import qmp

_FOLDER = re.compile(r"posthoc-attach-([0-9a-f]{8})")
# sockaddr_un.sun_path less its final zero (unix(7)).
_LONGEST_SOCKET_PATH = 107
# Seconds that a dying QEMU may take to let go of its sockets, and between two looks.
_PATIENCE = 10.0
_PAUSE = 0.02


@dataclass(frozen=True)
class Place:
    """A session's private folder."""

    folder: pathlib.Path
    token: str
    qemu: qmp.Peer | None

    @property
    def socket(self) -> str:
        """Where QEMU's NBD server shall listen."""
        return str(self.folder / "nbd" / "s")

    def carrier(self, number: int) -> pathlib.Path:
        """Where the map of disk `number` goes."""
        return self.folder / f"{number}.qcow2"

    def give_to_qemu(self, path: pathlib.Path) -> None:
        """Let QEMU's user read `path`, which posthoc made."""
        if self.qemu is not None and os.geteuid() == 0:
            os.chown(path, self.qemu.uid, self.qemu.gid, follow_symlinks=False)


@contextlib.asynccontextmanager
async def made(parent: str | None, qemu: qmp.Peer | None) -> AsyncIterator[Place]:
    """Make the private folder in `parent` (None: the folder for temporary files); remove it at the end.

    `qemu` is the process that must reach it. A folder in which an NBD server still listens at the end
    (its QEMU runs, and could not be told to stop it) is kept: by it the next session knows whose server
    that is. Raises UserError where no folder can be had.
    """
    if qemu is not None and os.geteuid() not in (0, qemu.uid):
        raise errors.UserError(
            f"QEMU (process {qemu.pid}) runs as user {qemu.uid}: run posthoc as that user or as root"
        )
    where = parent_folder(parent)
    if not has_room(str(where)):
        raise errors.UserError(
            f"{where}: too long a path for a socket in it: name another folder with --directory"
        )
    token = secrets.token_hex(4)
    place = Place(where / f"posthoc-attach-{token}", token, qemu)
    try:
        place.folder.mkdir(mode=0o711)
    except OSError as error:
        raise errors.UserError(f"{where}: {errors.reason(error)}") from error
    try:
        with _locked(place.folder):
            place.folder.chmod(0o711)  # whatever the umask
            _make_socket_folder(place)
            yield place
    finally:
        if not await _is_served(place):
            shutil.rmtree(place.folder, ignore_errors=True)


def has_room(parent: str) -> bool:
    """Return whether the path of `parent` is short enough for a socket below it."""
    return len(os.fsencode(parent) + b"/posthoc-attach-01234567/nbd/s") <= _LONGEST_SOCKET_PATH


async def _is_served(place: Place) -> bool:
    """Return whether somebody listens on the socket. A QEMU on its way out may do so for a moment yet."""
    with trio.move_on_after(_PATIENCE, shield=True):
        while True:
            try:
                stream = await trio.open_unix_socket(place.socket)
            except OSError:
                return False
            await stream.aclose()
            await trio.sleep(_PAUSE)
    return True


def parent_folder(parent: str | None) -> pathlib.Path:
    """Return the folder in which private folders are made."""
    return pathlib.Path(os.path.abspath(parent or tempfile.gettempdir()))


def _make_socket_folder(place: Place) -> None:
    folder = place.folder / "nbd"
    folder.mkdir(mode=0o700)
    place.give_to_qemu(folder)


@contextlib.contextmanager
def _locked(folder: pathlib.Path) -> Iterator[None]:
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def is_alive(parent: str | None, token: str) -> bool:
    """Return whether the session of `token`, which worked in `parent`, is at work."""
    lock = parent_folder(parent) / f"posthoc-attach-{token}" / "lock"
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    except OSError:
        return True  # another user's: not ours to say that it is dead
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def has_socket(parent: str | None, token: str) -> bool:
    """Return whether an NBD server listens, or did until its QEMU was killed, for that session."""
    return os.path.lexists(parent_folder(parent) / f"posthoc-attach-{token}" / "nbd" / "s")


def remove_dead(parent: str | None) -> None:
    """Remove the private folders of sessions that were killed; those of living ones are locked."""
    for folder in parent_folder(parent).glob("posthoc-attach-*"):
        match = _FOLDER.fullmatch(folder.name)
        # Without a lock file it is being made, or being removed, at this moment.
        if match and _is_ours(folder / "lock") and not is_alive(parent, match[1]):
            shutil.rmtree(folder, ignore_errors=True)


def _is_ours(path: pathlib.Path) -> bool:
    try:
        return path.lstat().st_uid == os.geteuid()
    except OSError:
        return False
