# SPDX-License-Identifier: Apache-2.0
"""The rules a carrier keeps, each broken once: what QEMU makes of it, and that we refuse it too.

The right file is accepted by QEMU in test_carrier; here one field is changed.
"""

import json
import pathlib
import subprocess
from collections.abc import Callable

import pytest

from dirtymap import bitmap, errors
from dirtymap.qcow2 import carrier
from dirtymap.qcow2 import format as qcow2
from dirtymap.qcow2 import layout as layouts
from tests import qemu
from tests.dirtymap.qcow2 import parts

Change = Callable[[pathlib.Path], None]

REFCOUNTS = layouts.Layout.refcount_block_offset
DATA = 6  # the first cluster of bits


def qemu_img(verb: str, path: pathlib.Path) -> subprocess.CompletedProcess[str]:
    command = ["qemu-img", verb, "--output=json", "-f", "qcow2", str(path)]
    return subprocess.run(command, capture_output=True, text=True, timeout=qemu.TIMEOUT)


def refused(path: pathlib.Path) -> str:
    """What our reader says of a file, in one line."""
    with pytest.raises(errors.MapError) as caught:
        carrier.read(path)
    assert "\n" not in str(caught.value)
    return caught.value.reason


def test_the_unchanged_file_is_accepted(tmp_path: pathlib.Path) -> None:
    """So that what follows is refused for its one change."""
    path = parts.made(tmp_path / "carrier.qcow2")
    parts.change_header(path)
    parts.change_extension(path)
    parts.change_entry(path)
    qemu.check(path)
    last = parts.SIZE // parts.GRANULARITY - 1
    assert qemu.dirty_segments(path, parts.GRANULARITY) == {1, last}
    assert [first for first, _ in carrier.read(path).runs()] == [1, last]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        pytest.param(
            lambda path: parts.change_entry(path, bitmap_table_size=4),
            "does not fit",
            id="one-table-entry-more",
        ),
        pytest.param(
            lambda path: parts.change_entry(path, bitmap_table_size=2),
            "does not fit",
            id="one-table-entry-less",
        ),
        pytest.param(
            lambda path: parts.change_entry(path, bitmap_table_size=8193),
            "too large",
            id="table-beyond-512-mib",
        ),
        pytest.param(lambda path: parts.change_entry(path, type=2), "type 2", id="type-2"),
        pytest.param(
            lambda path: parts.change_entry(path, granularity_bits=8),
            "granularity",
            id="granularity-256",
        ),
        pytest.param(
            lambda path: parts.change_entry(path, granularity_bits=32),
            "granularity",
            id="granularity-4g",
        ),
        pytest.param(lambda path: parts.change_entry(path, flags=4), "flags", id="extra-data-flag"),
        pytest.param(lambda path: parts.change_entry(path, flags=8), "flags", id="unknown-flag"),
        pytest.param(
            lambda path: parts.change_entry(path, extra_data_size=8), "directory", id="extra-data"
        ),
        pytest.param(lambda path: parts.change_entry(path, name_size=0), "name", id="no-name"),
        pytest.param(
            lambda path: parts.change_extension(path, nb_bitmaps=0), "0 bitmaps", id="no-bitmaps"
        ),
        pytest.param(
            lambda path: parts.change_extension(path, reserved32=1), "damaged", id="reserved"
        ),
        pytest.param(
            lambda path: parts.change_header(path, l1_size=1), "L1 table", id="l1-too-small"
        ),
        pytest.param(
            lambda path: parts.change_header(path, l1_size=(32 << 20) // 8 + 1),
            "L1 table",
            id="l1-too-large",
        ),
        pytest.param(
            lambda path: parts.change_header(path, incompatible_features=1 << 20),
            "not known",
            id="incompatible-feature",
        ),
        pytest.param(
            lambda path: parts.change_table(path, 0, 2), "reserved", id="table-entry-reserved"
        ),
        pytest.param(
            lambda path: parts.change_table(path, 0, DATA * layouts.CLUSTER + 512),
            "no cluster's place",
            id="table-entry-unaligned",
        ),
    ],
)
def test_qemu_cannot_open_it_and_we_refuse_it(
    tmp_path: pathlib.Path, change: Change, said: str
) -> None:
    path = parts.made(tmp_path / "carrier.qcow2")
    change(path)
    result = qemu_img("info", path)
    assert result.returncode == 1, result
    assert "Could not open" in result.stderr
    assert said in refused(path)


