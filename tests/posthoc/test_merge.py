# SPDX-License-Identifier: Apache-2.0
"""posthoc merge: the OR of several maps."""

import json
import pathlib

import pytest

from dirtymap import bitmap
from dirtymap.qcow2 import carrier
from posthoc import cli
from tests import qemu

SIZE = 3_000_001


def make(
    path: pathlib.Path, granularity: int, *segments: int, size: int = SIZE, name: str = "posthoc"
) -> str:
    made = bitmap.Bitmap(size, granularity)
    for segment in segments:
        made.set(segment)
    carrier.write(path, made, name)
    return str(path)


def test_the_result_has_what_any_of_them_has(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    maps = [make(tmp_path / f"{n}.qcow2", 4096, n, 700 + n) for n in range(4)]
    output = tmp_path / "all.qcow2"
    assert cli.main(["merge", *maps, "-o", str(output)]) == 0
    assert list(carrier.read(output).runs()) == [(0, 4), (700, 4)]
    assert f"{8 * 4096} (32.0 KiB) dirty" in capsys.readouterr().out
    qemu.check(output)


def test_the_result_has_the_coarsest_granularity(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A coarser segment is dirty when any part of it was; the last partial one too."""
    fine = make(tmp_path / "fine.qcow2", 512, 0, SIZE // 512)
    coarse = make(tmp_path / "coarse.qcow2", 65536, 7)
    output = tmp_path / "all.qcow2"
    assert cli.main(["merge", "--json", fine, coarse, "-o", str(output)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["granularity"], found["size"]) == (65536, 3_000_320)
    assert list(carrier.read(output).runs()) == [(0, 1), (7, 1), (45, 1)]
    assert found["dirty"] == carrier.read(output).dirty_bytes()


def test_qemu_merges_to_the_same_bits(tmp_path: pathlib.Path) -> None:
    """qemu-img bitmap --merge of both maps into one disk is the judge."""
    fine = make(tmp_path / "fine.qcow2", 512, 9, 4000)
    coarse = make(tmp_path / "coarse.qcow2", 65536, 30)
    output, disk = tmp_path / "all.qcow2", tmp_path / "disk.qcow2"
    assert cli.main(["merge", fine, coarse, "-o", str(output)]) == 0
    qemu.create(disk, carrier.virtual_size(SIZE), "qcow2")
    qemu.img("bitmap", "--add", "-g", "65536", disk, "b")
    for path in (fine, coarse):
        qemu.img("bitmap", "--merge", "posthoc", "-b", path, "-F", "qcow2", disk, "b")
    assert carrier.read(output) == carrier.read(disk)


def test_the_output_may_be_one_of_the_maps(tmp_path: pathlib.Path) -> None:
    one, two = make(tmp_path / "1.qcow2", 4096, 1), make(tmp_path / "2.qcow2", 4096, 2)
    assert cli.main(["merge", one, two, "-o", one]) == 0
    assert list(carrier.read(one).runs()) == [(1, 2)]
    assert list(carrier.read(two).runs()) == [(2, 1)]


def test_sizes_must_be_equal_to_the_byte(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line says whose is which; nothing is written."""
    one = make(tmp_path / "1.qcow2", 4096, 1)
    two = make(tmp_path / "2.qcow2", 4096, 2, size=SIZE + 512)
    output = tmp_path / "all.qcow2"
    assert cli.main(["merge", one, two, "-o", str(output)]) == 2
    complaint = capsys.readouterr().err
    assert "3000832" in complaint
    assert "3000320" in complaint
    assert complaint.count("\n") == 1
    assert not output.exists()


def test_a_name_is_the_result_s_and_chooses_among_several(tmp_path: pathlib.Path) -> None:
    disk = tmp_path / "disk.qcow2"
    qemu.create(disk, carrier.virtual_size(SIZE), "qcow2")
    for name in ("monday", "tuesday"):
        qemu.img("bitmap", "--add", disk, name)
    only = make(tmp_path / "only.qcow2", 65536, 5, name="other")
    output = tmp_path / "all.qcow2"
    words = ["merge", str(disk), only, "-o", str(output)]
    assert cli.main([*words, "--bitmap", "tuesday"]) == 0
    assert [found.name for found in carrier.names(output)] == ["tuesday"]
    assert list(carrier.read(output).runs()) == [(5, 1)]
    assert cli.main(words) == 2


def test_a_damaged_map_leaves_the_old_output(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, output = make(tmp_path / "1.qcow2", 4096, 1), make(tmp_path / "all.qcow2", 4096, 9)
    bad = tmp_path / "bad.qcow2"
    bad.write_bytes(pathlib.Path(one).read_bytes()[:-1])
    before = pathlib.Path(output).read_bytes()
    assert cli.main(["merge", one, str(bad), "-o", output]) == 2
    assert str(bad) in capsys.readouterr().err
    assert pathlib.Path(output).read_bytes() == before


def test_a_disk_is_never_the_output(tmp_path: pathlib.Path) -> None:
    """`posthoc merge map disk.qcow2 -o disk.qcow2` is a slip for `posthoc install`."""
    disk = tmp_path / "disk.qcow2"
    qemu.create(disk, carrier.virtual_size(SIZE), "qcow2")
    qemu.img("bitmap", "--add", disk, "posthoc")
    qemu.io(disk, "write -P 7 0 64k", format="qcow2")
    before = disk.read_bytes()
    one = make(tmp_path / "1.qcow2", 65536, 1)
    assert cli.main(["merge", one, str(disk), "-o", str(disk)]) == 2
    assert disk.read_bytes() == before
