# SPDX-License-Identifier: Apache-2.0
"""The map on disk that a mount was asked for (--output), and whether writing it went well."""

from __future__ import annotations

import logging

from dirtymap import bitmap, errors
from dirtymap.qcow2 import carrier

log = logging.getLogger(__name__)


class Output:
    """The map at `path` under the name `bitmap_name`; None is no map. Used by worker threads, one at a time."""

    def __init__(self, path: str | None, bitmap_name: str) -> None:
        self._path = path
        self._bitmap = bitmap_name
        self.failure: str | None = None
        self._done = False

    def write(self, dirty: bitmap.Bitmap) -> None:
        """Replace the map by `dirty`; a failure is logged and told in `failure`."""
        if self._path is None:
            return
        try:
            carrier.write(self._path, dirty, self._bitmap)
        except (errors.UserError, OSError) as error:
            self.failure = errors.reason(error)
            log.error("the map is not safely written: %s", self.failure)
        else:
            self.failure = None
            self._done = True
            log.info("map written path=%s dirty=%d", self._path, dirty.dirty_bytes())

    @property
    def state(self) -> str | None:
        """What `status` says of it, or None where no map was asked for."""
        if self._path is None:
            return None
        if self.failure:
            return f"failed: {self.failure}"
        return f"{self._path} ({'written' if self._done else 'not written yet'})"
