# SPDX-License-Identifier: Apache-2.0
"""Where everything lies in a carrier, and its metadata; pure.

Every part has its place whatever the bits are, so that a carrier's length depends on its geometry only:

    cluster    0       1               2               3          4      5 ...       ...
               header  refcount table  refcount block  directory  table  L1 (zeros)  bits

A cluster of bits that are all 0 or all 1 is told by its table entry: its place is then a hole, with
refcount 0. One cluster for each of the fixed parts is always enough with clusters of 64 KiB: QEMU's
limit of 512 MiB a bitmap means 8192 table entries (64 KiB), its limit for L1 means 512 clusters, and
one refcount block counts 32768.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dirtymap import errors, units
from dirtymap.qcow2 import format as qcow2

CLUSTER_BITS = 16
CLUSTER = 1 << CLUSTER_BITS
_REFCOUNT_ORDER = 4  # 16 bits a cluster, what QEMU makes too

Entries = np.ndarray[Any, np.dtype[np.uint64]]


def virtual_size(size: int) -> int:
    """The size QEMU gives a raw disk of `size` bytes, and a carrier must have: whole sectors."""
    return -(-size // 512) * 512


@dataclass(frozen=True)
class Layout:
    """The places of a carrier's parts, in bytes; made by `of`."""

    size: int  # virtual
    granularity: int
    name: bytes

    @property
    def l1_entries(self) -> int:
        return qcow2.l1_entries(self.size, CLUSTER)

    @property
    def table_entries(self) -> int:
        return qcow2.table_entries(self.size, self.granularity, CLUSTER)

    refcount_table_offset = 1 * CLUSTER
    refcount_block_offset = 2 * CLUSTER
    directory_offset = 3 * CLUSTER
    table_offset = 4 * CLUSTER
    l1_offset = 5 * CLUSTER

    @property
    def data_offset(self) -> int:
        return self.l1_offset + -(-self.l1_entries * 8 // CLUSTER) * CLUSTER

    @property
    def length(self) -> int:
        """The file's length, whatever its bits are."""
        return self.data_offset + self.table_entries * CLUSTER


def encode_name(name: str) -> bytes:
    """A bitmap's name as qcow2 stores it; UserError where QEMU would not take it."""
    try:
        encoded = name.encode()
    except UnicodeEncodeError:
        raise errors.UserError(f"the bitmap's name {name!r} is no valid text") from None
    if not 1 <= len(encoded) <= qcow2.NAME_LIMIT or b"\0" in encoded:
        raise errors.UserError(
            f"a bitmap's name has 1 to {qcow2.NAME_LIMIT} bytes, not {len(encoded)}"
            if b"\0" not in encoded
            else f"the bitmap's name {name!r} holds a zero byte"
        )
    return encoded


def of(size: int, granularity: int, name: str) -> Layout:
    """The layout for a disk of `size` bytes; UserError where no qcow2 can hold such a map."""
    encoded = encode_name(name)
    if size <= 0:
        raise errors.UserError("a disk of 0 bytes has no dirty map: QEMU takes no empty bitmap")
    if (
        granularity & (granularity - 1)
        or granularity.bit_length() - 1 not in qcow2.GRANULARITY_BITS
    ):
        raise errors.UserError(f"a bitmap cannot have a granularity of {granularity} bytes")
    made = Layout(virtual_size(size), granularity, encoded)
    if made.l1_entries * 8 > qcow2.L1_LIMIT:
        raise errors.UserError(f"{units.describe(size)} is more than a map file can describe")
    if made.table_entries * CLUSTER > qcow2.BITMAP_LIMIT:
        raise errors.UserError(
            f"a map of {units.describe(size)} at a granularity of {units.human(granularity)} is "
            f"larger than QEMU's {units.human(qcow2.BITMAP_LIMIT)}: choose a coarser granularity"
        )
    return made


def clusters(layout: Layout, data: npt.NDArray[np.uint8]) -> Entries:
    """The bitmap table for packed bits: an offset where the cluster of bits has to be stored."""
    places = np.arange(layout.table_entries, dtype=np.uint64) * np.uint64(CLUSTER)
    entries = places + np.uint64(layout.data_offset)
    whole = len(data) // CLUSTER
    words = data[: whole * CLUSTER].view(np.uint64).reshape(whole, CLUSTER // 8)
    entries[:whole][words.max(axis=1, initial=0) == 0] = qcow2.ENTRY_ZEROS
    all_ones = np.uint64(2**64 - 1)
    entries[:whole][words.min(axis=1, initial=all_ones) == all_ones] = qcow2.ENTRY_ONES
    # The last cluster is mostly partial, and its bits beyond the disk's end are 0: never "all ones".
    if whole < len(entries) and not data[whole * CLUSTER :].any():
        entries[whole] = qcow2.ENTRY_ZEROS
    return entries


def metadata(layout: Layout, entries: Entries, *, in_use: bool = False) -> list[tuple[int, bytes]]:
    """Every part (offset, bytes) but the bits and the L1 table's zeros; the header comes first.

    `in_use` makes the bitmap one that its recorder has not saved: nobody may take its bits.
    """
    return [
        (0, _header(layout)),
        (layout.refcount_table_offset, layout.refcount_block_offset.to_bytes(8, "big")),
        (layout.refcount_block_offset, _refcounts(layout, entries)),
        (layout.directory_offset, _directory(layout, qcow2.BITMAP_IN_USE if in_use else 0)),
        (layout.table_offset, qcow2.pack_table(entries)),
    ]


def _header(layout: Layout) -> bytes:
    header = qcow2.Header(
        magic=qcow2.MAGIC,
        version=3,
        backing_file_offset=0,
        backing_file_size=0,
        cluster_bits=CLUSTER_BITS,
        size=layout.size,
        crypt_method=0,
        l1_size=layout.l1_entries,
        l1_table_offset=layout.l1_offset,
        refcount_table_offset=layout.refcount_table_offset,
        refcount_table_clusters=1,
        nb_snapshots=0,
        snapshots_offset=0,
        incompatible_features=0,
        compatible_features=0,
        autoclear_features=qcow2.AUTOCLEAR_BITMAPS,
        refcount_order=_REFCOUNT_ORDER,
        header_length=qcow2.Header.length(),
    )
    bitmaps = qcow2.BitmapsExtension(1, 0, len(_directory(layout)), layout.directory_offset)
    return (
        header.pack()
        + qcow2.pack_extension(qcow2.EXTENSION_BITMAPS, bitmaps.pack())
        + qcow2.pack_extension(qcow2.EXTENSION_END, b"")
    )


def _directory(layout: Layout, flags: int = 0) -> bytes:
    entry = qcow2.DirectoryEntry(
        bitmap_table_offset=layout.table_offset,
        bitmap_table_size=layout.table_entries,
        flags=flags,
        type=qcow2.BITMAP_TYPE,
        granularity_bits=layout.granularity.bit_length() - 1,
        name_size=len(layout.name),
        extra_data_size=0,
    )
    return qcow2.pack_directory_entry(entry, layout.name)


def _refcounts(layout: Layout, entries: Entries) -> bytes:
    """The refcount block: 1 for every cluster in use, itself included."""
    counts = np.zeros(layout.length // CLUSTER, dtype=">u2")
    first = layout.data_offset // CLUSTER
    counts[:first] = 1
    counts[first:] = entries > qcow2.ENTRY_ONES
    return counts.tobytes()
