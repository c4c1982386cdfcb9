# SPDX-License-Identifier: Apache-2.0
"""Sizes that a format or a server rounds up: the same disk, and zeros behind it.

    disk      |data                    |
    vpc       |data                    |zeros|      a VHD: up to a cylinder of 16 heads and 255 sectors
    NBD       |data                    |z|          QEMU's servers: up to a sector
    digest    |hashes                  |zeros|      of either

Source for VHD: block/vpc.c in QEMU ("calculate_geometry"); the disk's own size is kept nowhere in the file.
"""

from __future__ import annotations

from collections.abc import Iterator

from dirtymap import extent, units
from dirtymap.images import base, export

_SECTOR = 512
_CYLINDER = 16 * 255 * _SECTOR


class Cut:
    """The first `size` bytes of an image, which stays its owner's."""

    def __init__(self, image: base.Image, size: int) -> None:
        self.name = image.name
        self.size = size
        self._image = image

    def read_into(self, start: int, buffer: memoryview) -> None:
        """Fill `buffer`; raises OSError."""
        self._image.read_into(start, buffer)

    def read_gently(self, start: int, buffer: memoryview) -> None:
        """Fill `buffer`, in short copies where the image can; raises OSError."""
        if isinstance(self._image, base.CopiedImage):
            self._image.read_gently(start, buffer)
        else:
            self._image.read_into(start, buffer)

    def extents(
        self, start: int, length: int, deadline: float | None = None
    ) -> Iterator[extent.Extent]:
        """Yield the image's extents."""
        return self._image.extents(start, length, deadline)

    def close(self) -> None:
        """Nothing: the image is closed by who opened it."""


class CutHashes(Cut):
    """The same of a reference of hashes, whose bytes from `size` on are known to be zeros."""

    def __init__(self, image: base.HashedImage, size: int) -> None:
        super().__init__(image, size)
        self.granularity = image.granularity
        self._hashed = image

    def equal(self, segment: int, data: memoryview) -> bool:
        """Return whether `data` is what the segment held within `size`; raises OSError."""
        start = segment * self.granularity
        length = min(self.granularity, self._hashed.size - start)
        if len(data) < length:
            # The last one: its hash is of the zeros behind it, too.
            data = memoryview(bytes(data) + bytes(length - len(data)))
        return self._hashed.equal(segment, data)


def fit(reference: base.Image, size: int) -> tuple[base.Image, str | None]:
    """Return `reference` as that of a live disk of `size` bytes, and what the user should know.

    It is cut by less than a cylinder (vpc, and hashes, which may be of one) or a sector (other exports), and
    only where what is cut off is zeros. Raises OSError.
    """
    beyond = reference.size - size
    if not 0 < beyond < _rounding(reference):
        return reference, None
    if isinstance(reference, base.HashedImage):
        if not all(found.zero for found in reference.extents(size, beyond)):
            return reference, None
        cut: Cut = CutHashes(reference, size)
    else:
        tail = bytearray(beyond)
        reference.read_into(size, memoryview(tail))
        if any(tail):
            return reference, None
        cut = Cut(reference, size)
    note = (
        f"{reference.name} is {units.describe(beyond)} longer than the live disk, because sizes "
        "are rounded up there: these zeros are left out"
    )
    return cut, note


def _rounding(image: base.Image) -> int:
    if isinstance(image, base.HashedImage):
        return _CYLINDER
    if not isinstance(image, export.NbdImage):
        return 0
    is_vpc = image.server is not None and image.server.layers[0].driver == "vpc"
    return _CYLINDER if is_vpc else _SECTOR
