# SPDX-License-Identifier: Apache-2.0
"""Reading a format's bytes straight from its files, where `qemu-img map` says at which offset they are.

    guest        |  A  |  B  | zeros |  C  |  D  |
    map          base.raw  top.qcow2   -   top.qcow2   no offset: compressed, encrypted
    read by      pread     pread     memset  pread     qemu-nbd

Through qemu-nbd every byte is copied twice more, by a process that needs a core of its own. The map is QEMU's
own and asked for in windows as they are needed; what it does not place, and whatever fails here, is read
through qemu-nbd. It holds as long as nobody writes the image, for which our qemu-nbd's locks stand: an image
opened for writing is never read this way.
"""

from __future__ import annotations

import bisect
import errno
import json
import os
import subprocess
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from dirtymap.images import base, chain, export, nbd, pagecache, qemu_img

# Formats whose data clusters lie in the file that is named, and nowhere else. A vmdk may have its data in
# files of their own, which the map's JSON does not name.
_DRIVERS = frozenset(("qcow2", "raw", "vdi"))

# Guest bytes mapped at once: at most 65536 clusters of 64 KiB, 8 MB of JSON. Starting qemu-img takes 20 ms.
_WINDOW = 4 << 30
_PATIENCE = 10.0

_ZEROS, _ELSEWHERE = -1, -2


@dataclass(frozen=True, slots=True)
class _Piece:
    """Guest bytes [start, end): `offset` in the file of layer `depth`, or what a negative depth says."""

    start: int
    end: int
    depth: int
    offset: int


@dataclass
class _Window:
    pieces: list[_Piece]
    starts: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.starts = [piece.start for piece in self.pieces]

    def within(self, start: int, end: int) -> Iterator[_Piece]:
        """Yield what covers [start, end), the first and last piece not cut; gaps are elsewhere."""
        at = max(0, bisect.bisect_right(self.starts, start) - 1)
        while start < end:
            piece = self.pieces[at] if at < len(self.pieces) else None
            if piece is not None and piece.end <= start:
                at += 1
                continue
            if piece is None or piece.start > start:
                stop = end if piece is None else min(piece.start, end)
                piece = _Piece(start, stop, _ELSEWHERE, 0)
            yield piece
            start = piece.end


class MappedImage(export.NbdImage):
    """An image behind a qemu-nbd of ours, opened for reading."""

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
        mapped = self._map
        if mapped is None:
            super().read_into(start, buffer)
            return
        buffer = memoryview(buffer).cast("B")
        for at, length, piece in mapped.pieces(start, start + len(buffer)):
            part = buffer[at - start : at - start + length]
            if piece.depth == _ZEROS:
                part[:] = bytes(length)
            elif piece.depth == _ELSEWHERE or not mapped.read(piece, at, part):
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
        self._windows: dict[int, _Window] = {}
        self._lock = threading.Lock()
        self._failed = False

    @classmethod
    def of(cls, layers: Sequence[chain.Layer], size: int) -> Map | None:
        """Return the map of a chain, None where nothing of it can be read directly."""
        if layers[0].driver not in _DRIVERS or any(layer.encrypted for layer in layers):
            return None
        fds: dict[int, int] = {}
        for depth, layer in enumerate(layers):
            if layer.driver in _DRIVERS and layer.path is not None and not layer.elsewhere:
                fd = _open(layer)
                if fd is not None:
                    fds[depth] = fd
        return cls(layers, size, fds)

    def pieces(self, start: int, end: int) -> Iterator[tuple[int, int, _Piece]]:
        """Yield (start, length, piece) that cover [start, end), in order."""
        while start < end:
            window = start // _WINDOW
            stop = min((window + 1) * _WINDOW, end)
            for piece in self._window(window).within(start, stop):
                last = min(piece.end, stop)
                yield start, last - start, piece
                start = last

    def read(self, piece: _Piece, start: int, buffer: memoryview) -> bool:
        """Fill `buffer` with guest bytes from `start` on, all in `piece`; return whether that worked."""
        reader = self._readers.get(piece.depth)
        if reader is None:
            return False
        try:
            reader.read_into(piece.offset + start - piece.start, buffer)
        except OSError:
            # Beyond the file's end, where QEMU knows zeros; or unreadable, which it will tell.
            return False
        return True

    def _window(self, number: int) -> _Window:
        window = self._windows.get(number)
        if window is None:
            with self._lock:
                window = self._windows.get(number)
                if window is None:
                    window = self._windows[number] = self._ask(number * _WINDOW)
        return window

    def _ask(self, start: int) -> _Window:
        length = min(_WINDOW, self._size - start)
        if self._failed:
            return _Window([])
        top = self._layers[0]
        words = [qemu_img.command(), "map", "-f", top.driver, "--output=json"]
        words += [f"--start-offset={start}", f"--max-length={length}", top.path or ""]
        try:
            result = subprocess.run(
                words, stdin=subprocess.DEVNULL, capture_output=True, timeout=_PATIENCE, check=True
            )
            window = _Window([_piece(entry) for entry in json.loads(result.stdout)])
            self._check_names()
            return window
        except (OSError, subprocess.SubprocessError, ValueError, KeyError):
            # Once slow or refused, it will be again.
            self._failed = True
            return _Window([])

    def _check_names(self) -> None:
        """Raise OSError where a name has come to mean another file: the map would be that one's."""
        for layer in self._layers:
            if layer.path is not None and chain.identity(layer.path) != layer.identity:
                raise OSError(errno.ESTALE, f"{layer.path} is another file now")

    def close(self) -> None:
        """Close the files. May be called more than once."""
        while self._fds:
            os.close(self._fds.popitem()[1])


def _piece(entry: dict[str, int]) -> _Piece:
    """Return a piece of what `qemu-img map --output=json` says (qemu-img(1))."""
    start, end = entry["start"], entry["start"] + entry["length"]
    if entry["zero"]:
        return _Piece(start, end, _ZEROS, 0)
    if entry["data"] and "offset" in entry and not entry.get("compressed"):
        return _Piece(start, end, entry["depth"], entry["offset"])
    return _Piece(start, end, _ELSEWHERE, 0)


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
