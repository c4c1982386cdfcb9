# SPDX-License-Identifier: Apache-2.0
"""Extents: runs of bytes of which one thing is known.

`zero` is a promise (these bytes read as zeros), `hole` an observation (nothing is allocated here;
what is read instead may come from a backing file), `dirty` a mark in a map.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Extent:
    """Bytes [start, start + length) and what is known of them."""

    start: int
    length: int
    zero: bool = False
    hole: bool = False
    dirty: bool = False

    @property
    def end(self) -> int:
        """The first byte behind."""
        return self.start + self.length

    @property
    def flags(self) -> tuple[bool, bool, bool]:
        """What neighbours must share to become one extent."""
        return (self.zero, self.hole, self.dirty)


def data(start: int, length: int) -> Extent:
    """Return the extent of which nothing is known: it has to be read."""
    return Extent(start, length)


def join(extents: Iterable[Extent]) -> Iterator[Extent]:
    """Yield `extents`, which are in order, with touching neighbours of equal flags made one."""
    current: Extent | None = None
    for extent in extents:
        if extent.length == 0:
            continue
        if current is not None and current.end == extent.start and current.flags == extent.flags:
            current = replace(current, length=current.length + extent.length)
            continue
        if current is not None:
            yield current
        current = extent
    if current is not None:
        yield current