def test_without_the_autoclear_bit_the_bitmaps_are_ignored(tmp_path: pathlib.Path) -> None:
    """QEMU sees none and calls their clusters leaked; we say that they are out of date."""
    path = parts.made(tmp_path / "carrier.qcow2")
    parts.change_header(path, autoclear_features=0)
    assert qemu.bitmaps(path) == []
    assert qemu_img("check", path).returncode == 3
    assert "out of date" in refused(path)
    with pytest.raises(errors.MapError, match="out of date"):
        carrier.names(path)


def test_a_bitmap_in_use_is_worthless(tmp_path: pathlib.Path) -> None:
    """It is listed, and named when somebody wants its bits."""
    path = parts.made(tmp_path / "carrier.qcow2")
    parts.change_entry(path, flags=qcow2.BITMAP_IN_USE | qcow2.BITMAP_AUTO)
    assert qemu.bitmaps(path)[0]["flags"] == ["in-use", "auto"]
    assert [found.inconsistent for found in carrier.names(path)] == [True]
    assert refused(path).startswith("the bitmap 'posthoc' is inconsistent: QEMU did not save it")


def test_a_carrier_in_use_is_told_from_a_disk_in_use(tmp_path: pathlib.Path) -> None:
    """What a mount has written of a map that grows: QEMU refuses it as well, and we say where the map is."""
    path = tmp_path / "carrier.qcow2"
    dirty = bitmap.Bitmap(parts.SIZE, parts.GRANULARITY)
    carrier.write(path, dirty, in_use=True)
    qemu.check(path)
    assert qemu.bitmaps(path)[0]["flags"] == ["in-use"]
    with pytest.raises(qemu.ToolFailedError, match="inconsistent"):
        qemu.img("bitmap", "--clear", path, "posthoc")
    assert "posthoc umount" in refused(path)
    carrier.write(path, dirty)
    assert carrier.read(path) == bitmap.Bitmap(carrier.virtual_size(parts.SIZE), parts.GRANULARITY)


def test_a_recording_bitmap_is_read(tmp_path: pathlib.Path) -> None:
    path = parts.made(tmp_path / "carrier.qcow2")
    parts.change_entry(path, flags=qcow2.BITMAP_AUTO)
    assert qemu.bitmaps(path)[0]["flags"] == ["auto"]
    assert [found.recording for found in carrier.names(path)] == [True]
    assert carrier.read(path).count() == 2


def test_an_l1_table_at_0_is_the_header_read_as_one(tmp_path: pathlib.Path) -> None:
    path = parts.made(tmp_path / "carrier.qcow2")
    parts.change_header(path, l1_table_offset=0)
    assert qemu_img("check", path).returncode == 2
    assert "L1 table" in refused(path)


@pytest.mark.parametrize(
    ("cluster", "count", "status"),
    [
        pytest.param(0, 0, 2, id="header-not-counted"),
        pytest.param(1, 0, 2, id="refcount-table-not-counted"),
        pytest.param(2, 0, 2, id="refcount-block-not-counted"),
        pytest.param(3, 0, 2, id="directory-not-counted"),
        pytest.param(4, 0, 2, id="bitmap-table-not-counted"),
        pytest.param(5, 0, 2, id="l1-not-counted"),
        pytest.param(DATA, 0, 2, id="bits-not-counted"),
        pytest.param(DATA, 2, 3, id="bits-counted-twice"),
        pytest.param(DATA + 1, 1, 3, id="a-hole-counted"),
    ],
)
def test_every_refcount_matters(
    tmp_path: pathlib.Path, cluster: int, count: int, status: int
) -> None:
    """The bits are read all the same: refcounts are for those who write."""
    path = parts.made(tmp_path / "carrier.qcow2")
    parts.put(path, REFCOUNTS + 2 * cluster, count.to_bytes(2, "big"))
    assert qemu_img("check", path).returncode == status
    assert carrier.read(path).count() == 2


def test_bits_beyond_the_end_are_cut_off(tmp_path: pathlib.Path) -> None:
    """QEMU accepts and clips them, so do we."""
    path = tmp_path / "carrier.qcow2"
    parts.made(path)
    place = (DATA + 2) * layouts.CLUSTER
    parts.put(path, place, b"\xff" * layouts.CLUSTER)
    inside = parts.SIZE // parts.GRANULARITY - 2 * 8 * layouts.CLUSTER
    qemu.check(path)
    assert len(qemu.dirty_segments(path, parts.GRANULARITY)) == 1 + inside
    assert carrier.read(path).count() == 1 + inside


