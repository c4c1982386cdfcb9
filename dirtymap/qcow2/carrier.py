# SPDX-License-Identifier: Apache-2.0
"""The carrier: a qcow2 file without guest data that holds one persistent bitmap, a dirty map.

    write(path, bitmap)     a file, replaced as a whole or not at all
    Carrier                 the same bytes in memory, for dirty.qcow2 in a mount
    read(path)              a Bitmap again, from any qcow2 with persistent bitmaps
    names(path)             what bitmaps there are

QEMU counts disks in sectors, so a carrier's virtual size is the disk's size rounded up to 512, and a
bitmap read back has that size. Its segments and bits are the same: a granularity is 512 or more.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from dirtymap import bitmap, errors
from dirtymap.qcow2 import atomic, reader
from dirtymap.qcow2 import format as qcow2
from dirtymap.qcow2 import layout as layouts

DEFAULT_NAME = "posthoc"

BitmapInfo = reader.BitmapInfo
Layout = layouts.Layout
names = reader.names
read = reader.read
virtual_size = layouts.virtual_size


def layout(size: int, granularity: int, name: str = DEFAULT_NAME) -> Layout:
    """The places of a carrier's parts; `.length` is its file's, whatever the bits are.

    Raises UserError where no qcow2 can hold such a map: a name of no or more than 1023 bytes, a disk
    of no bytes, bits of more than 512 MiB (choose a coarser granularity).
    """
    return layouts.of(size, granularity, name)


class Carrier:
    """A carrier's bytes in memory; fixed, as long as nobody changes the bits it was given."""

    def __init__(
        self, layout: Layout, data: npt.NDArray[np.uint8], *, in_use: bool = False
    ) -> None:
        self.layout = layout
        self.length = layout.length
        self._entries = layouts.clusters(layout, data)
        metadata = layouts.metadata(layout, self._entries, in_use=in_use)
        self._metadata = [(start, memoryview(part)) for start, part in metadata]
        self._data = data.data

    def read(self, start: int, length: int) -> bytes:
        """The bytes [start, start + length), fewer at the file's end."""
        end = min(start + length, self.length)
        if start >= end:
            return b""
        data_start = start - self.layout.data_offset
        if data_start >= 0:  # the easy case and most of the file: the bits, then padding
            return bytes(self._data[data_start : data_start + end - start]).ljust(
                end - start, b"\0"
            )
        buffer = bytearray(end - start)
        for offset, part in [*self._metadata, (self.layout.data_offset, self._data)]:
            first, last = max(offset, start), min(offset + len(part), end)
            if first < last:
                buffer[first - start : last - start] = part[first - offset : last - offset]
        return bytes(buffer)

    def parts(self) -> Iterator[tuple[int, memoryview]]:
        """What a file must hold, (offset, bytes), its header last; between the parts are zeros.

        With its header last, a half-written file is no qcow2.
        """
        header, *others = self._metadata
        yield from others
        stored = np.flatnonzero(self._entries > qcow2.ENTRY_ONES)
        for run in np.split(stored, np.flatnonzero(np.diff(stored) != 1) + 1):
            if len(run):
                first, last = (int(run[0]) * layouts.CLUSTER, (int(run[-1]) + 1) * layouts.CLUSTER)
                yield self.layout.data_offset + first, self._data[first:last]
        yield header


def check_target(path: str | os.PathLike[str]) -> None:
    """Raise MapError where a map written to `path` would take the place of something else.

    Nothing, an empty file and a map may be there. What cannot be read, or not as a map, is refused: it
    may be a disk.
    """
    try:
        atomic.check_target(path)
        if os.path.getsize(path):
            reader.check_carrier(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise errors.MapError(path, f"cannot be written: {errors.reason(error)}") from error
    except errors.MapError as error:
        raise errors.MapError(
            path, f"stands there already and is no map that could be replaced: {error.reason}"
        ) from error


def write(
    path: str | os.PathLike[str],
    bitmap: bitmap.Bitmap,
    name: str = DEFAULT_NAME,
    *,
    in_use: bool = False,
) -> None:
    """Write the carrier of `bitmap` to `path`, mode 0600: after this the old file or the new one.

    The bitmap must not change meanwhile. What stands at `path` is replaced where `check_target` allows
    it. Raises UserError; then nothing is left but what was there before, unless it says that the map
    is in place. `in_use` writes one that every reader refuses, QEMU too: its recorder still has more to say.
    """
    carrier = Carrier(layout(bitmap.size, bitmap.granularity, name), bitmap.data, in_use=in_use)
    check_target(path)
    try:
        with atomic.replacement(path) as descriptor:
            os.ftruncate(descriptor, carrier.length)
            for start, part in carrier.parts():
                atomic.write_all(descriptor, start, part)
    except atomic.UnsyncedError as error:
        raise errors.MapError(path, errors.reason(error)) from error
    except OSError as error:
        reason = f"cannot be written: {errors.reason(error)}"
        raise errors.MapError(path, reason) from error
