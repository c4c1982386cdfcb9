# SPDX-License-Identifier: Apache-2.0
"""Reading bitmaps out of a qcow2 file, whoever wrote it: nothing in it is believed unchecked.

What QEMU refuses is refused, and what a dirty map may not be taken from: a bitmap that is in use
(QEMU did not save it) or that a program ignorant of bitmaps has left behind. Memory is bounded by the
format, 512 MiB a bitmap, and every table by the file's length.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from dirtymap import bitmap, errors
from dirtymap.qcow2 import format as qcow2

Path = str | os.PathLike[str]


@dataclass(frozen=True)
class BitmapInfo:
    """What a qcow2 file's directory says of a bitmap."""

    name: str
    size: int  # the disk's, in bytes: whole sectors
    granularity: int
    flags: int

    @property
    def inconsistent(self) -> bool:
        """Not saved by QEMU, or open for writing now: its bits are worthless."""
        return bool(self.flags & qcow2.BITMAP_IN_USE)

    @property
    def recording(self) -> bool:
        """Whether QEMU sets bits in it when the disk is written."""
        return bool(self.flags & qcow2.BITMAP_AUTO)


def names(path: Path) -> list[BitmapInfo]:
    """The bitmaps of the qcow2 file at `path`, none included. Raises MapError."""
    with _opened(path) as file:
        return [info for info, _ in file.bitmaps()]


def read(path: Path, name: str | None = None) -> bitmap.Bitmap:
    """The bitmap `name` of the qcow2 file at `path`; without a name, the only one there is.

    Raises MapError: no qcow2, damaged, no such bitmap, several and no name, an inconsistent bitmap.
    """
    with _opened(path) as file:
        info, entry = _choose(file.bitmaps(), name)
        return file.bits(info, entry)


def check_carrier(path: Path) -> None:
    """Raise MapError unless `path` is surely a map and nothing more: with bitmaps, and no disk's data."""
    with _opened(path) as file:
        if file.holds_guest_data():
            raise qcow2.FormatError("holds a disk's data")
        if not file.bitmaps():
            raise qcow2.FormatError("holds no bitmap")


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[_File]:
    """An open qcow2 file; whatever is wrong with it becomes a MapError."""
    try:
        # Not waiting for a pipe's writer, nor taking a terminal.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        try:
            yield _File(descriptor)
        finally:
            os.close(descriptor)
    except (OSError, qcow2.FormatError) as error:
        raise errors.MapError(path, errors.reason(error)) from error
    except ValueError as error:  # a name with a zero byte in it
        raise errors.MapError(repr(path), str(error)) from error


Found = tuple[BitmapInfo, qcow2.DirectoryEntry]


def _choose(found: list[Found], name: str | None) -> Found:
    """The bitmap called `name`, or the only one; FormatError."""
    if not found:
        raise qcow2.FormatError("holds no bitmap")
    listed = ", ".join(repr(info.name) for info, _ in found)
    if name is None and len(found) > 1:
        raise qcow2.FormatError(f"holds several bitmaps, say which (--bitmap NAME): {listed}")
    for info, entry in found:
        if name is None or info.name == name:
            return info, entry
    raise qcow2.FormatError(f"holds no bitmap {name!r}, but {listed}")


