# SPDX-License-Identifier: Apache-2.0
"""posthoc map: what a dirty map says, to people and to programs."""

import json
import pathlib
import sys

import pytest

from dirtymap import bitmap
from dirtymap.qcow2 import carrier
from posthoc import cli
from posthoc.commands import show_map
from tests import qemu

SIZE = 1_000_001  # in a carrier 1,000,448: whole sectors


@pytest.fixture
def path(tmp_path: pathlib.Path) -> pathlib.Path:
    """A map of two runs at 4 KiB; the second is the last segment, 1024 bytes."""
    made = bitmap.Bitmap(SIZE, 4096)
    made.set(2, 3)
    made.set(made.segments - 1)
    carrier.write(tmp_path / "map.qcow2", made)
    return tmp_path / "map.qcow2"


def test_totals_are_lines_of_key_and_value(
    path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["map", str(path)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"map: {path}",
        "bitmap: posthoc",
        "size: 1000448 (977.0 KiB)",
        "granularity: 4096 (4.0 KiB)",
        "dirty: 13312 (13.0 KiB), 1.3 %",
        "runs: 2",
    ]


def test_json_has_numbers(path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["map", "--json", str(path)]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "map": str(path),
        "bitmap": "posthoc",
        "recording": False,
        "size": 1_000_448,
        "granularity": 4096,
        "dirty": 13_312,
        "percent": 1.331,
        "runs": 2,
    }


@pytest.mark.parametrize("json_too", [False, True], ids=["extents", "extents-json"])
def test_extents_are_a_json_list_in_bytes(
    path: pathlib.Path, capsys: pytest.CaptureFixture[str], json_too: bool
) -> None:
    """The last one ends where the disk does."""
    assert cli.main(["map", str(path), "--extents", *(["--json"] if json_too else [])]) == 0
    assert json.loads(capsys.readouterr().out) == [
        {"start": 8192, "length": 12_288, "dirty": True},
        {"start": 999_424, "length": 1024, "dirty": True},
    ]


def test_a_clean_map_has_no_extents(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    carrier.write(tmp_path / "clean.qcow2", bitmap.Bitmap(SIZE, 4096))
    assert cli.main(["map", str(tmp_path / "clean.qcow2"), "--extents"]) == 0
    assert json.loads(capsys.readouterr().out) == []


def test_a_terminal_gets_a_table(
    path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert cli.main(["map", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "granularity" in printed
    assert "│" in printed


def test_a_name_is_no_markup(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Square brackets are the table's language; a bitmap's name is only text."""
    carrier.write(tmp_path / "m.qcow2", bitmap.Bitmap(SIZE, 4096), "[red]x[/nonsense]")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert cli.main(["map", str(tmp_path / "m.qcow2")]) == 0
    assert "[red]x[/nonsense]" in capsys.readouterr().out


def test_one_of_several_bitmaps_is_named(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Any qcow2 with persistent bitmaps is a map; without a name the choice is listed."""
    disk = tmp_path / "disk.qcow2"
    qemu.create(disk, 1 << 20, "qcow2")
    qemu.img("bitmap", "--add", disk, "one")
    qemu.img("bitmap", "--add", "-g", "512", disk, "two")
    assert cli.main(["map", "--json", "--bitmap", "two", str(disk)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["bitmap"], found["granularity"], found["recording"]) == ("two", 512, True)
    assert cli.main(["map", str(disk)]) == 2
    complaint = capsys.readouterr().err
    assert "'one', 'two'" in complaint
    assert "--bitmap" in complaint
    assert cli.main(["map", "--bitmap", "three", str(disk)]) == 2
    assert "no bitmap 'three', but 'one', 'two'" in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, b"", b"no qcow2", b"QFI\xfb\0\0\0\3"])
def test_what_is_no_map_is_one_line_and_exit_2(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], content: bytes | None
) -> None:
    path = tmp_path / "x"
    if content is not None:
        path.write_bytes(content)
    assert cli.main(["map", str(path)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"posthoc: {path}: ")
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize(
    "runs",
    [[], [(0, 1)], [(0, 130)], [(7, 1), (9, 1)], [(7, 2)], [(0, 8), (15, 3), (129, 1)]],
    ids=str,
)
def test_runs_are_counted_across_bytes(runs: list[tuple[int, int]]) -> None:
    made = bitmap.Bitmap(130 * 512, 512)
    for first, count in runs:
        made.set(first, count)
    assert show_map.count_runs(made) == len(list(made.runs())) == len(runs)
