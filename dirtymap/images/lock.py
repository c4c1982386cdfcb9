# SPDX-License-Identifier: Apache-2.0
"""QEMU's image locks, so that posthoc and QEMU keep out of each other's way.

QEMU (block/file-posix.c, "raw_apply_lock_bytes") holds shared open-file-description locks on single
bytes of the image, one for each permission:

    byte 100 + n    "I use permission n"
    byte 200 + n    "nobody else may use permission n"

and asks, without taking it, for an exclusive lock of the opposite byte. n is 0 for consistent reads,
1 for writes, 2 for writes of unchanged data, 3 for resizing.
"""

import errno
import fcntl
import os
import struct

from dirtymap import errors

_USED, _UNSHARED = 100, 200
_READ, _WRITE, _RESIZE = 0, 1, 3

# struct flock with 64-bit offsets, padded to its end: l_type, l_whence, l_start, l_len, l_pid.
_FLOCK = struct.Struct("@hhqqi0q")

# What file systems without such locks answer; QEMU goes on without locks there too.
_NO_LOCKS = {errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


def take(fd: int, name: str, *, writing: bool) -> None:
    """Lock the image open as `fd` against other writers until `fd` is closed.

    `writing` says that we write ourselves. Raises ImageError where a QEMU (or another posthoc) has the
    image open in a way that does not go with it.
    """
    used = [_READ, _WRITE] if writing else [_READ]
    try:
        for permission in used:
            _share(fd, _USED + permission)
        for permission in (_WRITE, _RESIZE):
            _share(fd, _UNSHARED + permission)
        conflict = any(_held(fd, _UNSHARED + permission) for permission in used) or any(
            _held(fd, _USED + permission) for permission in (_WRITE, _RESIZE)
        )
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return
        # A shared lock is refused only where somebody holds an exclusive one.
        conflict = True
    if conflict:
        release(fd)
        raise errors.ImageError(
            name, "is in use by another program (QEMU or posthoc): stop it first, or use its copy"
        )


def hold(path: str) -> int:
    """Open the file at `path` and lock it against writers; closing the descriptor ends that.

    Raises ImageError.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise errors.ImageError(path, f"cannot be opened: {errors.reason(error)}") from None
    try:
        take(fd, path, writing=False)
    except BaseException:
        os.close(fd)
        raise
    return fd


def release(fd: int) -> None:
    """Give up what `take` took."""
    # All bytes from 100 to 299.
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _flock(fcntl.F_UNLCK, _USED, 200))


def _share(fd: int, byte: int) -> None:
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _flock(fcntl.F_RDLCK, byte, 1))


def _held(fd: int, byte: int) -> bool:
    """Return whether another open file description holds `byte`."""
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _flock(fcntl.F_WRLCK, byte, 1))
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)


def _flock(kind: int, start: int, length: int) -> bytes:
    return _FLOCK.pack(kind, os.SEEK_SET, start, length, 0)
