# SPDX-License-Identifier: Apache-2.0
"""Proxmox Backup Server's fixed index: SHA-256 of every chunk of a disk, 4 MiB each as a rule.

    0      magic 8 | uuid 16 | ctime i64 | SHA-256 of the table 32 | size u64 | chunk size u64 | zeros
    4096   table: 32 bytes a chunk, in order (the last chunk may be partial)

Little-endian; source: pbs-datastore/src/fixed_index.rs and file_formats.rs of proxmox-backup. Of an encrypted
backup the table holds keyed hashes instead, which nothing in the index tells: such a reference makes every
chunk look different, which is needless but never wrong.
"""

from __future__ import annotations

import hashlib
import os
import struct

import numpy as np

from dirtymap import bitmap, errors, units
from dirtymap.images import hashed

SUFFIX = ".fidx"

# The first 8 bytes of SHA-256("Proxmox Backup fixed sized chunk index v1.0").
_MAGIC = hashlib.sha256(b"Proxmox Backup fixed sized chunk index v1.0").digest()[:8]
_HEADER = struct.Struct("<8s16sq32sQQ")
_HEADER_LENGTH = 4096
# What a thread holds in memory, several times. The server makes chunks of 4 MiB.
_LARGEST_CHUNK = 64 * units.MIB
# The table of a disk of 1 PiB at the smallest chunk; more is no index.
_LONGEST_TABLE = 8 << 30


def hash_of(data: memoryview) -> bytes:
    """Return the SHA-256 hash of `data`."""
    return hashlib.sha256(data).digest()


def open_index(path: str) -> hashed.HashedReference:
    """Open the index at `path`; the caller closes it. Raises ImageError where it is not whole."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise errors.ImageError(path, f"cannot be opened: {errors.reason(error)}") from None
    try:
        return _open(path, fd)
    except OSError as error:
        os.close(fd)
        raise errors.ImageError(path, f"cannot be read: {errors.reason(error)}") from None
    except BaseException:
        os.close(fd)
        raise


def _open(path: str, fd: int) -> hashed.HashedReference:
    header = os.pread(fd, _HEADER_LENGTH, 0)
    if header[: len(_MAGIC)] != _MAGIC:
        raise errors.ImageError(path, "is no fixed index of Proxmox Backup Server")
    if len(header) < _HEADER_LENGTH:
        raise errors.ImageError(path, "is cut short")
    _, _, _, checksum, size, chunk = _HEADER.unpack_from(header)
    possible = units.SMALLEST_GRANULARITY <= chunk <= _LARGEST_CHUNK
    if size == 0 or not possible or chunk & (chunk - 1):
        raise errors.ImageError(path, f"is of {size} bytes in chunks of {chunk}: not possible here")
    length = bitmap.segments_of(size, chunk) * hashed.HASH_LENGTH
    if length > _LONGEST_TABLE or os.fstat(fd).st_size != _HEADER_LENGTH + length:
        raise errors.ImageError(path, "is cut short, or longer than it should be")
    zeros = bitmap.Bitmap(size, chunk)
    if _read_table(fd, zeros) != checksum:
        raise errors.ImageError(path, "is damaged: its checksum does not fit")
    return hashed.HashedReference(path, fd, _HEADER_LENGTH, zeros, hash_of, packed=False)


def _read_table(fd: int, zeros: bitmap.Bitmap) -> bytes:
    """Mark the chunks whose hash is that of zeros, and return the table's checksum."""
    zero = np.frombuffer(hash_of(memoryview(bytes(zeros.granularity))), np.uint8)
    checksum = hashlib.sha256()
    step = 1 << 15
    for first in range(0, zeros.segments, step):
        count = min(step, zeros.segments - first)
        at = _HEADER_LENGTH + first * hashed.HASH_LENGTH
        part = os.pread(fd, count * hashed.HASH_LENGTH, at)
        checksum.update(part)
        if len(part) == count * hashed.HASH_LENGTH:
            table = np.frombuffer(part, np.uint8).reshape(count, hashed.HASH_LENGTH)
            zeros.set_where(first, (table == zero).all(axis=1))
    return checksum.digest()
