# SPDX-License-Identifier: Apache-2.0
"""Reads that leave the page cache as they found it.

A scan reads two whole disks once. Left in the cache they would push out what the guest works with, and
readahead would fetch what the next thread is about to ask for. So each read goes by what was in the cache
before this reader came near:

    all of it       read from there
    not all of it   read around it (O_DIRECT), which brings nothing in and costs no copy
    neither         (no O_DIRECT here, or not aligned to it) read through it; what was not there is dropped behind

Before: a page that somebody has read ahead up to carries a mark, and whoever reads it, from the cache too, sets off
the kernel's readahead of what lies behind (page_cache_async_ra(); no advice stops it). Looked at later, that would
count as cached, and its own mark would go on to the end of the disk.

An O_DIRECT read sees what was written through the cache: the kernel writes that out first (open(2), NOTES).
Measured, 2 x 512 MiB that are not cached, two threads: RWF_DONTCACHE left 10 % of them in the cache, because
readahead of one thread meets the other's reads, and was no faster.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import itertools
import mmap
import os
import threading

# O_DIRECT wants start, length and memory on a logical block; this holds for every disk there is.
_BLOCK = 4096
# The cache is looked at in units of so many bytes, at one page where that is there: half a microsecond each.
_UNIT = 256 << 10
# Units that are looked at before a read comes to them: farther than readahead gets, of which 8 MiB are in use.
_AHEAD = (32 << 20) // _UNIT
# Units that are looked at in one go; of these one in so many first.
_STRIDE = (16 << 20) // _UNIT
_SPARSE = 4
# Units behind a read that are dropped with it: what was on its way then, and folios that reach beyond one read,
# which are dropped whole or not at all.
_BEHIND = (8 << 20) // _UNIT

# A gentle read copies so much at once: kernels without preemption (most distributions') let nobody else on the CPU
# before a copy of one or a few folios is over, 0.1 ms for 1 MiB. Halving it again cost the scan a third.
_GENTLE = 64 << 10
_ALL = 1 << 30

Range = tuple[int, int]

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
_mincore = _libc.mincore
_mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
_PAGE_MASK = -mmap.PAGESIZE
_FAILED = ctypes.c_void_p(-1).value


class Reader:
    """Reads of the file or device open as `fd`, which stays the caller's. The caller closes it."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._residency = _Residency(fd)
        self._direct: int | None = None
        self._opened = False
        self._through = -_AHEAD * _UNIT
        self._lock = threading.Lock()

    def read_into(self, start: int, buffer: memoryview, *, gently: bool = False) -> None:
        """Fill `buffer` from `start` on; raises OSError, EIO where the file ends before that.

        Gently: in copies so short that others get the CPU in between.
        """
        length = len(buffer)
        if self._residency.was_cached(start, length):
            self._fill_through(start, buffer, gently=gently)
            return
        if (start | length) % _BLOCK == 0 and (direct := self._around()) is not None:
            done = _some(direct, start, buffer)
            if done is not None:
                # Where it ended early, it may not go on unaligned.
                _fill(self._fd, start + done, buffer[done:])
                if start - self._through < _AHEAD * _UNIT:
                    # Readahead may have got here.
                    self._drop(start + length)
                return
        # What readahead brings in beyond this read, nobody drops at the end.
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_RANDOM)
        self._fill_through(start, buffer, gently=gently)
        self._drop(start + length)

    def _fill_through(self, start: int, buffer: memoryview, *, gently: bool) -> None:
        self._through = start + len(buffer)
        _fill(self._fd, start, buffer, _GENTLE if gently else _ALL)

    def _drop(self, end: int) -> None:
        for first, last in self._residency.absent_before(end):
            os.posix_fadvise(self._fd, first, last - first, os.POSIX_FADV_DONTNEED)

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


