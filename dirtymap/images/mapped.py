# SPDX-License-Identifier: Apache-2.0
"""Reading a format's bytes straight from its files, where `qemu-img map` says at which offset they are.

    guest        |  A  |  B  | zeros |  C  |  D  |
    map          base.raw  top.qcow2   -   top.qcow2   no offset: compressed, encrypted
    read by      pread     pread     memset  pread     qemu-nbd

Through qemu-nbd every byte is copied twice more, by a process that needs a core of its own. The map is QEMU's
own and asked for in windows as they are needed; what it does not place, and whatever fails here, is read
through qemu-nbd. It holds as long as nobody writes the chain. For that stand our qemu-nbd's locks on every
layer of a format, and on raw ones those that are held beside it (qemu_nbd.py); they keep out whoever asks for
such locks, QEMU and posthoc. An image opened for writing is never read this way.
"""

from __future__ import annotations

import errno
import json
import os
import subprocess
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dirtymap.images import base, chain, export, nbd, pagecache, qemu_img

# Formats whose data clusters lie in the file that is named, and nowhere else. A vmdk may have its data in
# files of their own, which the map's JSON does not name.
_DRIVERS = frozenset(("qcow2", "raw", "vdi"))

# Guest bytes mapped at once: at most so many clusters, 4 MB of JSON. Starting qemu-img takes 20 ms.
_CLUSTERS = 1 << 15
_LARGEST_WINDOW = 2 << 30
_PATIENCE = 10.0
# A window is mapped when so much of it was read through qemu-nbd: a sample never is, a scan soon.
_WORTH = 16 << 20
# Windows kept, 1 MB each at most: a scan goes through them once, its threads side by side.
_KEPT = 4

_ZEROS, _ELSEWHERE = -1, -2


@dataclass(frozen=True, slots=True)
class _Piece:
    """Guest bytes [start, end): `offset` in the file of layer `depth`, or what a negative depth says."""

    start: int
    end: int
    depth: int
    offset: int


class _Window:
    """The pieces of a part of the guest's disk, in order; `pieces` are rows of the four numbers."""

    def __init__(self, pieces: Sequence[tuple[int, int, int, int]]) -> None:
        # A column for each: Python's own objects would take ten times as much.
        self._columns = np.array(pieces, np.int64).reshape(-1, 4).T.copy()

    def _piece(self, at: int) -> _Piece | None:
        if at >= self._columns.shape[1]:
            return None
        start, end, depth, offset = self._columns[:, at].tolist()
        return _Piece(start, end, depth, offset)

    def within(self, start: int, end: int) -> Iterator[_Piece]:
        """Yield what covers [start, end), the first and last piece not cut; gaps are elsewhere."""
        at = max(0, int(np.searchsorted(self._columns[0], start, side="right")) - 1)
        while start < end:
            piece = self._piece(at)
            if piece is not None and piece.end <= start:
                at += 1
                continue
            if piece is None or piece.start > start:
                stop = end if piece is None else min(piece.start, end)
                piece = _Piece(start, stop, _ELSEWHERE, 0)
            yield piece
            start = piece.end


_NOT_MAPPED = _Window([])


class MappedImage(export.NbdImage):
    """An image behind a qemu-nbd of ours, opened for reading."""

    # Most of it is read from its files.
    at_once = 0

    def __init__(
        self, name: str, address: nbd.Address, first: nbd.Connection, connections: int
    ) -> None:
        super().__init__(name, address, first, connections)
        self._map: Map | None = None

    def use_map(self, layers: Sequence[chain.Layer]) -> None:
        """Read directly what can be."""
        self._map = Map.of(layers, self.size)

    def read_into(self, start: int, buffer: memoryview) -> None:
        """Fill `buffer`; raises OSError, GoneError where the server has died."""
        self._read_into(start, buffer, gently=False)

    def read_gently(self, start: int, buffer: memoryview) -> None:
        """Do the same in short copies; raises OSError, GoneError where the server has died."""
        self._read_into(start, buffer, gently=True)

    def _read_into(self, start: int, buffer: memoryview, *, gently: bool) -> None:
        mapped = self._map
        if mapped is None:
            super().read_into(start, buffer)
            return
        buffer = memoryview(buffer).cast("B")
        for at, length, piece in mapped.pieces(start, start + len(buffer)):
            part = buffer[at - start : at - start + length]
            if piece.depth == _ZEROS:
                part[:] = bytes(length)
            elif piece.depth == _ELSEWHERE or not mapped.read(piece, at, part, gently):
                super().read_into(at, part)
        # Last: until here its locks have kept writers away.
        if self.server is not None and not self.server.is_alive():
            raise base.GoneError("its qemu-nbd has ended")

    def reader(self) -> export.NbdImage:
        """Return this image: nobody writes it, and few reads need its connections."""
        return self

    def close(self) -> None:
        """Part from the server and close the files."""
        super().close()
        if self._map is not None:
            self._map.close()


