# SPDX-License-Identifier: Apache-2.0
"""Reads that leave the page cache as they found it.

A scan reads two whole disks once. Left in the cache they would push out what the guest works with, and
readahead would fetch what the next thread is about to ask for. So each read first looks, at a few pages,
whether its range is in the cache:

    it is       read from there
    it is not   read around it (O_DIRECT), which brings nothing in and costs no copy
    neither     (no O_DIRECT here, or not aligned to it) read through it; what was not there is dropped behind

An O_DIRECT read sees what was written through the cache: the kernel writes that out first (open(2), NOTES).
Measured, 2 x 512 MiB that are not cached, two threads: RWF_DONTCACHE left 10 % of them in the cache, because
readahead of one thread meets the other's reads, and was no faster.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import threading

import numpy as np
import numpy.typing as npt

# O_DIRECT wants start, length and memory on a logical block; this holds for every disk there is.
_BLOCK = 4096
# One page in so many bytes is looked at: a system call of half a microsecond each.
_STRIDE = 256 << 10

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
    """Reads of the file or device open as `fd`, which stays the caller's. The caller closes it."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._residency = _Residency(fd)
        self._direct: int | None = None
        self._opened = False
        self._lock = threading.Lock()

    def read_into(self, start: int, buffer: memoryview) -> None:
        """Fill `buffer` from `start` on; raises OSError, EIO where the file ends before that."""
        length = len(buffer)
        if self._residency.is_cached(start, length):
            _fill(self._fd, start, buffer)
            return
        if (start | length) % _BLOCK == 0 and (direct := self._around()) is not None:
            done = _some(direct, start, buffer)
            if done is not None:
                # Where it ended early, it may not go on unaligned.
                _fill(self._fd, start + done, buffer[done:])
                return
        # What readahead brought in for the next read would then count as cached before.
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_RANDOM)
        absent = self._residency.absent(start, length)
        _fill(self._fd, start, buffer)
        for first, count in absent:
            os.posix_fadvise(self._fd, first, count, os.POSIX_FADV_DONTNEED)

    def _around(self) -> int | None:
        """Return a descriptor that reads around the cache, None where there is no such thing."""
        if not self._opened:
            with self._lock:
                if not self._opened:
                    with contextlib.suppress(OSError):
                        self._direct = os.open(
                            f"/proc/self/fd/{self._fd}", os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC
                        )
                    self._opened = True
        return self._direct

    def close(self) -> None:
        """Let go of what was opened beside `fd`. May be called more than once."""
        direct, self._direct = self._direct, None
        self._opened = True
        if direct is not None:
            os.close(direct)
        self._residency.close()


def _fill(fd: int, start: int, buffer: memoryview) -> None:
    done = 0
    while done < len(buffer):
        got = os.preadv(fd, [buffer[done:]], start + done)
        if got == 0:
            raise OSError(errno.EIO, f"the file ends at {start + done}, it was longer before")
        done += got


def _some(direct: int, start: int, buffer: memoryview) -> int | None:
    """Return how many bytes were read at once, None where this cannot be read around the cache."""
    try:
        return os.preadv(direct, [buffer], start)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
            return None
        raise


class _Residency:
    """Which pages of a file are in the page cache, by mincore(2) over a mapping that is never touched.

    Not being touched, it cannot raise SIGBUS, whatever becomes of the file.
    """

    def __init__(self, fd: int) -> None:
        self._size = os.lseek(fd, 0, os.SEEK_END)
        address = _libc.mmap(None, max(self._size, 1), mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
        self._address: int | None = None if address in (None, _FAILED) else address

    def is_cached(self, start: int, length: int) -> bool:
        """Return whether the pages looked at, a few of the range, are all there."""
        last = start + length - 1
        page = ctypes.c_ubyte()
        return all(
            self._look(at, 1, ctypes.addressof(page)) and bool(page.value & 1)
            for at in (*range(start, last, _STRIDE), last)
        )

    def absent(self, start: int, length: int) -> list[tuple[int, int]]:
        """Return (start, length) of the runs of pages around the range that are not there."""
        head = start // mmap.PAGESIZE * mmap.PAGESIZE
        pages = np.zeros(-(-(start + length - head) // mmap.PAGESIZE), np.uint8)
        if not self._look(head, len(pages), pages.ctypes.data):
            return []
        return [
            (head + first * mmap.PAGESIZE, count * mmap.PAGESIZE)
            for first, count in _runs(pages & 1 == 0)
        ]

    def _look(self, start: int, pages: int, into: int) -> bool:
        if self._address is None or start >= self._size:
            return False
        at = self._address + start // mmap.PAGESIZE * mmap.PAGESIZE
        return bool(_libc.mincore(at, pages * mmap.PAGESIZE, into) == 0)

    def close(self) -> None:
        address, self._address = self._address, None
        if address is not None:
            _libc.munmap(address, max(self._size, 1))


def _runs(mask: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:
    edges = np.diff(mask.view(np.int8), prepend=0, append=0)
    starts, ends = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    return list(zip(starts.tolist(), (ends - starts).tolist(), strict=True))
