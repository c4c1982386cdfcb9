# SPDX-License-Identifier: Apache-2.0
"""Reads that leave the page cache as they found it.

A scan reads two whole disks once. Left in the cache they would push out what the guest works with. Two ways,
the better one first:

- RWF_DONTCACHE (Linux 6.14, ext4, xfs, btrfs): the kernel drops what the read itself brought in;
- elsewhere mincore(2) before the read and POSIX_FADV_DONTNEED behind it for the pages that were not there.
  Dirty pages stay in either case.
"""

import ctypes
import errno
import mmap
import os
import threading

import numpy as np
import numpy.typing as npt

# include/uapi/linux/fs.h
_RWF_DONTCACHE = 0x80

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
_FAILED = ctypes.c_void_p(-1).value


class Reader:
    """Reads of the file or device open as `fd`, which stays the caller's."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._dontcache = True
        self._lock = threading.Lock()

    def read_into(self, start: int, buffer: memoryview) -> None:
        """Fill `buffer` from `start` on; raises OSError, EIO where the file ends before that."""
        if self._dontcache:
            try:
                self._fill(start, buffer, _RWF_DONTCACHE)
                return
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                    raise
            with self._lock:
                if self._dontcache:
                    # What readahead brings in beyond a chunk would later count as cached before.
                    os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_RANDOM)
                    self._dontcache = False
        absent = _absent_pages(self._fd, start, len(buffer))
        self._fill(start, buffer, 0)
        for first, length in absent:
            os.posix_fadvise(self._fd, first, length, os.POSIX_FADV_DONTNEED)

    def _fill(self, start: int, buffer: memoryview, flags: int) -> None:
        done = 0
        while done < len(buffer):
            got = os.preadv(self._fd, [buffer[done:]], start + done, flags)
            if got == 0:
                raise OSError(errno.EIO, f"the file ends at {start + done}, it was longer before")
            done += got


def _absent_pages(fd: int, start: int, length: int) -> list[tuple[int, int]]:
    """Return (start, length) of the runs of pages around the range that are not in the page cache."""
    page = mmap.PAGESIZE
    head = start // page * page
    pages = -(-(start + length - head) // page)
    # Never touched, only asked about: a page beyond a shrunk file's end cannot raise SIGBUS.
    address = _libc.mmap(None, pages * page, mmap.PROT_READ, mmap.MAP_SHARED, fd, head)
    if address in (None, _FAILED):
        return []
    try:
        resident = np.zeros(pages, np.uint8)
        if _libc.mincore(address, pages * page, resident.ctypes.data) != 0:
            return []
    finally:
        _libc.munmap(address, pages * page)
    return [(head + first * page, count * page) for first, count in _runs(resident & 1 == 0)]


def _runs(mask: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:
    edges = np.diff(mask.view(np.int8), prepend=0, append=0)
    starts, ends = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    return list(zip(starts.tolist(), (ends - starts).tolist(), strict=True))
