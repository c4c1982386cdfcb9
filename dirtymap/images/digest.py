# SPDX-License-Identifier: Apache-2.0
"""A digest: a manifest of an image, one BLAKE3 hash a segment, that stands as a reference without it.

    0      header, 256 bytes (HEADER below, checksum of itself at its end)
    256    zeros: a bit a segment, LSB first, set where the segment reads as zeros; padded to 8 bytes
    ...    hashes: 32 bytes for every segment whose bit is clear, in order

    All numbers are little-endian. A hash is over the segment's bytes, the last one's possibly fewer; 32
    zero bytes stand for a segment that could not be read and equals nothing.

The whole file is checked when it is opened: a manifest that is damaged could call equal what differs.
"""

from __future__ import annotations

import errno
import os
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent import futures
from dataclasses import dataclass

import blake3
import numpy as np

from dirtymap import bitmap, errors, units
from dirtymap.images import base, hashed
from dirtymap.qcow2 import atomic

SUFFIX = ".digest"

_MAGIC = b"PHDIGEST"
_VERSION = 1
_BLAKE3 = 1
_HEADER_LENGTH = 256
_CHECKSUM = 32
# magic, version, header's length, algorithm, granularity's bits, size, hashes, checksums of both parts
_HEADER = struct.Struct("<8sIIIIQQ32s32s")

# Bytes read at once for hashing, and extents asked for at once.
_CHUNK = 1 << 20
_WINDOW = 1 << 30
_PATIENCE = 1.0


def hash_of(data: memoryview) -> bytes:
    """Return the BLAKE3 hash of `data`."""
    return blake3.blake3(data).digest()


@dataclass(frozen=True)
class Summary:
    """What a manifest was made of; all in bytes but `granularity` and the file's `length`."""

    size: int
    granularity: int
    zeros: int
    read: int
    unreadable: int
    length: int


def write(
    path: str,
    image: base.Image,
    granularity: int,
    *,
    workers: int = 2,
    read_all: bool = False,
    progress: Callable[[int], None] = lambda _: None,
) -> Summary:
    """Write the manifest of `image` to `path`, at once or not at all.

    What the image says is zeros is not read unless `read_all`. `progress` is told the bytes done. Raises
    GoneError where the image is lost, UserError where the file cannot be written.
    """
    maker = _Maker(image, units.check_granularity(granularity), read_all=read_all)
    try:
        with atomic.replacement(path) as fd:
            return maker.write(fd, workers, progress)
    except base.GoneError:
        raise
    except atomic.UnsyncedError as error:
        raise errors.MapError(path, errors.reason(error)) from None
    except OSError as error:
        raise errors.MapError(path, f"cannot be written: {errors.reason(error)}") from None


@dataclass(frozen=True)
class _Part:
    """One chunk's hashes: `zeros` marks what turned out to be zeros and is not in `table`."""

    start: int
    end: int
    zeros: np.ndarray
    table: bytes
    unreadable: int


