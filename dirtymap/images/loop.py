# SPDX-License-Identifier: Apache-2.0
"""Loop devices (loop(4)): what lies behind one, and which ones lie over a file.

    /dev/loop1 ── /dev/loop0 ── disk.raw         behind(loop1) is loop0, behind(loop0) is disk.raw

All names of one disk's bytes: a lock or a claim on one of them says nothing to who opens another.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import struct
from dataclasses import dataclass
from pathlib import Path

from dirtymap import errors
from dirtymap.images import lock

# include/uapi/linux/loop.h: struct loop_info64 begins with lo_device, lo_inode and lo_rdevice.
_GET_STATUS64 = 0x4C05
_INFO64_LENGTH = 232
_BEGINNING = struct.Struct("=QQQ")


@dataclass(frozen=True)
class Behind:
    """What a loop device lies over: an inode, and the device's number where that is a device's node.

    `path` is the kernel's name for it, which another namespace may not have.
    """

    device: int
    inode: int
    rdevice: int
    path: str

    def is_at(self, status: os.stat_result) -> bool:
        """Whether `status` is of the same file, or of a node of the same device."""
        if self.rdevice:
            return stat.S_ISBLK(status.st_mode) and status.st_rdev == self.rdevice
        return (status.st_dev, status.st_ino) == (self.device, self.inode)


def behind(fd: int) -> Behind | None:
    """Return what is behind the loop device open as `fd`; None where it is none, or cannot be told."""
    status = os.fstat(fd)
    folder = _loop_folder(status.st_rdev) if stat.S_ISBLK(status.st_mode) else None
    return None if folder is None else _behind(fd, folder)


def _behind(fd: int, folder: Path) -> Behind | None:
    try:
        info = fcntl.ioctl(fd, _GET_STATUS64, bytes(_INFO64_LENGTH))
        device, inode, rdevice = _BEGINNING.unpack_from(info)
        return Behind(device, inode, rdevice, _path(folder))
    except OSError:
        return None


def _loop_folder(rdevice: int) -> Path | None:
    """Return sysfs's folder of the loop device of this number, or of the one that it is a partition of."""
    where = Path(f"/sys/dev/block/{os.major(rdevice)}:{os.minor(rdevice)}").resolve()
    for folder in (where, where.parent):
        if (folder / "loop/backing_file").exists():
            return folder
    return None


def _path(folder: Path) -> str:
    # One newline is the kernel's; any other belongs to the name.
    return os.fsdecode((folder / "loop/backing_file").read_bytes()).removesuffix("\n")


def device_name(fd: int) -> str:
    """Return the name of the whole loop device open as `fd`, itself or a partition."""
    folder = _loop_folder(os.fstat(fd).st_rdev)
    return "" if folder is None else f"/dev/{folder.name}"


def open_node(rdevice: int) -> int:
    """Open the block device of this number for reading, whatever its node is called; OSError."""
    folder = Path(f"/sys/dev/block/{os.major(rdevice)}:{os.minor(rdevice)}").resolve()
    return os.open(Path("/dev", folder.name), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)


def writers_over(fd: int) -> list[str]:
    """Return the loop devices right over the file or device open as `fd` through which it may be written."""
    status = os.fstat(fd)
    found = []
    for folder in Path("/sys/block").glob("loop*"):
        # A device may go at any moment.
        with contextlib.suppress(OSError):
            if (folder / "ro").read_text().strip() == "0" and _is_over(folder, status):
                found.append(f"/dev/{folder.name}")
    return sorted(found)


def _is_over(folder: Path, status: os.stat_result) -> bool:
    path = _path(folder)
    try:
        fd = os.open(Path("/dev", folder.name), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        # Only root may ask the device itself; its file's name is there for everybody.
        return os.path.samestat(os.stat(path), status)
    try:
        found = _behind(fd, folder)
    finally:
        os.close(fd)
    return found is not None and found.is_at(status)


def check_over(fd: int, path: str, *, but: str | None = None) -> None:
    """Raise ImageError where the disk open as `fd` can be written through a loop device other than `but`."""
    over = [device for device in writers_over(fd) if device != but]
    if over:
        raise errors.ImageError(
            path, f"can be written through {', '.join(over)}: detach it first (losetup -d)"
        )


def lock_behind(fd: int, name: str, *, writable: bool) -> list[int]:
    """Lock what is behind the loop device `fd`, down to the last; return what keeps the locks, to be closed.

    Nothing for any other image. What this process cannot reach (a deleted file, a file of another namespace) is
    not locked. Raises ImageError where it is in use, or can be written past `fd`.
    """
    held: list[int] = []
    try:
        while (deeper := _open_behind(fd, name, writable=writable)) is not None:
            held.append(deeper)
            lock.take(deeper, _described(fd, name), writing=writable)
            if writable:
                check_over(deeper, _described(fd, name), but=device_name(fd))
            fd = deeper
    except BaseException:
        for opened in held:
            os.close(opened)
        raise
    return held


def _described(fd: int, name: str) -> str:
    found = behind(fd)
    return name if found is None else f"{name} ({found.path})"


def _open_behind(fd: int, name: str, *, writable: bool) -> int | None:
    """Open what is behind the loop device `fd`, a device for nobody else's writing; None where that is nothing."""
    found = behind(fd)
    if found is None:
        return None
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        deeper = os.open(found.path, flags | (os.O_EXCL if writable and found.rdevice else 0))
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise errors.ImageError(
                _described(fd, name), "is mounted or otherwise in use: release it"
            ) from None
        return None
    if found.is_at(os.fstat(deeper)):
        return deeper
    os.close(deeper)
    return None
