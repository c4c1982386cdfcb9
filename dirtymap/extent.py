# SPDX-License-Identifier: Apache-2.0
"""Extents: runs of bytes of which one thing is known.

`zero` is a promise (these bytes read as zeros), `hole` an observation (nothing is allocated here;
what is read instead may come from a backing file), `dirty` a mark in a map.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar


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


class Span(Protocol):
    """Whatever has a first byte, and a first byte behind."""

    @property
    def start(self) -> int:
        """The first byte."""

    @property
    def end(self) -> int:
        """The first byte behind."""


A = TypeVar("A", bound=Span)


def overlaps(one: Iterable[A], other: Iterable[A]) -> Iterator[tuple[int, int, A, A]]:
    """Yield (start, end, a, b) wherever an `a` of one and a `b` of the other overlap; both are in order."""
    left, right = iter(one), iter(other)
    a, b = next(left, None), next(right, None)
    while a is not None and b is not None:
        start, end = max(a.start, b.start), min(a.end, b.end)
        if start < end:
            yield start, end, a, b
        if a.end <= b.end:
            a = next(left, None)
        else:
            b = next(right, None)
