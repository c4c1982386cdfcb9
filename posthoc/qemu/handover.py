# SPDX-License-Identifier: Apache-2.0
"""A dirty map into a disk's persistent bitmap, offline and through qemu-img.

QEMU is let write its own image. Its way of doing so sets the order of things here: while it has an
image open for writing, every persistent bitmap in it is marked as in use, and all are stored anew,
beside the old ones, when it closes. If that fails, none of them is valid any more. So

1. look first: locked? sound? the same size? the name free? room enough for all of it?
2. keep a copy of every bitmap that is there, and room to put them back;
3. let qemu-img add (replace) and merge in one go;
4. read back what it holds and compare;
5. should any of this fail, remove what was added and put back from the copies what was lost.

Killing qemu-img itself, or the machine, during step 3 leaves inconsistent bitmaps; no guest data are
ever touched.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from typing import IO

import numpy as np

from dirtymap import bitmap, errors, units
from dirtymap.qcow2 import atomic, carrier
from dirtymap.qcow2 import format as qcow2
from posthoc.qemu import qemu_img

# For the bitmap directory, and refcount blocks and tables that have to grow.
_SLACK = 2 * units.MIB


def install(dirty: bitmap.Bitmap, path: str, name: str, *, replace: bool = False) -> None:
    """Put `dirty` into the qcow2 file `path` as its recording persistent bitmap `name`.

    With `replace` a bitmap of that name is given up, an inconsistent one too. Raises UserError; then
    the image's bitmaps are as they were.
    """
    carrier.layout(dirty.size, dirty.granularity, name)  # what cannot be stored is said first
    info = _look(dirty, path)
    if name in info.bitmaps and not replace:
        raise errors.ImageError(
            path, f"has a bitmap {name!r} already: name another, or say --replace"
        )
    with _reserve(path, _check_room(dirty, path, info)) as reserve, _copies(path) as copies:
        source = os.path.join(copies.folder, "map.qcow2")
        carrier.write(source, dirty, name)
        try:
            _merge(source, dirty, path, name, remove=name in info.bitmaps)
            _verify(dirty, path, name)
        except BaseException as error:
            reserve.close()  # gives its room back
            _roll_back(path, name, copies, error)
            raise


def install_metadata(dirty: bitmap.Bitmap, disk: str, path: str, name: str) -> None:
    """Make the qcow2 file `path` that keeps `dirty` as a recording bitmap for the raw disk `disk`.

    Its external data file is the disk, of which no byte is touched; a VM started on `path` writes to
    the disk and keeps recording. `path` must be new; it appears whole or not at all. UserError.
    """
    carrier.layout(dirty.size, dirty.granularity, name)
    if os.path.lexists(path):
        raise errors.ImageError(path, f"exists already: to install into it, name it qcow2:{path}")
    size = carrier.virtual_size(_disk_size(disk))
    _check_size(dirty, disk, size)
    qemu_img.info(disk, "raw")  # refused while a running QEMU has the disk
    parent = os.path.dirname(os.path.abspath(path))
    try:
        with tempfile.TemporaryDirectory(prefix=".posthoc-", dir=parent) as folder:
            made = os.path.join(folder, "metadata.qcow2")
            _make_metadata(made, folder, disk, size)
            source = os.path.join(folder, "map.qcow2")
            carrier.write(source, dirty, name)
            _merge(source, dirty, made, name, remove=False)
            _verify(dirty, made, name)
            _publish(made, path)
    except OSError as error:
        raise errors.ImageError(path, f"cannot be made: {errors.reason(error)}") from error


# Before anything is changed


def _look(dirty: bitmap.Bitmap, path: str) -> qemu_img.Info:
    """What the image is; ImageError where it cannot take the map, ToolError where it is locked."""
    info = qemu_img.info(path, "qcow2")
    if not info.holds_bitmaps:
        raise errors.ImageError(
            path,
            "is a qcow2 of version 2, which holds no bitmaps: "
            "qemu-img amend -f qcow2 -o compat=1.1 makes it one of version 3",
        )
    _check_size(dirty, path, info.virtual_size)
    return info


def _check_size(dirty: bitmap.Bitmap, name: str, size: int) -> None:
    """Refuse a map of another disk; QEMU merges bitmaps of the same size only, to the byte."""
    if carrier.virtual_size(dirty.size) != size:
        raise errors.ImageError(
            name,
            f"has {units.describe(size)}, the map is of a disk of {units.describe(dirty.size)}",
        )


def _disk_size(disk: str) -> int:
    """The bytes of a raw file or block device; ImageError."""
    try:
        descriptor = os.open(disk, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            mode = os.fstat(descriptor).st_mode
            if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
                raise errors.ImageError(disk, "is neither a file nor a block device")
            return os.lseek(descriptor, 0, os.SEEK_END)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise errors.ImageError(disk, errors.reason(error)) from error


def _check_room(dirty: bitmap.Bitmap, path: str, info: qemu_img.Info) -> int:
    """Refuse where the new bitmap, and all others stored anew beside themselves, may not fit.

    The worst case, every cluster stored, is counted. It also checks the metadata: clusters taken by
    wrong refcounts would be somebody else's. Return the bytes that putting the others back may need.
    """
    found = qemu_img.check(path)
    if found.corruptions:
        raise errors.ImageError(
            path, f"is damaged ({found.corruptions} errors): qemu-img check -r all may repair it"
        )

    def stored(granularity: int) -> int:
        return _stored(info.virtual_size, granularity, info.cluster_size)

    others = _SLACK + sum(
        stored(there.granularity) for there in carrier.names(path) if not there.inconsistent
    )
    needed = 2 * others + stored(dirty.granularity)
    free = _free(path, found.end)
    if needed > free:
        raise errors.ImageError(
            path,
            f"has not enough room to grow: {units.human(needed)} may be needed for its bitmaps, "
            f"{units.human(free)} are free",
        )
    return others


def _reserve(path: str, length: int) -> IO[bytes]:
    """A nameless file beside the image that holds `length` bytes of room until it is closed.

    Should somebody else fill the file system while QEMU writes, what QEMU then loses can be put back.
    Only a block device's room cannot be taken by others. The caller closes it. Raises ImageError.
    """
    try:
        on_device = stat.S_ISBLK(os.stat(path).st_mode)
        reserve = tempfile.TemporaryFile(  # noqa: SIM115 (the caller closes it)
            dir=None if on_device else os.path.dirname(os.path.abspath(path))
        )
        try:
            if not on_device:
                os.posix_fallocate(reserve.fileno(), 0, length)
        except BaseException:
            reserve.close()
            raise
    except OSError as error:
        raise errors.ImageError(
            path, f"cannot reserve {units.human(length)} beside it: {errors.reason(error)}"
        ) from error
    return reserve


def _stored(size: int, granularity: int, cluster_size: int) -> int:
    """Bytes of a bitmap and its table in whole clusters."""
    entries = qcow2.table_entries(size, granularity, cluster_size)
    return (entries + -(-entries * 8 // cluster_size)) * cluster_size


def _free(path: str, used: int) -> int:
    """Bytes by which the image can grow: in its file system, or to its block device's end."""
    if stat.S_ISBLK(os.stat(path).st_mode):
        return _disk_size(path) - used
    there = os.statvfs(path)
    return there.f_bavail * there.f_frsize