class Map:
    """Where a chain's bytes are. Thread-safe; the caller closes it."""

    def __init__(self, layers: Sequence[chain.Layer], size: int, fds: dict[int, int]) -> None:
        self._layers = tuple(layers)
        self._size = size
        self._fds = fds
        self._readers = {depth: pagecache.Reader(fd) for depth, fd in fds.items()}
        smallest = min(
            (layer.cluster for layer in layers if layer.cluster), default=_LARGEST_WINDOW
        )
        self._window_size = min(smallest * _CLUSTERS, _LARGEST_WINDOW)
        # By number, the one used last at the end.
        self._windows: OrderedDict[int, _Window] = OrderedDict()
        self._read: Counter[int] = Counter()
        self._lock = threading.Lock()
        self._failed = False

    @classmethod
    def of(cls, layers: Sequence[chain.Layer], size: int) -> Map | None:
        """Return the map of a chain, None where nothing of it can be read directly."""
        if layers[0].driver not in _DRIVERS or any(layer.encrypted for layer in layers):
            return None
        fds: dict[int, int] = {}
        for depth, layer in enumerate(layers):
            if layer.driver in _DRIVERS and layer.path is not None and not layer.data_files:
                fd = _open(layer)
                if fd is not None:
                    fds[depth] = fd
        return cls(layers, size, fds)

    def pieces(self, start: int, end: int) -> Iterator[tuple[int, int, _Piece]]:
        """Yield (start, length, piece) that cover [start, end), in order."""
        while start < end:
            number = start // self._window_size
            stop = min((number + 1) * self._window_size, end)
            for piece in self._window(number, stop - start).within(start, stop):
                last = min(piece.end, stop)
                yield start, last - start, piece
                start = last

    def read(self, piece: _Piece, start: int, buffer: memoryview, gently: bool = False) -> bool:
        """Fill `buffer` with guest bytes from `start` on, all in `piece`; return whether that worked."""
        reader = self._readers.get(piece.depth)
        if reader is None:
            return False
        try:
            reader.read_into(piece.offset + start - piece.start, buffer, gently=gently)
        except OSError:
            # Beyond the file's end, where QEMU knows zeros; or unreadable, which it will tell.
            return False
        return True

    def _window(self, number: int, length: int) -> _Window:
        """Return a window of which `length` bytes are about to be read; an empty one is not mapped yet."""
        with self._lock:
            window = self._windows.get(number)
            if window is not None:
                self._windows.move_to_end(number)
                return window
            self._read[number] += length
            if self._read[number] < _WORTH:
                return _NOT_MAPPED
            window = self._windows[number] = self._ask(number * self._window_size)
            if len(self._windows) > _KEPT:
                forgotten, _ = self._windows.popitem(last=False)
                del self._read[forgotten]
            return window

    def _ask(self, start: int) -> _Window:
        length = min(self._window_size, self._size - start)
        if self._failed:
            return _NOT_MAPPED
        top = self._layers[0]
        words = [qemu_img.command(), "map", "-f", top.driver, "--output=json"]
        words += [f"--start-offset={start}", f"--max-length={length}", top.path or ""]
        try:
            result = subprocess.run(
                words, stdin=subprocess.DEVNULL, capture_output=True, timeout=_PATIENCE, check=True
            )
            # By a hook: all the entries as dictionaries would take most of this process's memory.
            window = _Window(json.loads(result.stdout, object_hook=_piece))
            self._check_names()
            return window
        except (OSError, subprocess.SubprocessError, ValueError, KeyError):
            # Once slow or refused, it will be again.
            self._failed = True
            return _NOT_MAPPED

    def _check_names(self) -> None:
        """Raise OSError where a name has come to mean another file: the map would be that one's."""
        for layer in self._layers:
            if layer.path is not None and chain.identity(layer.path) != layer.identity:
                raise OSError(errno.ESTALE, f"{layer.path} is another file now")

    def close(self) -> None:
        """Close the files. May be called more than once."""
        for reader in self._readers.values():
            reader.close()
        while self._fds:
            os.close(self._fds.popitem()[1])


def _piece(entry: dict[str, int]) -> tuple[int, int, int, int]:
    """Return the piece that an entry of `qemu-img map --output=json` tells of (qemu-img(1))."""
    start, end = entry["start"], entry["start"] + entry["length"]
    if entry["zero"]:
        return start, end, _ZEROS, 0
    if entry["data"] and "offset" in entry and not entry.get("compressed"):
        return start, end, entry["depth"], entry["offset"]
    return start, end, _ELSEWHERE, 0


def _open(layer: chain.Layer) -> int | None:
    """Open the layer's file, None where the name means another file by now."""
    assert layer.path is not None
    try:
        fd = os.open(layer.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return None
    if chain.identity(f"/proc/self/fd/{fd}") != layer.identity:
        os.close(fd)
        return None
    return fd
