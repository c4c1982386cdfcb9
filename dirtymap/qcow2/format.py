# SPDX-License-Identifier: Apache-2.0
"""The structures of a qcow2 file that a dirty map needs, bytes <-> fields; no I/O.

Each structure is the specification's table of fields, in its order and with its names (QEMU,
docs/interop/qcow2.txt); all numbers are big-endian. A header is followed by its extensions,
each padded to 8 bytes; the bitmaps extension names the bitmap directory, whose entries name
one bitmap table each, and a table entry names one cluster of bits:

    header | extensions     bitmap directory        bitmap table       clusters of bits
    ... 0x23852875 -------> entry: name, flags ---> [0, 1, OFFSET] --> LSB first
"""

from __future__ import annotations

import dataclasses
import functools
import struct
import typing
from collections.abc import Iterator
from typing import Annotated, Self

import numpy as np

U8 = Annotated[int, "B"]
U16 = Annotated[int, "H"]
U32 = Annotated[int, "I"]
U64 = Annotated[int, "Q"]

MAGIC = 0x514649FB  # "QFI\xfb"
EXTENSION_END = 0
EXTENSION_BITMAPS = 0x23852875

INCOMPATIBLE_CORRUPT = 1 << 1
INCOMPATIBLE_DATA_FILE = 1 << 2
INCOMPATIBLE_EXTENDED_L2 = 1 << 4
INCOMPATIBLE_KNOWN = 0b11111  # QEMU 10's: bit 0 is dirty refcounts, 3 the compression type
AUTOCLEAR_BITMAPS = 1 << 0  # cleared by a program that knows no bitmaps: they are worthless then

BITMAP_IN_USE = 1 << 0  # contents are worthless: not saved, or open for writing now
BITMAP_AUTO = 1 << 1  # recording
BITMAP_FLAGS_KNOWN = BITMAP_IN_USE | BITMAP_AUTO  # QEMU refuses any other, extra data included
BITMAP_TYPE = 1  # "dirty tracking bitmap", the only type there is

GRANULARITY_BITS = range(9, 32)  # 512 B to 2 GiB
CLUSTER_BITS = range(9, 22)  # 512 B to 2 MiB
NAME_LIMIT = 1023  # bytes of UTF-8

# What QEMU 7.2 and 10.0 hold to (block/qcow2.h, block/qcow2-bitmap.c); a file beyond cannot be opened.
BITMAPS_LIMIT = 65535
DIRECTORY_LIMIT = 1024 * BITMAPS_LIMIT  # bytes
BITMAP_LIMIT = 512 << 20  # bytes of one bitmap in whole clusters
L1_LIMIT = 32 << 20  # bytes

ENTRY_OFFSET = 0x00FFFFFFFFFFFE00
ENTRY_RESERVED = 0xFF000000000001FE
ENTRY_ZEROS = 0
ENTRY_ONES = 1


class FormatError(ValueError):
    """The bytes are no structure of a valid file; str() says which and why."""


class Structure:
    """A frozen dataclass whose fields, in order, are the structure's; their types say the width."""

    @classmethod
    @functools.cache
    def codec(cls) -> struct.Struct:
        hints = typing.get_type_hints(cls, include_extras=True)
        fields = dataclasses.fields(cls)  # type: ignore[arg-type]  # each subclass is a dataclass
        return struct.Struct(">" + "".join(hints[field.name].__metadata__[0] for field in fields))

    @classmethod
    def length(cls) -> int:
        """The structure's bytes."""
        return cls.codec().size

    @classmethod
    def unpack(cls, data: bytes, start: int = 0) -> Self:
        """The structure at `start`; FormatError when the data ends before it does."""
        if start < 0 or start + cls.length() > len(data):
            raise FormatError(f"is damaged: ends in the middle of its {cls.__name__}")
        return cls(*cls.codec().unpack_from(data, start))

    def pack(self) -> bytes:
        """The structure's bytes."""
        return self.codec().pack(*vars(self).values())


