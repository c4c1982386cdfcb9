# SPDX-License-Identifier: Apache-2.0
"""Folders in the temporary directory that only we can enter, and that a killed process leaves no trace of.

    posthoc-image-XXXX/      mode 0700
        lock                 locked (flock(2)) by the process it belongs to, as long as that lives
        ...

Nothing runs when a process is killed; its folders are removed when the next one is made by anybody who may.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile

_PREFIX = "posthoc-image-"
_LOCK = "lock"
# sockaddr_un holds 107 bytes (unix(7)): a socket's path has to be short.
_LONGEST_PARENT = 80


class Folder:
    """A new private folder, removed by `remove`."""

    def __init__(self) -> None:
        """Make it. Raises OSError."""
        parent = tempfile.gettempdir()
        if len(parent) > _LONGEST_PARENT:
            parent = "/tmp"
        _remove_abandoned(parent)
        while True:
            self.path = tempfile.mkdtemp(prefix=_PREFIX, dir=parent)
            lock = _lock(self.path, os.O_CREAT)
            if lock is not None:
                self._lock = lock
                return
            # Taken for abandoned by somebody else in the moment before it was locked, and removed.

    def remove(self) -> None:
        """Remove it with all that is in it. May be called more than once."""
        if self._lock >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1


def _lock(folder: str, flags: int = 0) -> int | None:
    """Return the descriptor that holds the folder's lock, None where somebody else has it or it is gone."""
    try:
        fd = os.open(os.path.join(folder, _LOCK), os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | flags)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(fd).st_nlink:
            return fd
    except OSError:
        pass
    os.close(fd)
    return None


def _remove_abandoned(parent: str) -> None:
    """Remove the folders whose processes have died; those of other users cannot be entered and stay."""
    with contextlib.suppress(OSError):
        names = [name for name in os.listdir(parent) if name.startswith(_PREFIX)]
        for folder in (os.path.join(parent, name) for name in names):
            lock = _lock(folder)
            if lock is not None:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(lock)
