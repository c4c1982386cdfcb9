# SPDX-License-Identifier: Apache-2.0
"""FIEMAP: where a file's bytes lie on its file system (Documentation/filesystems/fiemap.rst in Linux).

    struct fiemap          start u64 | length u64 | flags u32 | mapped u32 | room u32 | reserved u32
    struct fiemap_extent   logical u64 | physical u64 | length u64 | 2 u64 | flags u32 | 3 u32      (each)

Only plain extents shared with another file are given here: what is inline, delayed, unwritten, compressed
or of unknown place has a `physical` that says nothing about its bytes.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from dirtymap import extent

# include/uapi/linux/fs.h, fiemap.h
_FS_IOC_FIEMAP = 0xC020660B
_FS_IOC_FSGETXATTR = 0x801C581F
_FS_XFLAG_REALTIME = 1
_FLAG_SYNC = 1
_EXTENT_LAST = 0x1
_EXTENT_SHARED = 0x2000

# include/uapi/linux/magic.h: the file systems with reflinks whose places are known to mean one device's bytes.
_XFS, _BTRFS = 0x58465342, 0x9123683E

_libc = ctypes.CDLL(None, use_errno=True)
_libc.sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]

_HEADER = struct.Struct("=QQIIII")
_EXTENT = np.dtype(
    [
        ("logical", "u8"),
        ("physical", "u8"),
        ("length", "u8"),
        ("reserved64", "u8", 2),
        ("flags", "u4"),
        ("reserved", "u4", 3),
    ]
)
# Extents asked for at once: 56 KiB of answer.
_ROOM = 1024

# include/uapi/linux/fs.h: all three flags, the only combination that writes whatever is dirty (sync_file_range(2)).
_SYNC_WRITE_AND_WAIT = 7
# Written out between two looks at the clock. Where nothing is dirty, 1 TiB takes 12 ms.
_PIECE = 128 << 20


@dataclass(frozen=True, slots=True)
class Place:
    """Bytes [start, end) of a file and where on the file system they are, in bytes."""

    start: int
    end: int
    physical: int


def numbering(fd: int) -> tuple[int, int, int] | None:
    """Return what two files have in common whose places are numbers of one file system; None in doubt.

    The device number alone does not tell: overlayfs (xino=on) gives one to the files of all its layers and
    hands FIEMAP through to the layer. What kind of file system answers is asked for (fstatfs(2)).
    """
    # struct statfs begins with f_type, a long (on s390x an int: no kind known here, so that all is read).
    answer = (ctypes.c_long * 64)()
    if _libc.fstatfs(fd, answer) != 0 or answer[0] not in (_XFS, _BTRFS):
        return None
    return answer[0], os.fstatvfs(fd).f_fsid, os.fstat(fd).st_dev


def is_realtime(fd: int) -> bool:
    """Return whether the file is on xfs's realtime device, whose places are numbered on their own.

    In doubt: a file system that does not know the question has no such device.
    """
    try:
        flags = fcntl.ioctl(fd, _FS_IOC_FSGETXATTR, bytes(28))
    except OSError:
        return False
    return bool(struct.unpack_from("=I", flags)[0] & _FS_XFLAG_REALTIME)


def shared(fd: int, start: int, length: int, deadline: float) -> Iterator[Place]:
    """Yield the places of [start, start + length) that are plain, written and shared, in order.

    What the file's writers have left in the page cache is written out first (FIEMAP_FLAG_SYNC): until
    then a copy-on-write extent is told with its old place. Ends at `deadline` (time.monotonic()), or with
    the piece that is being written then. Raises OSError where the file system has no FIEMAP.
    """
    end = start + length
    if not _write_out(fd, deadline):
        return
    # This alone is trusted, and comes first. What was written before costs nothing more here.
    flags = _FLAG_SYNC
    while start < end and time.monotonic() < deadline:
        found = _ask(fd, start, end - start, flags)
        flags = 0
        if not len(found):
            return
        for logical, physical, count, extent_flags in zip(
            found["logical"].tolist(),
            found["physical"].tolist(),
            found["length"].tolist(),
            found["flags"].tolist(),
            strict=True,
        ):
            # Any flag not named here, also one yet to be invented, is a reason to read.
            if extent_flags & ~_EXTENT_LAST == _EXTENT_SHARED:
                first, last = max(logical, start), min(logical + count, end)
                if first < last:
                    yield Place(first, last, physical + first - logical)
        behind = int(found["logical"][-1]) + int(found["length"][-1])
        if int(found["flags"][-1]) & _EXTENT_LAST or behind <= start:
            return
        start = behind


def _write_out(fd: int, deadline: float) -> bool:
    """Write out in pieces what is dirty in the file, and return whether that was done before `deadline`.

    The whole file: Linux writes out all of it for FIEMAP_FLAG_SYNC, whatever range is asked for
    (fiemap_prep(); btrfs waits for all its ordered extents, too), and looks at no clock.
    """
    for start in range(0, os.fstat(fd).st_size, _PIECE):
        if time.monotonic() >= deadline:
            return False
        _write_range(fd, start, _PIECE)
    return True


def _write_range(fd: int, start: int, length: int) -> None:
    if _libc.sync_file_range(fd, start, length, _SYNC_WRITE_AND_WAIT) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _ask(fd: int, start: int, length: int, flags: int) -> np.ndarray:
    buffer = bytearray(_HEADER.size + _ROOM * _EXTENT.itemsize)
    _HEADER.pack_into(buffer, 0, start, length, flags, 0, _ROOM, 0)
    fcntl.ioctl(fd, _FS_IOC_FIEMAP, buffer, True)
    mapped = _HEADER.unpack_from(buffer)[3]
    return np.frombuffer(buffer, _EXTENT, count=mapped, offset=_HEADER.size)


def common(one: Iterable[Place], other: Iterable[Place]) -> Iterator[Place]:
    """Yield what has the same place in both, which are in order."""
    for start, end, a, b in extent.overlaps(one, other):
        # Same bytes of the file at the same bytes of the device, wherever the extents began.
        if a.physical - a.start == b.physical - b.start:
            yield Place(start, end, a.physical + start - a.start)
