# SPDX-License-Identifier: Apache-2.0
"""The files beside the disk in the mount: status, status.json, dirty.qcow2, control."""

from __future__ import annotations

import errno
import logging
from collections.abc import Awaitable, Callable

import trio

from dirtymap import errors
from dirtymap.qcow2 import carrier
from overlayfs import filesystem

log = logging.getLogger(__name__)


# What a status has about, before anybody has opened it.
_USUAL_LENGTH = 1024


class Report:
    """A file whose text is made when it is opened."""

    mode = 0o444

    def __init__(self, name: str, make: Callable[[], Awaitable[str]]) -> None:
        self.name = name
        self._make = make
        self._length = _USUAL_LENGTH

    def length(self) -> int:
        """Return the last text's length: a look at the folder must not cost what reading does."""
        return self._length

    async def open(self) -> filesystem.Content:
        """Return the text as of now."""
        text = filesystem.Text((await self._make()).encode())
        self._length = text.length
        return text

    def write(self, data: bytes) -> None:
        """Refuse: it is for reading."""
        raise OSError(errno.EACCES, "for reading only")


class DirtyMap:
    """The dirty map as a carrier, made when it is opened and fixed for its opener."""

    name = "dirty.qcow2"
    mode = 0o444

    def __init__(self, make: Callable[[], carrier.Carrier], length: int) -> None:
        """`make` is called in a thread: the maps of large disks take long to copy."""
        self._make = make
        self._length = length

    def length(self) -> int:
        """Return the length, the same for every map of the disk: openers ask before they read."""
        return self._length

    async def open(self) -> filesystem.Content:
        """Return the carrier of the map, in which all is that was written before the call."""
        return await trio.to_thread.run_sync(self._make)

    def write(self, data: bytes) -> None:
        """Refuse: it is for reading."""
        raise OSError(errno.EACCES, "for reading only")


class Control:
    """The file that takes commands; a wrong one is EINVAL for its writer and a line in the log."""

    name = "control"
    mode = 0o200

    def __init__(self, obey: Callable[[str], None]) -> None:
        self._obey = obey

    def length(self) -> int:
        """It holds nothing."""
        return 0

    async def open(self) -> filesystem.Content:
        """It has nothing to read."""
        return filesystem.Text(b"")

    def write(self, data: bytes) -> None:
        """Carry out the commands in `data`."""
        try:
            self._obey(data.decode("ascii"))
        except (errors.UserError, UnicodeDecodeError) as error:
            log.warning("control refused: %s", error)
            raise OSError(errno.EINVAL, "no command") from None