class _File:
    """A qcow2 file with its header checked; methods raise FormatError or OSError."""

    def __init__(self, descriptor: int) -> None:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
            raise qcow2.FormatError("is neither a file nor a block device")
        self.descriptor = descriptor
        self.length = os.lseek(descriptor, 0, os.SEEK_END)
        self.header = self._header()
        self.size = self.header.size // 512 * 512  # as QEMU rounds it

    def part(self, start: int, length: int, what: str) -> bytes:
        """The bytes [start, start + length), which must all be there."""
        buffer = bytearray(self._within(start, length, what))
        self._fill(start, memoryview(buffer), what)
        return bytes(buffer)

    def _within(self, start: int, length: int, what: str) -> int:
        if start + length > self.length:
            raise qcow2.FormatError(f"is damaged or cut off: its {what} lies beyond its end")
        return length

    def _fill(self, start: int, buffer: memoryview, what: str) -> None:
        while buffer:
            count = os.preadv(self.descriptor, [buffer], start)
            if count == 0:
                raise qcow2.FormatError(f"was cut off while its {what} was read")
            start += count
            buffer = buffer[count:]

    def _header(self) -> qcow2.Header:
        head = self.part(0, min(self.length, qcow2.Header.length()), "header")
        if head[:4] != qcow2.MAGIC.to_bytes(4, "big"):
            raise qcow2.FormatError("is no qcow2 file, as a dirty map is")
        if head[4:8] == (2).to_bytes(4, "big"):
            raise qcow2.FormatError("is a qcow2 file of version 2, which holds no bitmaps")
        header = qcow2.Header.unpack(head)
        _check_header(header)
        self._within(header.l1_table_offset, header.l1_size * 8, "L1 table")
        return header

    def _extension(self) -> qcow2.BitmapsExtension | None:
        """The bitmaps extension, or None."""
        header = self.header
        end = min(
            header.backing_file_offset or header.cluster_size, header.cluster_size, self.length
        )
        head = self.part(0, end, "header")
        for kind, data in qcow2.unpack_extensions(head, header.header_length, end):
            if kind == qcow2.EXTENSION_BITMAPS:
                return _check_extension(header, data)
        return None

    def holds_guest_data(self) -> bool:
        """Whether there are a disk's data, or the names of where they are."""
        header = self.header
        elsewhere = header.incompatible_features & qcow2.INCOMPATIBLE_DATA_FILE
        if elsewhere or header.backing_file_offset or header.nb_snapshots:
            return True
        return any(self.part(header.l1_table_offset, header.l1_size * 8, "L1 table"))

    def bitmaps(self) -> list[Found]:
        """Every bitmap's directory entry, checked as far as QEMU checks it when it opens the file."""
        extension = self._extension()
        if extension is None:
            return []
        directory = self.part(
            extension.bitmap_directory_offset, extension.bitmap_directory_size, "bitmap directory"
        )
        found: dict[str, Found] = {}
        for entry, raw_name in qcow2.unpack_directory(directory, extension.nb_bitmaps):
            name = raw_name.decode(errors="backslashreplace")
            if name in found:
                raise qcow2.FormatError(f"is damaged: it has two bitmaps {name!r}")
            _check_entry(entry, name, self.header, self.size)
            self._within(entry.bitmap_table_offset, entry.bitmap_table_size * 8, "bitmap table")
            granularity = 1 << entry.granularity_bits
            found[name] = BitmapInfo(name, self.size, granularity, entry.flags), entry
        return list(found.values())

    def _worthless(self, info: BitmapInfo) -> str:
        """Why the bits of an inconsistent bitmap are no map, and where one is to be had."""
        if info.recording or self.holds_guest_data():
            return f"the bitmap {info.name!r} is inconsistent: QEMU did not save it, or has it open now"
        return (
            "the map is in use and lacks what was written since: its mount records still "
            "(posthoc umount writes it, MOUNTPOINT/dirty.qcow2 is the map of now), or has crashed "
            "(compare again)"
        )

    def bits(self, info: BitmapInfo, entry: qcow2.DirectoryEntry) -> bitmap.Bitmap:
        """The bits of one bitmap."""
        if info.inconsistent:
            raise qcow2.FormatError(self._worthless(info))
        raw = self.part(entry.bitmap_table_offset, entry.bitmap_table_size * 8, "bitmap table")
        table = qcow2.unpack_table(raw)
        offsets = table & np.uint64(qcow2.ENTRY_OFFSET)
        self._check_offsets(offsets)
        result = bitmap.Bitmap(self.size, info.granularity)
        size = self.header.cluster_size
        for run in _runs(table == qcow2.ENTRY_ONES):
            result.data[run.start * size : run.stop * size] = 0xFF
        data = result.data.data
        for run in _runs(offsets != 0, offsets, size):
            target = data[run.start * size : run.stop * size]
            self._fill(int(offsets[run.start]), target, f"bitmap {info.name!r}")
        # Bits beyond the disk's end should be 0; QEMU cuts them off where they are not.
        if result.segments % 8:
            result.data[-1] &= (1 << result.segments % 8) - 1
        return result

    def _check_offsets(self, offsets: np.ndarray[Any, np.dtype[np.uint64]]) -> None:
        stored = offsets[offsets != 0]
        if not len(stored):
            return
        size = self.header.cluster_size
        if (stored % np.uint64(size)).any() or int(stored.min()) < size:
            raise qcow2.FormatError("is damaged: a bitmap table names no cluster's place")
        self._within(int(stored.max()), size, "bitmap")


def _runs(
    chosen: np.ndarray[Any, np.dtype[np.bool_]],
    offsets: np.ndarray[Any, np.dtype[np.uint64]] | None = None,
    step: int = 0,
) -> Iterator[range]:
    """Neighbours in a table that are chosen, and whose offsets are `step` apart: one read each."""
    indices = np.flatnonzero(chosen)
    breaks = np.diff(indices) != 1
    if offsets is not None:
        breaks |= np.diff(offsets[indices]) != np.uint64(step)
    first = 0
    for last in [*(np.flatnonzero(breaks) + 1).tolist(), len(indices)]:
        if first < last:
            yield range(int(indices[first]), int(indices[last - 1]) + 1)
        first = last


