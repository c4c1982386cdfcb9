# SPDX-License-Identifier: Apache-2.0
"""What a session leaves on disk while it runs, and what its end leaves for others to read.

    /run/posthoc/  or  $XDG_RUNTIME_DIR/posthoc/  or  /tmp/posthoc-UID/          0700, ours alone
        3f0c.../            one folder a mountpoint, named by a hash of its path
            lock            held (flock) as long as a session serves the mountpoint
            log             what it had to say after it went to the background
            keeper.sock     where the native data path's keeper answers
            end.json        exit code and message of the last session that ended here

The folder goes when `posthoc umount` has told of an end that was good.

No map is kept here: contents are the truth, and what was lost is read again.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from dirtymap import errors

# What is read back is small; a larger file is not ours.
_LONGEST = 1 << 20
# Bytes for a file that is written when there may be no room.
_RESERVED = 4096


@dataclass(frozen=True)
class End:
    """How a session ended: its exit code, and one line for whoever ends the mount, or nothing."""

    exit_code: int
    message: str


class Folder:
    """The private folder of the session at `mountpoint` (an absolute path), beneath `root` or where ours are."""

    def __init__(self, mountpoint: str, root: Path | None = None) -> None:
        self.mountpoint = mountpoint
        name = hashlib.sha256(os.fsencode(mountpoint)).hexdigest()[:16]
        self.path = (root or _root()) / name
        self._lock: int | None = None

    @property
    def log(self) -> Path:
        """Where a session in the background writes what it has to say."""
        return self.path / "log"

    def make(self) -> None:
        """Make the folder, private to this user; UserError where that cannot be."""
        try:
            for folder in (self.path.parent, self.path):
                _make_private(folder)
        except OSError as error:
            raise errors.UserError(
                f"{self.path}: a session's folder cannot be made: {errors.reason(error)}"
            ) from None

    def lock(self) -> None:
        """Become the session of this mountpoint until the process ends; UserError if one lives."""
        while self._lock is None:
            self.make()
            # What somebody discards between two of these calls is made again.
            with contextlib.suppress(FileNotFoundError):
                self._lock = self._try_lock()

    def _try_lock(self) -> int | None:
        """Return the lock's descriptor, None where to try again; UserError where a session has it."""
        fd = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            # Not where somebody only looks: is_served and wait_for_end share it for a moment.
            if self.is_served():
                raise errors.UserError(
                    f"{self.mountpoint}: another posthoc session serves it: end it with posthoc umount"
                ) from None
            return None
        if os.fstat(fd).st_nlink:
            return fd
        # Discarded by somebody between the two calls: what we hold locks nobody out.
        os.close(fd)
        return None

    def discard(self) -> None:
        """Remove the folder, unless a session lives here."""
        with contextlib.suppress(errors.UserError, OSError):
            self.lock()
            shutil.rmtree(self.path)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def discard_unused(self) -> None:
        """Remove the folder after a start that failed, unless somebody else has left something in it."""
        reserved = self._temporary("end.json").name
        left = {file.name for file in self.path.iterdir()} - {"lock", reserved}
        if left <= {"log"} and not (left and self.log.stat().st_size):
            self.discard()

    def begin_log(self) -> None:
        """Begin an empty log; everybody who writes to it appends."""
        os.close(os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600))

    def is_served(self) -> bool:
        """Return whether a session holds this folder, mounted or (after a lazy umount) not any more."""
        try:
            fd = os.open(self.path / "lock", os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(fd)
        return False

    def wait_for_end(self) -> None:
        """Return when no session holds this folder any more; a signal interrupts."""
        with contextlib.suppress(FileNotFoundError):
            fd = os.open(self.path / "lock", os.O_RDONLY | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_SH)
            finally:
                os.close(fd)

    def reserve(self, name: str) -> None:
        """Take now the room that `write` of this name needs: the disk may be full then. Raises UserError."""
        try:
            with self._new(name) as stream:
                stream.write(bytes(_RESERVED))
        except OSError as error:
            raise errors.UserError(
                f"{self.path}: what a session has to leave behind finds no room: {errors.reason(error)}"
            ) from None

    def write(self, name: str, facts: Mapping[str, Any]) -> None:
        """Replace the file `name` of this folder by `facts`, whole or not at all."""
        with self._new(name) as stream:
            stream.write(json.dumps(facts, indent=1).encode())
            stream.truncate()
        self._temporary(name).replace(self.path / name)

    def _temporary(self, name: str) -> Path:
        return self.path / f"{name}.new"

    def _new(self, name: str) -> BinaryIO:
        # Not truncated: what was reserved would be given back.
        fd = os.open(self._temporary(name), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        return os.fdopen(fd, "wb")

    def read(self, name: str) -> dict[str, Any] | None:
        """Return the facts in the file `name`, or None where there are none to be had."""
        try:
            with open(self.path / name, "rb") as stream:
                facts = json.loads(stream.read(_LONGEST))
        except (OSError, ValueError):
            return None
        return facts if isinstance(facts, dict) else None

    def remove(self, name: str) -> None:
        """Remove the file `name` if it is there."""
        (self.path / name).unlink(missing_ok=True)

    def end(self) -> End | None:
        """Return how the last session here ended, if it got to say so."""
        facts = self.read("end.json")
        if facts is None:
            return None
        code, message = facts.get("exit_code"), facts.get("message")
        if not isinstance(code, int) or not isinstance(message, str):
            return None
        return End(code, message)


def find(mountpoint: str, owner: int) -> Folder | None:
    """Return the folder of the session that `owner` has for `mountpoint`: of one that lives, else of one that died.

    Root may look for another user's, and a user for what was mounted with another XDG_RUNTIME_DIR. A folder that
    tells of an end belongs to an earlier session: whoever begins removes that. None where there is nothing.
    """
    ours = []
    for folder in (Folder(mountpoint, root) for root in _roots(owner)):
        with contextlib.suppress(OSError):
            if _is_private(folder.path, owner):
                ours.append(folder)
    dead = [folder for folder in ours if folder.end() is None]
    return next(iter([*filter(Folder.is_served, ours), *dead]), None)


def _root() -> Path:
    # A job of cron's has no XDG_RUNTIME_DIR, and must find what was mounted from a terminal.
    return next(root for root in _roots(os.geteuid()) if root.parent.is_dir())


def _roots(owner: int) -> list[Path]:
    """Return where the sessions of a user keep their folders, the best first."""
    if owner == 0:
        return [Path("/run/posthoc")]
    named = os.environ.get("XDG_RUNTIME_DIR") if owner == os.geteuid() else None
    runtime = [Path(folder, "posthoc") for folder in (named, f"/run/user/{owner}") if folder]
    return [*runtime, Path(f"/tmp/posthoc-{owner}")]


def _is_private(folder: Path, owner: int) -> bool:
    """Return whether the folder is `owner`'s alone; raises OSError where it is not there."""
    status = folder.lstat()
    private = stat.S_ISDIR(status.st_mode) and status.st_uid == owner
    return private and not stat.S_IMODE(status.st_mode) & 0o077


def _make_private(folder: Path) -> None:
    while True:
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        # It may have been there and be discarded by now.
        with contextlib.suppress(FileNotFoundError):
            _check_private(folder)
            return


def _check_private(folder: Path) -> None:
    """Refuse a folder that somebody else made, or can write, or that is only a link."""
    if not _is_private(folder, os.geteuid()):
        raise errors.UserError(f"{folder}: is not a private folder of this user: remove it")
