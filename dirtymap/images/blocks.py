# SPDX-License-Identifier: Apache-2.0
"""Requests in whole blocks, for servers that take no other.

request       ........xxxxxxxxxxxxxxxxxxxxxxxxx.......
blocks        |.......|.......|.......|.......|.......|
around                ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^    (reading: rounded outwards)
split                 [ whole, whole, whole  ][part]      (writing: the rest is read-modify-write)
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


def around(start: int, length: int, block: int, size: int) -> tuple[int, int]:
    """Return (start, length) rounded outwards to blocks; the image's end stays its end."""
    first = start // block * block
    end = min(-(-(start + length) // block) * block, max(size, start + length))
    return first, end - first


@dataclass(frozen=True)
class Split:
    """A range as its whole blocks, if any, and the parts of blocks before and behind them."""

    whole: tuple[int, int] | None
    partial: tuple[tuple[int, int], ...]


def split(start: int, length: int, block: int, size: int) -> Split:
    """Return [start, start + length) split at blocks; a last block cut short by `size` is a whole one."""
    end = start + length
    first = -(-start // block) * block
    last = end if end == size else end // block * block
    if first >= last:
        # Within one block, or over the border of two without filling either.
        middle = min(first, end)
        parts = ((start, middle - start), (middle, end - middle))
        return Split(None, tuple(part for part in parts if part[1] > 0))
    parts = ((start, first - start), (last, end - last))
    return Split((first, last - first), tuple(part for part in parts if part[1] > 0))


class Lock:
    """Many writers of whole blocks at once, or one that rewrites a part of a block.

    Read-modify-write is no single operation for the server: a write into the same block between its two
    halves would be undone by the second. Whoever waits to be alone goes before newcomers.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._sharing = 0
        self._waiting = 0
        self._alone = False

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Hold off whoever wants to be alone."""
        with self._changed:
            self._changed.wait_for(lambda: not (self._alone or self._waiting))
            self._sharing += 1
        try:
            yield
        finally:
            with self._changed:
                self._sharing -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold off everybody else."""
        with self._changed:
            self._waiting += 1
            try:
                self._changed.wait_for(lambda: not (self._alone or self._sharing))
                self._alone = True
            finally:
                self._waiting -= 1
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._alone = False
                self._changed.notify_all()
