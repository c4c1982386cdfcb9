# SPDX-License-Identifier: Apache-2.0
"""The memory that the native data path's processes share: the mirror of native/shared.h.

    header | slots | rows | restart | session | written | taken | scan

A memfd of fixed size, sealed against any other. Whoever holds a descriptor of it holds all that must
outlive a process: the session, the keeper, its standby and the server are each replaced without it. Numbers are
64-bit words that C writes atomically; this side reads them at any time and writes only what is not
being served yet, `restart`, `session`, and that all is `ending`.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os

import numpy as np
import numpy.typing as npt

from dirtymap import bitmap
from overlayfs import recorder

MAGIC = 0x31687461706F7470
VERSION = 2
SLOTS = 26
ROWS = 4096
SUSPECTS = 128
SPARE_SLOTS = 10
MOST_THREADS = SLOTS - SPARE_SLOTS
SWAP_NONE, SWAP_TAKING, SWAP_TAKEN = range(3)

_PAGE = 4096
_RESTART_LENGTH = 4 * _PAGE
_SESSION_LENGTH = 16 * _PAGE
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL

_GEOMETRY = [
    *(
        "magic",
        "version",
        "length",
        "size",
        "granularity_bits",
        "read_only",
        "threads",
        "max_write",
    ),
    *("slots_offset", "rows_offset", "restart_offset", "restart_length"),
    *("session_offset", "session_length", "written_offset", "taken_offset", "bitmap_length"),
    *("scan_offset", "scan_length"),
]
_STATE = [
    *(
        "kernel_flags",
        "granted_flags",
        "init_length",
        "init_epoch",
        "answered",
        "epoch",
        "swap_state",
    ),
    *("keeper_pid", "keeper_start", "server_pid", "server_start", "standby_pid", "standby_start"),
    *("ending", "servers", "locked", "sessions", "attributes_length", "passing", "suspected"),
]


class Header(ctypes.LittleEndianStructure):
    """struct shared_header."""

    _fields_ = [
        *((name, ctypes.c_uint64) for name in _GEOMETRY + _STATE),
        ("attributes", ctypes.c_uint8 * 104),
        ("init", ctypes.c_uint8 * 256),
        ("suspects", ctypes.c_uint64 * 2 * SUSPECTS),
    ]


class Slot(ctypes.LittleEndianStructure):
    """struct shared_slot, with the padding that makes it whole cache lines."""

    _fields_ = [
        ("sequence", ctypes.c_uint64),
        ("requests", ctypes.c_uint64),
        ("unique", ctypes.c_uint64),
        ("kinds", ctypes.c_uint64 * (recorder.KINDS * recorder.KIND_WORDS)),
        ("padding", ctypes.c_uint8 * 40),
    ]


class Row(ctypes.LittleEndianStructure):
    """struct shared_row."""

    _fields_ = [
        ("unique", ctypes.c_uint64),
        ("nodeid", ctypes.c_uint64),
        ("opcode", ctypes.c_uint32),
        ("epoch", ctypes.c_uint32),
        ("deliveries", ctypes.c_uint32),
        ("sent", ctypes.c_uint32),
    ]


def layout() -> list[str]:
    """Return what `posthoc-datapath --layout` prints, in its order."""
    lines = [f"magic {MAGIC:x} {VERSION}"]
    for name, count, kind in (("header", 0, Header), ("slot", SLOTS, Slot), ("row", ROWS, Row)):
        lines.append(f"{name} {count} {ctypes.sizeof(kind)}")
        for field, *_ in kind._fields_:
            if field != "padding":
                where = getattr(kind, field)
                lines.append(f"{name}.{field} {where.offset} {where.size}")
    return lines


def _padded(length: int) -> int:
    return -(-length // _PAGE) * _PAGE


class Memory:
    """The shared memory behind the descriptor `fd`, which it owns. Its views outlive `close`."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._map = mmap.mmap(fd, 0)
        self.header = Header.from_buffer(self._map)
        if (self.header.magic, self.header.version) != (MAGIC, VERSION):
            raise ValueError("the shared memory is of another version of posthoc")

    @classmethod
    def create(
        cls,
        size: int,
        granularity: int,
        *,
        threads: int,
        max_write: int,
        read_only: bool = False,
        scan_length: int = 0,
    ) -> Memory:
        """Make it for a disk of `size` bytes; all bits clear."""
        bits = bitmap.buffer_length(size, granularity)
        parts = {
            "header": ctypes.sizeof(Header),
            "slots": SLOTS * ctypes.sizeof(Slot),
            "rows": ROWS * ctypes.sizeof(Row),
            "restart": _RESTART_LENGTH,
            "session": _SESSION_LENGTH,
            "written": bits,
            "taken": bits,
            "scan": scan_length,
        }
        offsets: dict[str, int] = {}
        total = 0
        for name, length in parts.items():
            offsets[name] = total
            total += _padded(length)
        fd = os.memfd_create("posthoc", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.truncate(fd, total)
        # What a writer needs has its memory now: where there is none later, the server would die of its first mark,
        # and so would the next one.
        os.posix_fallocate(fd, 0, offsets["taken"])
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        with mmap.mmap(fd, 0) as memory:
            header = Header(
                magic=MAGIC,
                version=VERSION,
                length=total,
                size=size,
                granularity_bits=granularity.bit_length() - 1,
                read_only=read_only,
                threads=threads,
                max_write=max_write,
                restart_length=_RESTART_LENGTH,
                session_length=_SESSION_LENGTH,
                bitmap_length=bits,
                scan_length=scan_length,
                epoch=1,
                **{f"{n}_offset": offsets[n] for n in parts if n != "header"},
            )
            memory[: ctypes.sizeof(Header)] = bytes(header)
        return cls(fd)

    @property
    def size(self) -> int:
        """Bytes of the disk."""
        return int(self.header.size)

    @property
    def granularity(self) -> int:
        """Bytes of a segment."""
        return 1 << int(self.header.granularity_bits)

    @property
    def fuse_minor(self) -> int:
        """The minor version of the kernel's FUSE protocol, as its INIT request says; 0 before that."""
        # struct fuse_in_header is 40 bytes, then come major and minor.
        return int.from_bytes(bytes(self.header.init[44:48]), "little")

    def _part(self, start: int, length: int) -> npt.NDArray[np.uint8]:
        return np.frombuffer(self._map, np.uint8, count=length, offset=start)

    @property
    def written(self) -> bitmap.Bitmap:
        """The write bitmap; only C changes it."""
        part = self._part(self.header.written_offset, self.header.bitmap_length)
        return bitmap.Bitmap(self.size, self.granularity, part)

    @property
    def taken(self) -> bitmap.Bitmap:
        """What the last swap took, until it is committed or given back."""
        part = self._part(self.header.taken_offset, self.header.bitmap_length)
        return bitmap.Bitmap(self.size, self.granularity, part)

    @property
    def scan(self) -> npt.NDArray[np.uint8]:
        """The scanner's part: writable, zero at first, unknown here."""
        return self._part(self.header.scan_offset, self.header.scan_length)

    @property
    def slots(self) -> npt.NDArray[np.uint64]:
        """One row of words for each thread of the server, as `Slot` has them."""
        words = self._part(self.header.slots_offset, SLOTS * ctypes.sizeof(Slot)).view(np.uint64)
        return words.reshape(SLOTS, -1)

    def write_restart(self, command: list[str]) -> None:
        """Set the command line that starts a new session; [] for none. ValueError if too long.

        What stands there already is not written again: a session killed meanwhile would leave none.
        """
        if command and not os.path.isabs(command[0]):
            raise ValueError(f"{command[0]} is not an absolute path")
        data = b"".join(os.fsencode(word) + b"\0" for word in command) + b"\0"
        if len(data) > self.header.restart_length:
            raise ValueError("the command line is too long")
        start = self.header.restart_offset
        if self._map[start : start + len(data)] == data:
            return
        # The first byte last: whoever reads meanwhile finds no command.
        self._map[start] = 0
        self._map[start + 1 : start + len(data)] = data[1:]
        self._map[start] = data[0]

    @property
    def session(self) -> bytes:
        """What a session left for the next one."""
        where, room = self._session_half(self._map[self.header.session_offset])
        length = int.from_bytes(self._map[where : where + 8], "little")
        return self._map[where + 8 : where + 8 + min(length, room)]

    def write_session(self, data: bytes) -> None:
        """Leave `data` for the next session; ValueError if it is too long."""
        current = self._map[self.header.session_offset]
        where, room = self._session_half(not current)
        if len(data) > room:
            raise ValueError("a session's description is too long")
        self._map[where : where + 8 + len(data)] = len(data).to_bytes(8, "little") + data
        # One byte decides: killed at any moment, the former description is whole, or this one is.
        self._map[self.header.session_offset] = not current

    def _session_half(self, which: int) -> tuple[int, int]:
        """Return where one of the session's two halves begins, with 8 bytes of length, and its room behind."""
        half = (self.header.session_length - 8) // 2
        return self.header.session_offset + 8 + which * half, half - 8

    def close(self) -> None:
        """Close the descriptor; idempotent. Views stay valid: the memory goes with the last of them."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class SharedRecorder(recorder.Recorder):
    """The write bitmap and statistics as the server writes them; this side only reads."""

    def __init__(self, memory: Memory) -> None:
        self.written = memory.written
        self._slots = memory.slots
        statistics = recorder.KINDS * recorder.KIND_WORDS
        self._counters = self._slots[:, 3 : 3 + statistics]

    @property
    def depth(self) -> int:
        """How many requests the server is in at this moment."""
        return int((self._slots[:, 1] & 1).sum())

    @depth.setter
    def depth(self, value: int) -> None:
        raise TypeError("the server counts its own depth")

    def mark(self, start: int, length: int) -> None:
        """Refuse: a plain read-modify-write here would lose marks of the server's."""
        raise TypeError("only the server marks")

    def account(self, kind: int, length: int, nanoseconds: int, *, failed: bool = False) -> None:
        """Refuse: the server counts."""
        raise TypeError("only the server counts")

    def statistics(self) -> recorder.GuestStatistics:
        """Return the counters of all threads, and of all servers there have been, as they stand."""
        return recorder.statistics_of(self._counters.sum(axis=0, dtype=np.uint64))

    def swap(self) -> bitmap.Bitmap:
        """Refuse: the keeper swaps, see `NativeDatapath.swap`."""
        raise TypeError("only the keeper swaps")