def _check_header(header: qcow2.Header) -> None:
    if header.version != 3:
        raise qcow2.FormatError(f"is a qcow2 file of the unknown version {header.version}")
    if header.incompatible_features & ~qcow2.INCOMPATIBLE_KNOWN:
        raise qcow2.FormatError("is a qcow2 file with features that are not known here")
    if header.incompatible_features & qcow2.INCOMPATIBLE_CORRUPT:
        raise qcow2.FormatError("is marked corrupt: qemu-img check may repair it")
    if header.cluster_bits not in qcow2.CLUSTER_BITS:
        raise qcow2.FormatError("is damaged: its cluster size is none")
    if not qcow2.Header.length() <= header.header_length <= header.cluster_size:
        raise qcow2.FormatError("is damaged: its header's length is none")
    if header.size >= 1 << 63:
        raise qcow2.FormatError("is damaged: its virtual size is none")
    # Extended L2 entries (incompatible bit 4) are twice as long: an L1 entry spans half as much.
    extended = bool(header.incompatible_features & qcow2.INCOMPATIBLE_EXTENDED_L2)
    needed = qcow2.l1_entries(header.size * 2 if extended else header.size, header.cluster_size)
    if not needed * 8 <= header.l1_size * 8 <= qcow2.L1_LIMIT:
        raise qcow2.FormatError("is damaged: its L1 table does not fit its virtual size")
    if header.l1_table_offset % header.cluster_size or not header.l1_table_offset:
        raise qcow2.FormatError("is damaged: its L1 table has no place")


def _check_extension(header: qcow2.Header, data: bytes) -> qcow2.BitmapsExtension:
    if not header.autoclear_features & qcow2.AUTOCLEAR_BITMAPS:
        raise qcow2.FormatError(
            "its bitmaps are out of date: a program that knows no bitmaps has written to it "
            "(qemu-img check -r leaks removes them)"
        )
    extension = qcow2.BitmapsExtension.unpack(data)
    if len(data) != qcow2.BitmapsExtension.length() or extension.reserved32:
        raise qcow2.FormatError("is damaged: its bitmaps extension is none")
    if not 1 <= extension.nb_bitmaps <= qcow2.BITMAPS_LIMIT:
        raise qcow2.FormatError(f"is damaged: it claims {extension.nb_bitmaps} bitmaps")
    if extension.bitmap_directory_size > qcow2.DIRECTORY_LIMIT:
        raise qcow2.FormatError("is damaged: its bitmap directory is too long")
    if extension.bitmap_directory_offset % header.cluster_size:
        raise qcow2.FormatError("is damaged: its bitmap directory has no place")
    return extension


def _check_entry(entry: qcow2.DirectoryEntry, name: str, header: qcow2.Header, size: int) -> None:
    """What QEMU checks (check_dir_entry and load_bitmap_data in block/qcow2-bitmap.c)."""
    if entry.type != qcow2.BITMAP_TYPE:
        raise qcow2.FormatError(f"the bitmap {name!r} is of the unknown type {entry.type}")
    if entry.flags & ~qcow2.BITMAP_FLAGS_KNOWN or entry.extra_data_size:
        raise qcow2.FormatError(f"the bitmap {name!r} has flags or data that are not known here")
    if entry.granularity_bits not in qcow2.GRANULARITY_BITS:
        raise qcow2.FormatError(f"is damaged: the bitmap {name!r} has an impossible granularity")
    if not 1 <= entry.name_size <= qcow2.NAME_LIMIT:
        raise qcow2.FormatError("is damaged: a bitmap's name is empty or too long")
    if not entry.bitmap_table_offset or entry.bitmap_table_offset % header.cluster_size:
        raise qcow2.FormatError(f"is damaged: the table of the bitmap {name!r} has no place")
    if entry.bitmap_table_size * header.cluster_size > qcow2.BITMAP_LIMIT:
        raise qcow2.FormatError(f"is damaged: the bitmap {name!r} is too large")
    # An inconsistent bitmap may be of a size the disk had before.
    expected = qcow2.table_entries(size, 1 << entry.granularity_bits, header.cluster_size)
    if entry.bitmap_table_size != expected and not entry.flags & qcow2.BITMAP_IN_USE:
        raise qcow2.FormatError(f"is damaged: the bitmap {name!r} does not fit the virtual size")