def _fill(fd: int, start: int, buffer: memoryview, at_once: int = _ALL) -> None:
    done = 0
    while done < len(buffer):
        got = os.preadv(fd, [buffer[done : done + at_once]], start + done)
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
    """Which pages of a file were in the page cache, by mincore(2) over a mapping that is never touched.

    Not being touched, it cannot raise SIGBUS, whatever becomes of the file. May be asked by several threads.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._size = os.lseek(fd, 0, os.SEEK_END)
        address = _libc.mmap(None, max(self._size, 1), mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
        self._address: int | None = None if address in (None, _FAILED) else address
        # Of the units in `_known` those that were not all there, with the ranges of the pages that were not.
        self._absent: dict[int, list[Range]] = {}
        self._known = range(0)
        self._lock = threading.Lock()

    def was_cached(self, start: int, length: int) -> bool:
        """Return whether the range was in the cache, before anything near it was read through this."""
        first, stop = start // _UNIT, -(-(start + length) // _UNIT)
        with self._lock:
            if not (self._known.start <= first and stop + _AHEAD <= self._known.stop):
                self._look_ahead(first, stop)
            absent = self._absent
            return not absent or not any(unit in absent for unit in range(first, stop))

    def absent_before(self, end: int) -> list[Range]:
        """Return the ranges that were not there, up to the unit in which `end` is and from a few before it."""
        stop = -(-end // _UNIT)
        joined: list[Range] = []
        with self._lock:
            for unit in range(stop - _BEHIND, stop):
                for first, last in self._absent.get(unit, ()):
                    if joined and joined[-1][1] == first:
                        first = joined.pop()[0]
                    joined.append((first, last))
        return joined

    def _look_ahead(self, first: int, stop: int) -> None:
        known = self._known
        if known.start <= first <= known.stop + _AHEAD:
            # In strides: a look by itself costs little, coming here for each of them more.
            stop += _AHEAD + _STRIDE
        else:
            # A jump to somewhere: one read sets off one readahead at most.
            self._absent.clear()
            known = range(first, first)
        self._look(known.stop, stop)
        self._known = range(max(known.start, first - _AHEAD), max(known.stop, stop))
        for unit in range(known.start, self._known.start):
            self._absent.pop(unit, None)

    def _look(self, first: int, stop: int) -> None:
        stop = min(stop, -(-self._size // _UNIT))
        # Of a disk that is cached altogether this is all that is seen, and costs a quarter.
        if all(map(self._is_there, range(stop - 1, first - 1, -_SPARSE))):
            return
        data = 0
        for unit in range(first, stop):
            start, end = unit * _UNIT, min((unit + 1) * _UNIT, self._size)
            if end <= data or self._address is None:
                self._absent[unit] = [(start, end)]
            elif not self._is_there(unit):
                self._absent[unit] = self._absent_pages(start, end)
                data = self._next_data(end)

    def _is_there(self, unit: int) -> bool:
        """Look at the last page: whoever reads from the front and stops within leaves that out."""
        if self._address is None:
            return False
        last = (min((unit + 1) * _UNIT, self._size) - 1) & _PAGE_MASK
        page = ctypes.c_ubyte()
        return _mincore(self._address + last, 1, ctypes.byref(page)) == 0 and page.value & 1 == 1

    def _next_data(self, start: int) -> int:
        """Return up to where there is nothing that could be cached, `start` where that is not known."""
        try:
            return os.lseek(self._fd, start, os.SEEK_DATA)
        except OSError as error:
            return self._size if error.errno == errno.ENXIO else start

    def _absent_pages(self, start: int, end: int) -> list[Range]:
        pages = self.pages(start, -(-(end - start) // mmap.PAGESIZE))
        return [
            (start + run[0] * mmap.PAGESIZE, start + (run[-1] + 1) * mmap.PAGESIZE)
            for there, grouped in itertools.groupby(range(len(pages)), lambda page: pages[page] & 1)
            if not there and (run := list(grouped))
        ]

    def pages(self, start: int, count: int) -> bytearray:
        """Return mincore's byte for each page, 0 where it does not say."""
        pages = bytearray(count)
        into = (ctypes.c_ubyte * count).from_buffer(pages)
        _mincore((self._address or 0) + start, count * mmap.PAGESIZE, into)
        return pages

    def close(self) -> None:
        address, self._address = self._address, None
        if address is not None:
            _libc.munmap(address, max(self._size, 1))