def test_bits_beyond_the_end_of_a_byte_are_cut_off(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "carrier.qcow2"
    qemu.create(path, 3 * 65536, "qcow2")
    qemu.img("bitmap", "--add", "-g", "65536", path, "b")
    qemu.io(path, "write -P 1 0 64k", format="qcow2")
    start = path.read_bytes().index(b"\x01" + bytes(511), 3 * 65536)
    while path.read_bytes()[start : start + 512] != b"\x01" + bytes(511) or start % 65536:
        start = path.read_bytes().index(b"\x01" + bytes(511), start + 1)
    parts.put(path, start, b"\xff")
    found = carrier.read(path)
    assert (found.segments, found.data.tolist()) == (3, [0b111])


def test_a_table_entry_of_1_is_a_cluster_of_ones(tmp_path: pathlib.Path) -> None:
    """The last cluster's ones end at the disk's end, for QEMU and for us."""
    path = parts.made(tmp_path / "carrier.qcow2")
    parts.change_table(path, 2, qcow2.ENTRY_ONES)
    parts.put(path, REFCOUNTS + 2 * (DATA + 2), b"\0\0")
    inside = parts.SIZE // parts.GRANULARITY - 2 * 8 * layouts.CLUSTER
    qemu.check(path)
    assert len(qemu.dirty_segments(path, parts.GRANULARITY)) == 1 + inside
    assert carrier.read(path).count() == 1 + inside


def test_an_interrupted_write_is_no_qcow2(tmp_path: pathlib.Path) -> None:
    """The header is the last part written: without it nobody takes the file for a map."""
    path = parts.made(tmp_path / "carrier.qcow2")
    parts.put(path, 0, bytes(layouts.CLUSTER))
    assert qemu_img("info", path).returncode == 1
    assert "no qcow2" in refused(path)


# Files of others


def test_version_2_holds_no_bitmaps(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "old.qcow2"
    qemu.create(path, 1 << 20, "qcow2", options="compat=0.10")
    assert "version 2" in refused(path)


@pytest.mark.parametrize("options", ["cluster_size=512", "cluster_size=2M", "extended_l2=on"])
def test_qemu_s_own_bitmaps_are_read(tmp_path: pathlib.Path, options: str) -> None:
    """Recording bitmaps of a disk that was written; several, and one of them by name."""
    path = tmp_path / "disk.qcow2"
    qemu.create(path, 256 << 20, "qcow2", options=options)
    qemu.img("bitmap", "--add", "-g", "512", path, "fine")
    qemu.img("bitmap", "--add", "-g", "2M", path, "coarse")
    qemu.io(path, "write 64k 1000k", "write 200M 512", "write 255M 1M", format="qcow2")
    assert {found.name for found in carrier.names(path)} == {"fine", "coarse"}
    for name in ("fine", "coarse"):
        found = [(each.start, each.length) for each in carrier.read(path, name).extents()]
        assert found == qemu.dirty_extents(path, name)
    with pytest.raises(errors.MapError, match="several") as caught:
        carrier.read(path)
    assert "--bitmap" in str(caught.value)
    with pytest.raises(errors.MapError, match="no bitmap 'x', but"):
        carrier.read(path, "x")


def test_an_image_with_a_backing_file_and_a_data_file_has_its_bitmaps(
    tmp_path: pathlib.Path,
) -> None:
    """What else is in the header does not hide the bitmaps extension."""
    base, path = tmp_path / "base.qcow2", tmp_path / "disk.qcow2"
    qemu.create(base, 8 << 20, "qcow2")
    qemu.create(
        path, 8 << 20, "qcow2", options=f"data_file={tmp_path}/data", backing=(base, "qcow2")
    )
    qemu.img("bitmap", "--add", path, "b")
    qemu.io(path, "write 1M 64k", format="qcow2")
    assert list(carrier.read(path, "b").runs()) == [(16, 1)]


def test_an_image_without_bitmaps_says_so(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "disk.qcow2"
    qemu.create(path, 8 << 20, "qcow2")
    assert carrier.names(path) == []
    assert refused(path) == "holds no bitmap"


def test_a_bitmap_that_was_killed_is_inconsistent(tmp_path: pathlib.Path) -> None:
    """While QEMU has the disk, and after kill -9, its bitmaps stand there as in use."""
    path = tmp_path / "disk.qcow2"
    qemu.create(path, 8 << 20, "qcow2")
    qemu.img("bitmap", "--add", path, "b")
    with qemu.nbd_server(path, "qcow2", writable=True):
        assert "inconsistent" in refused(path)
    assert carrier.read(path).count() == 0
    process = subprocess.Popen(
        ["qemu-io", "-f", "qcow2", str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(b"write 0 64k\n")
        process.stdin.flush()
        while b"wrote" not in process.stdout.readline():
            assert process.poll() is None
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()
    assert json.dumps(qemu.bitmaps(path)).count("in-use") == 1
    assert "inconsistent" in refused(path)
