# SPDX-License-Identifier: Apache-2.0
"""The size of a VHD ("vpc"): a disk made from another is rounded up to whole cylinders.

    disk      |data                    |
    vpc       |data                    |zeros|      up to a cylinder of 16 heads and 255 sectors

Source: block/vpc.c in QEMU ("calculate_geometry"); the disk's own size is not kept anywhere in the file.
"""

from __future__ import annotations

from collections.abc import Iterator

from dirtymap import extent, units
from dirtymap.images import base, export

_CYLINDER = 16 * 255 * 512


class Cut:
    """The first `size` bytes of an image, which stays its owner's."""

    def __init__(self, image: base.Image, size: int) -> None:
        self.name = image.name
        self.size = size
        self._image = image

    def read_into(self, start: int, buffer: memoryview) -> None:
        """Fill `buffer`; raises OSError."""
        self._image.read_into(start, buffer)

    def extents(
        self, start: int, length: int, deadline: float | None = None
    ) -> Iterator[extent.Extent]:
        """Yield the image's extents."""
        return self._image.extents(start, length, deadline)

    def close(self) -> None:
        """Nothing: the image is closed by who opened it."""


def fit(reference: base.Image, size: int) -> tuple[base.Image, str | None]:
    """Return `reference` as that of a live disk of `size` bytes, and what the user should know.

    Only a vpc is cut, by less than a cylinder, and only where what is cut off is zeros. Raises OSError.
    """
    beyond = reference.size - size
    if not _is_vpc(reference) or not 0 < beyond < _CYLINDER:
        return reference, None
    tail = bytearray(beyond)
    reference.read_into(size, memoryview(tail))
    if any(tail):
        return reference, None
    note = (
        f"{reference.name} is {units.describe(beyond)} longer than the live disk, as its format rounds "
        "sizes: these are zeros and left out"
    )
    return Cut(reference, size), note


def _is_vpc(image: base.Image) -> bool:
    if not isinstance(image, export.NbdImage) or image.server is None:
        return False
    return image.server.layers[0].driver == "vpc"