@dataclasses.dataclass(frozen=True)
class Header(Structure):
    """Version 3's header without the fields a later version may add behind it."""

    magic: U32
    version: U32
    backing_file_offset: U64
    backing_file_size: U32
    cluster_bits: U32
    size: U64
    crypt_method: U32
    l1_size: U32
    l1_table_offset: U64
    refcount_table_offset: U64
    refcount_table_clusters: U32
    nb_snapshots: U32
    snapshots_offset: U64
    incompatible_features: U64
    compatible_features: U64
    autoclear_features: U64
    refcount_order: U32
    header_length: U32

    @property
    def cluster_size(self) -> int:
        return 1 << self.cluster_bits


@dataclasses.dataclass(frozen=True)
class ExtensionHeader(Structure):
    """What each header extension begins with; its data follow, padded to 8 bytes."""

    type: U32
    data_length: U32


@dataclasses.dataclass(frozen=True)
class BitmapsExtension(Structure):
    """The data of the bitmaps extension."""

    nb_bitmaps: U32
    reserved32: U32
    bitmap_directory_size: U64
    bitmap_directory_offset: U64


@dataclasses.dataclass(frozen=True)
class DirectoryEntry(Structure):
    """One bitmap's entry without what follows it: extra data, name, padding to 8 bytes."""

    bitmap_table_offset: U64
    bitmap_table_size: U32
    flags: U32
    type: U8
    granularity_bits: U8
    name_size: U16
    extra_data_size: U32


def pad(data: bytes) -> bytes:
    """`data` with zeros up to the next multiple of 8 bytes."""
    return data + bytes(-len(data) % 8)


def pack_extension(kind: int, data: bytes) -> bytes:
    """One header extension."""
    return ExtensionHeader(kind, len(data)).pack() + pad(data)


def unpack_extensions(data: bytes, start: int, end: int) -> Iterator[tuple[int, bytes]]:
    """The extensions (type, data) between the header and `end`, up to the end marker."""
    while start + ExtensionHeader.length() <= end:
        header = ExtensionHeader.unpack(data, start)
        if header.type == EXTENSION_END:
            return
        start += ExtensionHeader.length()
        if header.data_length > end - start:
            raise FormatError("is damaged: a header extension goes beyond the header's cluster")
        yield header.type, data[start : start + header.data_length]
        start += header.data_length + -header.data_length % 8


def pack_directory_entry(entry: DirectoryEntry, name: bytes) -> bytes:
    """A bitmap's entry, without extra data: QEMU refuses any."""
    return pad(entry.pack() + name)


def unpack_directory(data: bytes, count: int) -> Iterator[tuple[DirectoryEntry, bytes]]:
    """`count` entries (fields, name), which must fill the directory exactly."""
    start = 0
    for _ in range(count):
        entry = DirectoryEntry.unpack(data, start)
        name_start = start + DirectoryEntry.length() + entry.extra_data_size
        name_end = name_start + entry.name_size
        start = name_end + -name_end % 8
        if start > len(data):
            raise FormatError("is damaged: a bitmap's directory entry goes beyond the directory")
        yield entry, data[name_start:name_end]
    if start != len(data):
        raise FormatError("is damaged: the bitmap directory is longer than its entries")


def pack_table(entries: np.ndarray[typing.Any, np.dtype[np.uint64]]) -> bytes:
    """A bitmap table of offsets, ENTRY_ZEROS and ENTRY_ONES."""
    return entries.astype(">u8").tobytes()


def unpack_table(data: bytes) -> np.ndarray[typing.Any, np.dtype[np.uint64]]:
    """A bitmap table's entries; FormatError when a reserved bit is set."""
    entries = np.frombuffer(data, dtype=">u8").astype(np.uint64)
    reserved = entries & np.uint64(ENTRY_RESERVED)
    # Bit 0 means "all ones" only where there is no offset; it is reserved beside one.
    beside = (entries & np.uint64(ENTRY_OFFSET) != 0) & (entries & np.uint64(ENTRY_ONES) != 0)
    if reserved.any() or beside.any():
        raise FormatError("is damaged: a bitmap table entry has a reserved bit set")
    return entries


def l1_entries(size: int, cluster_size: int) -> int:
    """How many L1 entries a disk of `size` bytes needs; QEMU refuses fewer, even with no data."""
    return -(-size // (cluster_size * (cluster_size // 8)))


def table_entries(size: int, granularity: int, cluster_size: int) -> int:
    """How many bitmap table entries a bitmap has; QEMU refuses any other number."""
    return -(-size // (granularity * 8 * cluster_size))
