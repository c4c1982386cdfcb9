# SPDX-License-Identifier: Apache-2.0
"""The carrier as others see it: QEMU's tools, and our own reader."""

import pathlib
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dirtymap import bitmap, errors
from dirtymap.qcow2 import carrier, layout
from tests import qemu

MIB = 1 << 20
TIB = 1 << 40


def dirty(size: int, granularity: int, *runs: tuple[int, int]) -> bitmap.Bitmap:
    made = bitmap.Bitmap(size, granularity)
    for first, count in runs:
        made.set(first, count)
    return made


def scattered(size: int, granularity: int, seed: int = 1) -> bitmap.Bitmap:
    """A bitmap with about half of its bits set."""
    made = bitmap.Bitmap(size, granularity)
    made.set_where(0, np.random.default_rng(seed).random(made.segments) < 0.5)
    return made


def in_memory(made: bitmap.Bitmap) -> carrier.Carrier:
    """The carrier of a bitmap as it stands now: its bits are copied once."""
    return carrier.Carrier(carrier.layout(made.size, made.granularity), made.data.copy())


@pytest.mark.parametrize(
    ("size", "granularity", "runs", "extents"),
    [
        pytest.param(MIB, 65536, [], [], id="clean"),
        pytest.param(MIB, 65536, [(0, 16)], [(0, MIB)], id="all-dirty"),
        pytest.param(MIB, 65536, [(0, 1), (15, 1)], [(0, 65536), (MIB - 65536, 65536)], id="ends"),
        pytest.param(1, 512, [(0, 1)], [(0, 512)], id="one-byte"),
        pytest.param(100_001, 512, [(195, 1)], [(99_840, 512)], id="last-partial-sector"),
        pytest.param(100_001, 4096, [(24, 1)], [(98_304, 2048)], id="last-partial-segment"),
        pytest.param(3 * MIB, 2 * MIB, [(1, 1)], [(2 * MIB, MIB)], id="coarsest"),
        pytest.param(
            300 * MIB, 512, [(9, 1), (524_290, 3)], [(4608, 512), (268_436_480, 1536)], id="finest"
        ),
        pytest.param(
            600 * MIB, 512, [(0, 600_000)], [(0, 600_000 * 512)], id="a-cluster-of-ones-and-a-part"
        ),
        pytest.param(TIB, 65536, [(16_777_215, 1)], [(TIB - 65536, 65536)], id="1-tib-last"),
    ],
)
def test_qemu_reads_exactly_the_bits_that_were_written(
    tmp_path: pathlib.Path,
    size: int,
    granularity: int,
    runs: list[tuple[int, int]],
    extents: list[tuple[int, int]],
) -> None:
    """check finds nothing wrong, info shows the bitmap, and its extents are the dirty ones."""
    path = tmp_path / "carrier.qcow2"
    carrier.write(path, dirty(size, granularity, *runs))
    qemu.check(path)
    info = qemu.info(path, "qcow2")
    assert info["virtual-size"] == carrier.virtual_size(size)
    assert qemu.bitmaps(path) == [{"flags": [], "name": "posthoc", "granularity": granularity}]
    assert qemu.dirty_extents(path) == extents


@pytest.mark.parametrize("granularity", [512, 4096, 65536, 2 * MIB])
def test_a_bitmap_read_back_is_the_one_written(tmp_path: pathlib.Path, granularity: int) -> None:
    path = tmp_path / "carrier.qcow2"
    written = scattered(300 * MIB, granularity)
    carrier.write(path, written)
    assert carrier.read(path) == written


def test_an_odd_size_is_read_back_in_whole_sectors(tmp_path: pathlib.Path) -> None:
    """QEMU knows sectors only; the segments and their bits are the same."""
    path = tmp_path / "carrier.qcow2"
    written = dirty(1_000_001, 512, (1953, 1))
    carrier.write(path, written)
    found = carrier.read(path)
    assert (found.size, found.segments) == (1_000_448, written.segments)
    assert np.array_equal(found.data, written.data)


@given(
    size=st.integers(1, 1 << 34),
    granularity_bits=st.integers(9, 21),
    runs=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), max_size=6),
)
def test_any_bitmap_survives_the_carrier(
    tmp_path_factory: pytest.TempPathFactory,
    size: int,
    granularity_bits: int,
    runs: list[tuple[float, float]],
) -> None:
    """Runs of every length, so that clusters of zeros, of ones and mixed ones occur."""
    path = tmp_path_factory.getbasetemp() / "any.qcow2"
    written = bitmap.Bitmap(size, 1 << granularity_bits)
    for where, share in runs:
        start = int(where * (size - 1))
        written.set_range(start, int(share * (size - start)))
    carrier.write(path, written)
    found = carrier.read(path)
    assert found.granularity == written.granularity
    assert np.array_equal(found.data, written.data)


def test_qemu_merges_a_carrier_into_an_image(tmp_path: pathlib.Path) -> None:
    """The recipe for a qcow2 disk: bitmap --add, bitmap --merge."""
    disk, path = tmp_path / "disk.qcow2", tmp_path / "carrier.qcow2"
    qemu.create(disk, 64 * MIB, "qcow2")
    written = scattered(64 * MIB, 65536)
    carrier.write(path, written, "map")
    qemu.img("bitmap", "--add", "-g", "65536", disk, "new")
    qemu.img("bitmap", "--merge", "map", "-b", path, "-F", "qcow2", disk, "new")
    assert carrier.read(disk, "new") == written