# The change, and what it left


def _merge(source: str, dirty: bitmap.Bitmap, path: str, name: str, *, remove: bool) -> None:
    """Add a bitmap, merge the carrier `source` into it; one process, so that all is stored once."""
    removal = ["--remove"] if remove else []
    granularity = str(dirty.granularity)
    merge = ["--merge", name, "-b", source, "-F", "qcow2"]
    qemu_img.bitmap(path, name, *removal, "--add", "-g", granularity, *merge)


def _verify(dirty: bitmap.Bitmap, path: str, name: str) -> None:
    """Refuse what QEMU stored if it is not the map: then it failed without saying so."""
    try:
        held = carrier.read(path, name)
    except errors.MapError as error:
        raise errors.ImageError(path, f"QEMU could not save the bitmap ({error.reason})") from error
    same = held.granularity == dirty.granularity and np.array_equal(held.data, dirty.data)
    if not same or not _there(path)[name].recording:
        raise errors.ImageError(path, f"QEMU holds another bitmap {name!r} than the map")


def _there(path: str) -> dict[str, carrier.BitmapInfo]:
    return {info.name: info for info in carrier.names(path)}


class _Copies:
    """A carrier in `folder` of every valid bitmap of an image, as it was."""

    def __init__(self, folder: str, path: str) -> None:
        self.folder = folder
        self.keep = False
        self.before = _there(path)
        self.files: dict[str, str] = {}
        for number, info in enumerate(self.before.values()):
            if not info.inconsistent:
                file = os.path.join(folder, f"{number}.qcow2")
                carrier.write(file, carrier.read(path, info.name), info.name)
                self.files[info.name] = file

    def lost(self, path: str) -> list[str]:
        """The names of those that the image does not hold any more as they were."""
        there = _there(path)
        return [
            name
            for name, file in self.files.items()
            if name not in there
            or there[name] != self.before[name]
            or carrier.read(path, name) != carrier.read(file, name)
        ]


