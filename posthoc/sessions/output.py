# SPDX-License-Identifier: Apache-2.0
"""The map on disk that a mount was asked for (--output).

    nothing, or an older map -> [in use] -> complete: written -> [in use] -> the mount has ended: written

Whatever stands there when everything dies must not say too little. A map that was written is right until the
dirty map outgrows it; from then on the file is one whose bitmap is in use: every reader refuses it, QEMU too.
An older map is somebody's, and not this mount's: as soon as the mount stands, it is replaced by one in use. Where
there is no room for a file that says so, the one that says too little is removed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable

from dirtymap import bitmap, errors
from dirtymap.qcow2 import carrier

log = logging.getLogger(__name__)


class Output:
    """The map at `path` under the name `bitmap_name`; None is no map. Used by worker threads."""

    def __init__(self, path: str | None, bitmap_name: str) -> None:
        self._path = path
        self._bitmap = bitmap_name
        self.failure: str | None = None
        # What the file says, as long as that is all there is to say; guarded, with the file, by the lock.
        self._said: bitmap.Bitmap | None = None
        self._condition = "not written yet"
        # The file of ours that stands there, if it does: no other is ever removed.
        self._ours: tuple[int, int] | None = None
        self._lock = threading.Lock()

    def begin(self, dirty: bitmap.Bitmap) -> None:
        """Replace what stands there from former times by a map that is in use; nothing is made of nothing."""
        if self._path is not None and os.path.lexists(self._path):
            with self._lock:
                with contextlib.suppress(errors.UserError, OSError):
                    carrier.check_target(self._path)
                    self._ours = _identity(self._path)
                self._mark(self._path, dirty)

    def write(self, dirty: bitmap.Bitmap) -> None:
        """Replace the map by `dirty`, which must not change any more; a failure is told in `failure`."""
        if self._path is None:
            return
        with self._lock:
            if self._put(self._path, dirty, in_use=False):
                self._said, self._condition = dirty, "written"
                log.info("map written path=%s dirty=%d", self._path, dirty.dirty_bytes())
            elif self._is_outgrown_by(dirty):
                self._remove(self._path)

    def check(self, now: Callable[[], bitmap.Bitmap]) -> None:
        """Mark the map as in use if it lacks anything of the dirty map that `now` returns."""
        if self._path is None or self._said is None:
            return
        with self._lock:
            dirty = now()
            if self._is_outgrown_by(dirty):
                self._mark(self._path, dirty)
                self._condition = "in use: it lacks what came after it; written again at the end"

    def _is_outgrown_by(self, dirty: bitmap.Bitmap) -> bool:
        """Return whether `dirty` has a segment that the file, so far believed, has not."""
        return self._said is not None and bool((dirty.data & ~self._said.data).any())

    def _mark(self, path: str, dirty: bitmap.Bitmap) -> None:
        self._said = None
        if not self._put(path, dirty, in_use=True):
            self._remove(path)

    def _put(self, path: str, dirty: bitmap.Bitmap, *, in_use: bool) -> bool:
        try:
            carrier.write(path, dirty, self._bitmap, in_use=in_use)
        except (errors.UserError, OSError) as error:
            self.failure = errors.reason(error)
            log.error("the map is not safely written: %s", self.failure)
            return False
        self.failure = None
        self._ours = _identity(path)
        return True

    def _remove(self, path: str) -> None:
        self._said = None
        with contextlib.suppress(OSError):
            # Not what somebody has put in its place, nor the next map, which may be there and only not be synced.
            if _identity(path) == self._ours:
                os.unlink(path)
                log.error("the map that says too little is removed path=%s", path)

    @property
    def state(self) -> str | None:
        """What `status` says of it, or None where no map was asked for."""
        if self._path is None:
            return None
        if self.failure:
            return f"failed: {self.failure}"
        return f"{self._path} ({self._condition})"


def _identity(path: str) -> tuple[int, int] | None:
    """Return what tells a file from another of its name; None where there is none."""
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino
