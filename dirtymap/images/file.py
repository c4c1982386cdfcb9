# SPDX-License-Identifier: Apache-2.0
"""Raw images: a regular file or a block device, byte for byte the guest's disk."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
import time
from collections.abc import Iterator, Sequence

from dirtymap import errors, extent
from dirtymap.images import lock, loop, pagecache

# include/uapi/linux/fs.h: whether the device takes no writes.
_BLKROGET = 0x125E


class FileImage:
    """The raw image at `path`; use `open_file`.

    `held` are descriptors that keep locks on what lies behind it; they are closed with it.
    """

    def __init__(
        self, path: str, fd: int, size: int, *, writable: bool, held: Sequence[int] = ()
    ) -> None:
        self.name = path
        self.path = os.path.abspath(path)
        self.size = size
        self.writable = writable
        self.fd = fd
        self._held = list(held)
        self._reader = pagecache.Reader(fd)

    def read_into(self, start: int, buffer: memoryview) -> None:
        """Fill `buffer` from `start` on and leave the page cache as it was; raises OSError."""
        self._reader.read_into(start, buffer)

    def read_gently(self, start: int, buffer: memoryview) -> None:
        """Do the same in short copies; raises OSError."""
        self._reader.read_into(start, buffer, gently=True)

    def read(self, start: int, length: int) -> bytes:
        """Return the bytes from `start` on, through the page cache, as a guest reads; raises OSError."""
        parts = bytearray()
        while len(parts) < length:
            part = os.pread(self.fd, length - len(parts), start + len(parts))
            if not part:
                raise OSError(errno.EIO, "the file has become shorter")
            if len(part) == length:
                return part
            parts += part
        return bytes(parts)

    def write(self, start: int, buffer: bytes | memoryview) -> None:
        """Write all of `buffer` at `start`; raises OSError."""
        view = memoryview(buffer)
        while view:
            done = os.pwrite(self.fd, view, start)
            start += done
            view = view[done:]

    def flush(self, datasync: bool = True) -> None:
        """Return when everything written is on stable storage."""
        (os.fdatasync if datasync else os.fsync)(self.fd)

    def extents(
        self, start: int, length: int, deadline: float | None = None
    ) -> Iterator[extent.Extent]:
        """Yield data and holes as SEEK_DATA and SEEK_HOLE know them (lseek(2)).

        A hole of a regular file reads as zeros. What cannot be told, or not before `deadline`, is data.
        """
        return extent.join(self._extents(start, start + length, deadline))

    def _extents(self, start: int, end: int, deadline: float | None) -> Iterator[extent.Extent]:
        while start < end:
            if deadline is not None and time.monotonic() >= deadline:
                break
            try:
                data = min(self._seek(start, os.SEEK_DATA), end)
                hole = min(self._seek(data, os.SEEK_HOLE), end) if data < end else end
            except OSError:
                break
            yield extent.Extent(start, data - start, zero=True, hole=True)
            yield extent.data(data, hole - data)
            if hole <= start:
                break
            start = hole
        if start < end:
            yield extent.data(start, end - start)

    def _seek(self, start: int, whence: int) -> int:
        try:
            return os.lseek(self.fd, start, whence)
        except OSError as error:
            # "whence is SEEK_DATA and the file offset is inside a hole at the end of the file", or
            # beyond it: what was cut off after opening reads as an error, not as zeros.
            at_end = error.errno == errno.ENXIO and whence == os.SEEK_DATA
            if at_end and self.present() == self.size:
                return self.size
            raise

    def present(self) -> int:
        """Return how many of the `size` bytes there are now: fewer where the file was cut off meanwhile.

        0 where that cannot be told.
        """
        try:
            return min(self.size, os.lseek(self.fd, 0, os.SEEK_END))
        except OSError:
            return 0

    def reader(self) -> FileImage:
        """Return the same image opened once more for reading, without locks of its own.

        A scan's advice to the kernel (POSIX_FADV_RANDOM) would otherwise be the guest's too. The caller closes it.
        """
        fd = os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY | os.O_CLOEXEC)
        return FileImage(self.name, fd, self.size, writable=False)

    def close(self) -> None:
        """Close the file and with it its locks."""
        self._reader.close()
        while self._held:
            os.close(self._held.pop())
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def open_file(path: str, *, writable: bool = False) -> FileImage:
    """Open the raw file or block device at `path` and lock it as QEMU would; the caller closes it.

    What lies behind a loop device is locked too: it is the same disk. Raises ImageError where the image is
    missing, not readable or writable, empty, neither a file nor a block device, or in use by somebody else.
    """
    flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        if writable and stat.S_ISBLK(os.stat(path).st_mode):
            # Refused by the kernel while a file system on the device is mounted (open(2)).
            flags |= os.O_EXCL
        fd = os.open(path, flags)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise errors.ImageError(path, "is mounted or otherwise in use: release it") from None
        if error.errno == errno.EISDIR:
            raise errors.ImageError(path, "is a directory, not an image") from None
        raise errors.ImageError(path, f"cannot be opened: {errors.reason(error)}") from None
    try:
        size = _size(fd, path)
        if writable:
            _check_takes_writes(fd, path)
        lock.take(fd, path, writing=writable)
        if writable:
            loop.check_over(fd, path)
        held = loop.lock_behind(fd, path, writable=writable)
        return FileImage(path, fd, size, writable=writable, held=held)
    except BaseException:
        os.close(fd)
        raise


def _size(fd: int, path: str) -> int:
    mode = os.fstat(fd).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        kind = "a directory" if stat.S_ISDIR(mode) else "neither a file nor a block device"
        raise errors.ImageError(path, f"is {kind}, not an image")
    size = os.lseek(fd, 0, os.SEEK_END)
    if size == 0:
        raise errors.ImageError(path, "is empty: there is nothing to compare")
    return size


def _check_takes_writes(fd: int, path: str) -> None:
    """Refuse a device that was opened for writing and will fail every write."""
    if stat.S_ISBLK(os.fstat(fd).st_mode):
        (read_only,) = struct.unpack("=i", fcntl.ioctl(fd, _BLKROGET, bytes(4)))
        if read_only:
            raise errors.ImageError(path, "is a read-only device: it can be mounted --read-only")


def identity(fd: int) -> tuple[int, int, int]:
    """Return what two names of the same bytes have in common.

    For a loop device that is its backing file, also over further loop devices; two partitions or offsets of one
    file count as the same, which is a doubt that only ever refuses.
    """
    found = loop.behind(fd)
    if found is None:
        status = os.fstat(fd)
        if stat.S_ISBLK(status.st_mode):
            return (1, status.st_rdev, 0)
        return (0, status.st_dev, status.st_ino)
    if not found.rdevice:
        return (0, found.device, found.inode)
    try:
        deeper = loop.open_node(found.rdevice)
    except OSError:
        return (1, found.rdevice, 0)
    try:
        return identity(deeper)
    finally:
        os.close(deeper)
