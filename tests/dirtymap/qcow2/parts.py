# SPDX-License-Identifier: Apache-2.0
"""Carriers with one field changed, for the tests of what others make of them."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Iterator

from dirtymap import bitmap
from dirtymap.qcow2 import carrier
from dirtymap.qcow2 import format as qcow2
from dirtymap.qcow2 import layout as layouts
from tests import qemu

SIZE = 700 << 20  # at 512: three table entries, two L1 entries
GRANULARITY = 512
DIRECTORY = layouts.Layout.directory_offset
TABLE = layouts.Layout.table_offset


def made(path: pathlib.Path) -> pathlib.Path:
    """A carrier of three clusters of bits: some, none, some."""
    dirty = bitmap.Bitmap(SIZE, GRANULARITY)
    dirty.set(1)
    dirty.set(dirty.segments - 1)
    # What an earlier change has left there is no map any more, and not replaced by one.
    path.unlink(missing_ok=True)
    carrier.write(path, dirty)
    return path


def put(path: pathlib.Path, start: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(start)
        file.write(data)


def change_header(path: pathlib.Path, **fields: int) -> None:
    header = qcow2.Header.unpack(path.read_bytes())
    put(path, 0, dataclasses.replace(header, **fields).pack())


def change_extension(path: pathlib.Path, **fields: int) -> None:
    start = qcow2.Header.length() + qcow2.ExtensionHeader.length()
    extension = qcow2.BitmapsExtension.unpack(path.read_bytes(), start)
    put(path, start, dataclasses.replace(extension, **fields).pack())


def change_entry(path: pathlib.Path, **fields: int) -> None:
    """Change the bitmap's directory entry."""
    entry = qcow2.DirectoryEntry.unpack(path.read_bytes(), DIRECTORY)
    put(path, DIRECTORY, dataclasses.replace(entry, **fields).pack())


def change_table(path: pathlib.Path, index: int, value: int) -> None:
    put(path, TABLE + 8 * index, value.to_bytes(8, "big"))


@contextlib.contextmanager
def small_filesystem(folder: pathlib.Path, size: int) -> Iterator[pathlib.Path]:
    """A mounted ext4 of `size` bytes, to be filled; it is made in `folder`."""
    file = folder / "small.raw"
    with file.open("wb") as made:
        made.truncate(size)
    qemu.mkfs_ext4(file, "-O", "^has_journal", "-m", "0")
    with qemu.loop_device(file) as device, qemu.mounted(device, folder / "small") as mounted:
        yield mounted
