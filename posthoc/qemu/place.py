# SPDX-License-Identifier: Apache-2.0
"""The private folder in which posthoc and QEMU meet: a socket of QEMU's, map files of posthoc's.

    PARENT/posthoc-attach-TOKEN/     posthoc's; everybody may pass, nobody else may look or write
        nbd/s                        the NBD server's socket; the folder is QEMU's, mode 0700
        N.qcow2                      carriers; posthoc's, QEMU's user may read them

QEMU often runs as a user of its own. Its folder is apart from posthoc's files, so that root writes nothing
where another user could put a link.

A session lives as long as it holds the abstract unix socket (unix(7)) named after its token: that needs no
folder to look in, and ends with the process, however that ends.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import re
import secrets
import shutil
import socket
import stat
import tempfile
from collections.abc import AsyncIterator
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
    with _living(token):
        try:
            place.folder.mkdir(mode=0o711)
        except OSError as error:
            raise errors.UserError(f"{where}: {errors.reason(error)}") from error
        try:
            place.folder.chmod(0o711)  # whatever the umask
            _make_socket_folder(place)
            yield place
        finally:
            if not await _is_served(place):
                remove(place.folder)


def has_room(parent: str) -> bool:
    """Return whether the path of `parent` is short enough for a socket below it."""
    return len(os.fsencode(parent) + b"/posthoc-attach-01234567/nbd/s") <= _LONGEST_SOCKET_PATH


async def _is_served(place: Place) -> bool:
    """Return whether somebody listens on the socket. A QEMU on its way out may do so for a moment yet."""
    with trio.move_on_after(_PATIENCE, shield=True):
        while True:
            if not _listens(place.folder):
                return False
            await trio.sleep(_PAUSE)
    return True


def _listens(folder: pathlib.Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        client.setblocking(False)
        # EAGAIN: so many wait already (unix(7)).
        return client.connect_ex(os.fspath(folder / "nbd" / "s")) in (0, errno.EAGAIN)


def parent_folder(parent: str | None) -> pathlib.Path:
    """Return the folder in which private folders are made."""
    return pathlib.Path(os.path.abspath(parent or tempfile.gettempdir()))


def _make_socket_folder(place: Place) -> None:
    folder = place.folder / "nbd"
    folder.mkdir(mode=0o700)
    place.give_to_qemu(folder)


def _living(token: str) -> socket.socket:
    """Hold the sign of life of `token`; OSError while somebody does already."""
    sign = socket.socket(socket.AF_UNIX)
    try:
        sign.bind(f"\0posthoc-attach-{token}")
    except OSError:
        sign.close()
        raise
    return sign


def is_alive(token: str) -> bool:
    """Return whether the session of `token` is at work."""
    try:
        _living(token).close()
    except OSError:
        return True
    return False


def has_socket(folder: pathlib.Path) -> bool:
    """Return whether an NBD server listens in the private folder, or did until its QEMU was killed."""
    return os.path.lexists(folder / "nbd" / "s")


def remove(folder: pathlib.Path) -> None:
    """Remove a private folder, if it is one and this user's."""
    if _FOLDER.fullmatch(folder.name) and _is_ours(folder):
        shutil.rmtree(folder, ignore_errors=True)


def remove_dead(parent: str | None) -> None:
    """Remove the private folders of sessions that were killed, of whichever QEMU.

    One in which a server listens stays: by it its QEMU's next session knows whose server that is.
    """
    for folder in parent_folder(parent).glob("posthoc-attach-*"):
        match = _FOLDER.fullmatch(folder.name)
        if match and not is_alive(match[1]) and not _listens(folder):
            remove(folder)


def _is_ours(folder: pathlib.Path) -> bool:
    try:
        status = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