@contextlib.contextmanager
def _copies(path: str) -> Iterator[_Copies]:
    """Copies that are removed at the end, unless one of them is the last there is."""
    folder = tempfile.mkdtemp(prefix="posthoc-")
    copies: _Copies | None = None
    try:
        copies = _Copies(folder, path)
        yield copies
    finally:
        if copies is None or not copies.keep:
            shutil.rmtree(folder, ignore_errors=True)


def _roll_back(path: str, name: str, copies: _Copies, cause: BaseException) -> None:
    """Make the image's bitmaps what they were; ImageError with the copies' folder if that fails.

    What has to go goes first: it gives back the clusters that the copies need.
    """
    try:
        lost = copies.lost(path)
        added = [] if name in copies.before else [name]
        for gone in _there(path).keys() & {*lost, *added}:
            qemu_img.bitmap(path, gone, "--remove")
        for each in lost:
            state = "--enable" if copies.before[each].recording else "--disable"
            merge = ["--merge", each, "-b", copies.files[each], "-F", "qcow2"]
            granularity = str(copies.before[each].granularity)
            qemu_img.bitmap(path, each, "--add", "-g", granularity, state, *merge)
        if copies.lost(path):
            raise errors.ImageError(path, f"QEMU could not save {copies.lost(path)}")
    except errors.UserError as error:
        copies.keep = bool(copies.files)
        kept = f"; copies of its bitmaps are in {copies.folder}" if copies.keep else ""
        raise errors.ImageError(
            path, f"{cause}; what it held could not be put back ({error}){kept}"
        ) from error


# A metadata file for a raw disk


def _make_metadata(path: str, folder: str, disk: str, size: int) -> None:
    """Make a qcow2 whose data file is `disk`, which create would truncate or extend.

    So it is created with a throw-away data file and then told the disk's name, while that still
    exists: amend opens it.
    """
    throwaway = os.path.join(folder, "data")
    qemu_img.create(path, size, {"data_file": throwaway, "data_file_raw": "on"})
    qemu_img.amend(path, {"data_file": os.path.abspath(disk), "data_file_raw": "on"})


def _publish(made: str, path: str) -> None:
    """Give a finished file its name, once it is on disk; never in place of another file."""
    descriptor = os.open(made, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.link(made, path)
    atomic.sync_folder(os.path.dirname(path) or ".")
