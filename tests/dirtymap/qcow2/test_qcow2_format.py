# SPDX-License-Identifier: Apache-2.0
"""The structures of a qcow2 file: fields to bytes and back."""

import numpy as np
import pytest

from dirtymap.qcow2 import format as qcow2


@pytest.mark.parametrize(
    ("structure", "length"),
    [
        (qcow2.Header, 104),
        (qcow2.ExtensionHeader, 8),
        (qcow2.BitmapsExtension, 24),
        (qcow2.DirectoryEntry, 24),
    ],
)
def test_a_structure_has_the_specification_s_length(
    structure: type[qcow2.Structure], length: int
) -> None:
    assert structure.length() == length


def test_a_directory_entry_is_big_endian_in_the_specification_s_order() -> None:
    entry = qcow2.DirectoryEntry(0x50000, 3, 2, 1, 16, 4, 0)
    expected = "0000000000050000 00000003 00000002 01 10 0004 00000000"
    assert entry.pack() == bytes.fromhex(expected)
    assert qcow2.DirectoryEntry.unpack(b"x" + entry.pack(), 1) == entry


@pytest.mark.parametrize("start", [-1, 1, 24, 1 << 70])
def test_a_structure_that_is_cut_off_is_an_error(start: int) -> None:
    with pytest.raises(qcow2.FormatError):
        qcow2.DirectoryEntry.unpack(bytes(24), start)


def test_extensions_are_padded_and_end_at_the_marker() -> None:
    data = qcow2.pack_extension(7, b"abc") + qcow2.pack_extension(8, b"")
    data += qcow2.pack_extension(qcow2.EXTENSION_END, b"") + qcow2.pack_extension(9, b"no")
    assert list(qcow2.unpack_extensions(data, 0, len(data))) == [(7, b"abc"), (8, b"")]


def test_extensions_may_fill_the_cluster_without_a_marker() -> None:
    data = qcow2.pack_extension(7, b"12345678")
    assert list(qcow2.unpack_extensions(data, 0, len(data))) == [(7, b"12345678")]


def test_an_extension_beyond_the_cluster_is_an_error() -> None:
    data = qcow2.ExtensionHeader(7, 9).pack() + bytes(8)
    with pytest.raises(qcow2.FormatError):
        list(qcow2.unpack_extensions(data, 0, len(data)))


def entry(name: bytes, extra: int = 0) -> bytes:
    fields = qcow2.DirectoryEntry(0x50000, 1, 0, 1, 16, len(name), extra)
    return qcow2.pad(fields.pack() + bytes(extra) + name)


def test_directory_entries_follow_each_other_at_multiples_of_8() -> None:
    data = entry(b"one") + entry(b"four four", extra=5)
    assert [name for _, name in qcow2.unpack_directory(data, 2)] == [b"one", b"four four"]


@pytest.mark.parametrize(
    ("data", "count"),
    [
        pytest.param(entry(b"one"), 2, id="fewer-than-counted"),
        pytest.param(entry(b"one") + entry(b"two"), 1, id="more-than-counted"),
        pytest.param(entry(b"one")[:-8], 1, id="name-cut-off"),
    ],
)
def test_a_directory_is_exactly_its_entries(data: bytes, count: int) -> None:
    with pytest.raises(qcow2.FormatError):
        list(qcow2.unpack_directory(data, count))


def test_a_table_is_offsets_and_two_constants() -> None:
    entries = np.array([0, 1, 0x50000], np.uint64)
    assert qcow2.pack_table(entries).hex() == "0" * 16 + "0" * 15 + "1" + "0000000000050000"
    assert qcow2.unpack_table(qcow2.pack_table(entries)).tolist() == [0, 1, 0x50000]


@pytest.mark.parametrize("entry", [0x50001, 2, 1 << 56, 1 << 63])
def test_a_reserved_bit_in_a_table_is_an_error(entry: int) -> None:
    with pytest.raises(qcow2.FormatError):
        qcow2.unpack_table(entry.to_bytes(8, "big"))


@pytest.mark.parametrize(
    ("size", "granularity", "entries"),
    [
        pytest.param(1, 512, 1, id="one-byte"),
        pytest.param(512 * 8 * 65536, 512, 1, id="one-cluster-full"),
        pytest.param(512 * 8 * 65536 + 1, 512, 2, id="one-bit-more"),
        pytest.param(2 << 40, 512, 8192, id="the-format-s-edge"),
        pytest.param(2 << 40, 65536, 64, id="usual"),
    ],
)
def test_a_table_has_as_many_entries_as_the_bits_have_clusters(
    size: int, granularity: int, entries: int
) -> None:
    assert qcow2.table_entries(size, granularity, 65536) == entries


@pytest.mark.parametrize(
    ("size", "entries"), [(1, 1), (512 << 20, 1), ((512 << 20) + 1, 2), (2 << 50, 4 << 20)]
)
def test_an_l1_entry_spans_512_mib(size: int, entries: int) -> None:
    assert qcow2.l1_entries(size, 65536) == entries
