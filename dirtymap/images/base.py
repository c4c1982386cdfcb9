# SPDX-License-Identifier: Apache-2.0
"""What every image can do, whatever stands behind it.

All calls block and are made in worker threads, from several threads at once. An I/O error is an OSError
with its errno; whoever opened an image closes it.
"""

import errno
from collections.abc import Iterator
from typing import Protocol, runtime_checkable

from dirtymap import extent


class GoneError(OSError):
    """The image cannot be reached any more: no further read of it can succeed."""

    def __init__(self, reason: str) -> None:
        super().__init__(errno.ENOTCONN, reason)


class Image(Protocol):
    """A disk's contents: `size` bytes that can be read."""

    @property
    def name(self) -> str:
        """The image as the user wrote it."""

    @property
    def size(self) -> int:
        """Bytes, constant while the image is open."""

    def read_into(self, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes from `start` on, all within the image.

        Raises OSError if any of them cannot be read; the buffer's contents are then undefined.
        """

    def extents(
        self, start: int, length: int, deadline: float | None = None
    ) -> Iterator[extent.Extent]:
        """Yield extents that cover exactly [start, start + length), in order.

        `zero` is set only where the bytes surely read as zeros at the time of asking; any doubt, an
        error, or `deadline` (time.monotonic() seconds) having passed makes the rest data.
        """

    def close(self) -> None:
        """Let go of everything the image holds. May be called more than once."""


@runtime_checkable
class WritableImage(Image, Protocol):
    """An image that a guest's writes go to."""

    def write(self, start: int, buffer: bytes | memoryview) -> None:
        """Write all of `buffer` at `start`; after an OSError any part of it may have been written."""

    def flush(self, datasync: bool = True) -> None:
        """Return when everything written before is on stable storage."""


@runtime_checkable
class DistantImage(Image, Protocol):
    """An image whose every answer is waited for: the more is asked for at once, the less that costs."""

    at_once: int
    """Bytes of one read that keep as many requests in flight as it may have."""


@runtime_checkable
class ZeroingImage(WritableImage, Protocol):
    """One that can make zeros without being sent them. Both calls fail as `write` does."""

    def zero(self, start: int, length: int) -> None:
        """Make the bytes read as zeros and keep their space."""

    def discard(self, start: int, length: int) -> None:
        """Make the bytes read as zeros and give up their space where that can be."""


@runtime_checkable
class CachedImage(Image, Protocol):
    """One that lies in this machine's page cache, which its `read_into` leaves as it was."""

    def read(self, start: int, length: int) -> bytes:
        """Return the bytes from `start` on, through the page cache, as a guest reads. Raises OSError."""


@runtime_checkable
class CopiedImage(Image, Protocol):
    """One whose bytes may lie in this machine's memory, where reading them is copying."""

    def read_gently(self, start: int, buffer: memoryview) -> None:
        """Fill `buffer` as `read_into` does, in copies so short that whoever waits for the CPU gets it in between."""


@runtime_checkable
class HashedImage(Image, Protocol):
    """A reference of which only hashes are known: it answers whether bytes are the same."""

    @property
    def granularity(self) -> int:
        """Bytes that one hash stands for."""

    def equal(self, segment: int, data: memoryview) -> bool:
        """Return whether `data` is surely what segment number `segment` (of its granularity) held."""
