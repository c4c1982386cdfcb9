# SPDX-License-Identifier: Apache-2.0
"""fallocate(2) of the disk, as it reaches pyfuse3: under another name, since pyfuse3 knows no FALLOCATE.

The server in front of pyfuse3 (datapath/native/forward.c) makes a SETXATTR of it:

    name    posthoc.fallocate
    value   mode, offset, length: three little-endian words of 64 bits

A second name, posthoc.drain, with no value, is a question of its own: it is answered when every change that was
asked for before it is done and answered (native/control.c says what for).

What is taken and what is refused is the same as where the server does the work itself (native/disk.c).
"""

from __future__ import annotations

import errno
import os
import struct
from dataclasses import dataclass

FALLOCATE, DRAIN = b"posthoc.fallocate", b"posthoc.drain"
VALUE = struct.Struct("<QQQ")

# From <linux/falloc.h>.
KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 1, 2, 16


@dataclass(frozen=True, slots=True)
class Change:
    """Bytes [start, start + length), within the disk, that are to read as zeros; `punch`: and to take no space."""

    start: int
    length: int
    punch: bool


def change(value: bytes, size: int) -> Change:
    """Return what the packed call asks of a disk of `size` bytes; raises OSError as fallocate(2) would.

    QEMU zeroes a range without KEEP_SIZE, which is the same thing within the disk. Where the size is kept, a
    range that crosses the end ends there, as on a block device.
    """
    try:
        mode, start, length = VALUE.unpack(value)
    except struct.error:
        raise _refused(errno.EINVAL) from None
    if mode not in (PUNCH_HOLE | KEEP_SIZE, ZERO_RANGE | KEEP_SIZE, ZERO_RANGE):
        raise _refused(errno.EOPNOTSUPP)
    if start + length > size and not mode & KEEP_SIZE:
        raise _refused(errno.EFBIG)
    if length == 0 or start >= size:
        raise _refused(errno.EINVAL)
    return Change(start, min(length, size - start), bool(mode & PUNCH_HOLE))


def _refused(number: int) -> OSError:
    return OSError(number, os.strerror(number))