@pytest.mark.parametrize("name", ["x", "a b/c", "größe", "'\"{}", "ü" * 511 + "x"])
def test_names_of_1_to_1023_bytes_are_qemu_s(tmp_path: pathlib.Path, name: str) -> None:
    path = tmp_path / "carrier.qcow2"
    carrier.write(path, dirty(MIB, 65536, (3, 1)), name)
    qemu.check(path)
    assert [found["name"] for found in qemu.bitmaps(path)] == [name]
    assert [found.name for found in carrier.names(path)] == [name]
    assert carrier.read(path, name).get(3)


def test_a_long_name_with_blanks_is_an_nbd_context(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "carrier.qcow2"
    carrier.write(path, dirty(MIB, 65536, (3, 1)), "für später/1")
    assert qemu.dirty_extents(path, "für später/1") == [(3 * 65536, 65536)]


@pytest.mark.parametrize("name", ["", "x" * 1024, "ü" * 512, "a\0b", "\udcff"], ids=ascii)
def test_a_name_that_qemu_would_not_take_is_refused(name: str) -> None:
    with pytest.raises(errors.UserError, match="name"):
        carrier.layout(MIB, 65536, name)


# Geometry


@pytest.mark.parametrize(
    ("size", "granularity", "words"),
    [
        pytest.param(0, 65536, "0 bytes", id="empty"),
        pytest.param((2 << 40) + 512, 512, "choose a coarser granularity", id="beyond-512-mib"),
        pytest.param((2 << 50) + 512, 1 << 30, "more than a map file", id="beyond-l1"),
        pytest.param(MIB, 1 << 32, "granularity", id="too-coarse"),
        pytest.param(MIB, 256, "granularity", id="too-fine"),
        pytest.param(MIB, 65537, "granularity", id="no-power-of-two"),
    ],
)
def test_a_map_that_no_qcow2_can_hold_is_refused(size: int, granularity: int, words: str) -> None:
    with pytest.raises(errors.UserError, match=words) as caught:
        carrier.layout(size, granularity)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("size", "granularity"),
    [
        pytest.param(2 << 40, 512, id="512-mib-of-bits"),
        pytest.param(2 << 50, 2 * MIB, id="32-mib-of-l1"),
    ],
)
def test_the_largest_maps_are_qemu_s_too(
    tmp_path: pathlib.Path, size: int, granularity: int
) -> None:
    """One refcount block, one table cluster: enough at the very edge."""
    path = tmp_path / "carrier.qcow2"
    written = bitmap.Bitmap(size, granularity)
    for where in (0, written.segments // 3, written.segments - 1):
        written.set(where)
    carrier.write(path, written)
    qemu.check(path)
    assert [found["name"] for found in qemu.bitmaps(path)] == ["posthoc"]
    found = carrier.read(path)
    assert [first for first, _ in found.runs()] == [0, written.segments // 3, written.segments - 1]


def test_2_pib_at_512_mib_of_bits_is_what_a_layout_is_made_for() -> None:
    made = carrier.layout(2 << 50, 2 * MIB)
    assert made.table_entries * layout.CLUSTER == 128 * MIB
    assert made.length // layout.CLUSTER < 32768  # what one refcount block counts


# In memory


@pytest.mark.parametrize("size", [1, MIB, 3 * MIB + 5, 700 * MIB, 4 << 30])
@pytest.mark.parametrize("fill", ["clean", "scattered", "full"])
def test_what_is_in_memory_is_the_file(tmp_path: pathlib.Path, size: int, fill: str) -> None:
    """QEMU and the reader see the same in both; the places of told clusters may differ in bytes."""
    path, copy = tmp_path / "carrier.qcow2", tmp_path / "copy.qcow2"
    made = scattered(size, 512) if fill == "scattered" else bitmap.Bitmap(size, 512)
    if fill == "full":
        made.fill()
    carrier.write(path, made)
    inside = in_memory(made)
    assert inside.length == path.stat().st_size == carrier.layout(size, 512).length
    copy.write_bytes(inside.read(0, inside.length))
    qemu.check(copy)
    assert np.array_equal(carrier.read(copy).data, made.data)


def test_the_length_depends_on_the_geometry_only() -> None:
    """The mount states dirty.qcow2's length before anybody knows the bits."""
    made = bitmap.Bitmap(TIB, 65536)
    clean = in_memory(made).length
    made.set(17)
    one = in_memory(made).length
    made.fill()
    assert clean == one == in_memory(made).length == carrier.layout(TIB, 65536).length


@given(start=st.integers(0, 600_000), length=st.integers(0, 600_000))
def test_any_slice_is_a_slice_of_the_whole(start: int, length: int) -> None:
    inside = in_memory(scattered(64 * MIB, 512))
    assert inside.length == 458_752
    whole = inside.read(0, inside.length)
    assert inside.read(start, length) == whole[start : start + length]


def test_a_map_of_16_tib_is_held_once() -> None:
    """A reader of dirty.qcow2 costs the bits, 32 MiB here, and next to nothing beside them."""
    made = bitmap.Bitmap(16 * TIB, 65536)
    made.set(1, 10_000_000)
    tracemalloc.start()
    try:
        inside = in_memory(made)
        for start in range(0, inside.length, MIB):
            inside.read(start, MIB)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 36 * MIB


def test_a_file_has_holes_where_there_is_nothing(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "carrier.qcow2"
    carrier.write(path, dirty(16 * TIB, 65536, (100_000_000, 1)))
    assert path.stat().st_size > 32 * MIB
    assert path.stat().st_blocks * 512 < MIB