class _Maker:
    """Makes one manifest."""

    def __init__(self, image: base.Image, granularity: int, *, read_all: bool) -> None:
        self._image = image
        self._granularity = granularity
        self._read_all = read_all
        self._zeros = bitmap.Bitmap(image.size, granularity)
        last = image.size - (self._zeros.segments - 1) * granularity
        self._zero_hashes = {
            length: hash_of(memoryview(bytes(length))) for length in {granularity, last}
        }
        self._buffers = threading.local()

    def write(self, fd: int, workers: int, progress: Callable[[int], None]) -> Summary:
        bits_length = bitmap.buffer_length(self._image.size, self._granularity)
        position = begin = _HEADER_LENGTH + bits_length
        checksum = blake3.blake3()
        read = unreadable = 0
        for part in self._parts(workers):
            self._zeros.set_where(part.start // self._granularity, part.zeros)
            atomic.write_all(fd, position, memoryview(part.table))
            checksum.update(part.table)
            position += len(part.table)
            read += part.end - part.start
            unreadable += part.unreadable
            progress(part.end)
        bits = self._zeros.data.tobytes().ljust(bits_length, b"\0")
        atomic.write_all(fd, _HEADER_LENGTH, memoryview(bits))
        header = _pack(
            self._image.size,
            self._granularity,
            (position - begin) // hashed.HASH_LENGTH,
            (hash_of(memoryview(bits)), checksum.digest()),
        )
        atomic.write_all(fd, 0, memoryview(header))
        progress(self._image.size)
        zeros = self._zeros.dirty_bytes()
        return Summary(self._image.size, self._granularity, zeros, read, unreadable, position)

    def _parts(self, workers: int) -> Iterator[_Part]:
        """Yield the hashes of all chunks in order, a few of them in the making."""
        with futures.ThreadPoolExecutor(workers, thread_name_prefix="digest") as pool:
            making: deque[futures.Future[_Part]] = deque()
            try:
                for start, end in self._chunks():
                    making.append(pool.submit(self._hash, start, end))
                    if len(making) > 2 * workers:
                        yield making.popleft().result()
                while making:
                    yield making.popleft().result()
            finally:
                for future in making:
                    future.cancel()

    def _chunks(self) -> Iterator[tuple[int, int]]:
        """Yield what has to be read, in whole segments; mark the rest as zeros."""
        size = self._image.size
        step = max(_CHUNK, self._granularity)
        for window in range(0, size, _WINDOW):
            window_end = min(window + _WINDOW, size)
            for start, end in self._data(window, window_end):
                for at in range(start, end, step):
                    yield at, min(at + step, end)

    def _data(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield the parts of [start, end) that are not known to be zeros, grown to whole segments."""
        if self._read_all:
            yield start, end
            return
        unit, done = self._granularity, start
        for found in self._image.extents(start, end - start, time.monotonic() + _PATIENCE):
            if not found.zero:
                continue
            first = -(-found.start // unit) * unit
            last = found.end if found.end == self._image.size else found.end // unit * unit
            if first >= last:
                continue
            self._zeros.set_range(first, last - first)
            if done < first:
                yield done, first
            done = last
        if done < end:
            yield done, end

    def _hash(self, start: int, end: int) -> _Part:
        buffer = self._buffer(end - start)
        try:
            self._image.read_into(start, buffer)
        except base.GoneError:
            raise
        except OSError:
            return self._hash_one_by_one(start, end)
        return self._part(
            start, end, [self._segment(buffer, at) for at in self._offsets(start, end)]
        )

    def _hash_one_by_one(self, start: int, end: int) -> _Part:
        hashes: list[bytes] = []
        for at in self._offsets(start, end):
            length = min(self._granularity, end - start - at)
            buffer = self._buffer(length)
            try:
                self._image.read_into(start + at, buffer)
                hashes.append(hash_of(buffer))
            except base.GoneError:
                raise
            except OSError:
                hashes.append(hashed.UNKNOWN)
        return self._part(start, end, hashes)

    def _offsets(self, start: int, end: int) -> range:
        return range(0, end - start, self._granularity)

    def _segment(self, buffer: memoryview, at: int) -> bytes:
        return hash_of(buffer[at : at + self._granularity])

    def _part(self, start: int, end: int, hashes: list[bytes]) -> _Part:
        lengths = [min(self._granularity, end - start - at) for at in self._offsets(start, end)]
        zeros = [
            found == self._zero_hashes.get(length)
            for found, length in zip(hashes, lengths, strict=True)
        ]
        table = b"".join(found for found, zero in zip(hashes, zeros, strict=True) if not zero)
        unreadable = sum(
            length for found, length in zip(hashes, lengths, strict=True) if found == hashed.UNKNOWN
        )
        return _Part(start, end, np.array(zeros, np.bool_), table, unreadable)

    def _buffer(self, length: int) -> memoryview:
        buffer: memoryview | None = getattr(self._buffers, "memory", None)
        if buffer is None or len(buffer) < length:
            buffer = self._buffers.memory = memoryview(bytearray(length))
        return buffer[:length]


def _pack(size: int, granularity: int, hashes: int, checksums: tuple[bytes, bytes]) -> bytes:
    fields = _HEADER.pack(
        _MAGIC,
        _VERSION,
        _HEADER_LENGTH,
        _BLAKE3,
        granularity.bit_length() - 1,
        size,
        hashes,
        *checksums,
    )
    header = fields.ljust(_HEADER_LENGTH - _CHECKSUM, b"\0")
    return header + hash_of(memoryview(header))


def open_digest(path: str) -> hashed.HashedReference:
    """Open the manifest at `path`; the caller closes it. Raises ImageError where it is not whole."""
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
        raise errors.ImageError(path, "is no digest of posthoc's")
    body, checksum = header[:-_CHECKSUM], header[-_CHECKSUM:]
    if len(header) < _HEADER_LENGTH or hash_of(memoryview(body)) != checksum:
        raise errors.ImageError(path, "is damaged: the header's checksum does not fit")
    _, version, header_length, algorithm, bits, size, hashes, *checksums = _HEADER.unpack_from(body)
    if (version, header_length, algorithm) != (_VERSION, _HEADER_LENGTH, _BLAKE3):
        raise errors.ImageError(path, f"is of version {version}, which this posthoc does not know")
    if size == 0 or not 9 <= bits <= 21:
        raise errors.ImageError(path, "is damaged: it is of no possible disk")
    granularity = 1 << bits
    bits_length = bitmap.buffer_length(size, granularity)
    begin = _HEADER_LENGTH + bits_length
    if os.fstat(fd).st_size != begin + hashes * hashed.HASH_LENGTH:
        raise errors.ImageError(path, "is cut short, or longer than it should be")
    for start, end, wanted in (
        (_HEADER_LENGTH, begin, checksums[0]),
        (begin, begin + hashes * hashed.HASH_LENGTH, checksums[1]),
    ):
        if _checksum(fd, start, end) != wanted:
            raise errors.ImageError(path, "is damaged: its checksum does not fit")
    zeros = bitmap.Bitmap(size, granularity, _read(fd, _HEADER_LENGTH, bits_length))
    reference = hashed.HashedReference(path, fd, begin, zeros, hash_of, packed=True)
    if reference.entries != hashes:
        raise errors.ImageError(path, "is damaged: it has not as many hashes as it says")
    return reference


def _read(fd: int, start: int, length: int) -> bytearray:
    """Return all of [start, start + length); one call may read less (2 GiB, a signal)."""
    found = bytearray(length)
    left = memoryview(found)
    while left:
        count = os.preadv(fd, [left], start)
        if not count:
            raise OSError(errno.EIO, "the file has become shorter")
        start += count
        left = left[count:]
    return found


def _checksum(fd: int, start: int, end: int) -> bytes:
    checksum = blake3.blake3()
    while start < end:
        part = os.pread(fd, min(_CHUNK, end - start), start)
        if not part:
            break
        checksum.update(part)
        start += len(part)
    return checksum.digest()
