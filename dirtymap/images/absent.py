# SPDX-License-Identifier: Apache-2.0
"""An image that is not there any more: every read says so."""

from __future__ import annotations

from collections.abc import Iterator

from dirtymap import extent
from dirtymap.images import base


class AbsentImage:
    """Stands for the reference of a mount that is adopted after its reference has gone.

    A scan against it ends as failed at its first read; the map of what was decided before stays valid.
    """

    def __init__(self, name: str, size: int, reason: str) -> None:
        self.name = name
        self.size = size
        self._reason = reason

    def read_into(self, start: int, buffer: memoryview) -> None:
        """Raise GoneError."""
        raise base.GoneError(self._reason)

    def extents(
        self, start: int, length: int, deadline: float | None = None
    ) -> Iterator[extent.Extent]:
        """Nothing is known: all is data."""
        yield extent.data(start, length)

    def close(self) -> None:
        """There is nothing to close."""
