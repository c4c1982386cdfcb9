# SPDX-License-Identifier: Apache-2.0
"""posthoc verify: what a map misses and what it names needlessly."""

import contextlib
import io
import json
import pathlib
from typing import Any

import pytest

from dirtymap import bitmap
from dirtymap.qcow2 import carrier
from posthoc import cli
from tests import command, qemu
from tests.posthoc import images, test_faults

Path = pathlib.Path
SEGMENT = images.SEGMENT
SIZE = 40 * SEGMENT + 1000


def make(path: Path, *segments: int, size: int = SIZE, granularity: int = SEGMENT) -> Path:
    """Write a map of a disk with these segments dirty."""
    made = bitmap.Bitmap(size, granularity)
    for segment in segments:
        made.set(segment)
    carrier.write(path, made)
    return path


def verify(*arguments: str | Path, status: int) -> dict[str, Any]:
    """Run `posthoc verify --json` and return what it says."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert cli.main(["verify", "--json", *map(str, arguments)]) == status
    facts: dict[str, Any] = json.loads(printed.getvalue())
    return facts


def test_a_map_that_misses_nothing_exits_with_0(tmp_path: Path) -> None:
    """Needless segments are counted and are no fault; the partial last segment counts what it has."""
    live, reference = images.pair(tmp_path, SIZE, changed=[3, 4, 40])
    facts = verify(make(tmp_path / "map", 3, 4, 7, 9, 40), live, reference, status=0)
    assert (facts["missed"], facts["missed_segments"], facts["missed_extents"]) == (0, 0, [])
    assert (facts["needless"], facts["needless_segments"]) == (2 * SEGMENT, 2)
    assert facts["needless_extents"] == [
        {"start": 7 * SEGMENT, "length": SEGMENT},
        {"start": 9 * SEGMENT, "length": SEGMENT},
    ]
    assert (facts["differing"], facts["dirty"]) == (2 * SEGMENT + 1000, 4 * SEGMENT + 1000)


def test_missed_segments_are_listed_and_exit_with_1(tmp_path: Path) -> None:
    """Every difference that the map lacks, as extents in bytes."""
    live, reference = images.pair(tmp_path, SIZE, changed=[3, 4, 10, 40])
    facts = verify(make(tmp_path / "map", 3, 20), live, reference, status=1)
    assert facts["missed_extents"] == [
        {"start": 4 * SEGMENT, "length": SEGMENT},
        {"start": 10 * SEGMENT, "length": SEGMENT},
        {"start": 40 * SEGMENT, "length": 1000},
    ]
    assert (facts["missed_segments"], facts["missed"]) == (3, 2 * SEGMENT + 1000)
    assert facts["needless_segments"] == 1


def test_people_see_the_first_missed_extents(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A long list is cut, and said to be."""
    live, reference = images.pair(tmp_path, SIZE, changed=range(0, 40, 2))
    with live.open("r+b") as file:
        file.seek(40 * SEGMENT)
        file.write(bytes(1000))
    path = make(tmp_path / "map", 5)
    assert cli.main(["verify", str(path), str(live), str(reference)]) == 1
    shown = capsys.readouterr().out
    assert f"missed at {2 * SEGMENT}: {SEGMENT}\n" in shown
    assert "and 1 more extents missed (--json lists all)\n" in shown
    assert "needless: 65536 (64.0 KiB), 1 segments\n" in shown
    assert shown.endswith(f"needless at {5 * SEGMENT}: {SEGMENT}\n")


@pytest.mark.parametrize(
    "granularity", [512, 4096, 8 << 20], ids=["512", "4K", "coarser-than-ours"]
)
def test_the_images_are_compared_at_the_maps_granularity(tmp_path: Path, granularity: int) -> None:
    """A map of any tool is judged in its own segments."""
    live, reference = images.pair(tmp_path, SIZE, changed=[3])
    hit = (3 * SEGMENT + 77) // granularity
    right = make(tmp_path / "right", hit, granularity=granularity)
    assert verify(right, live, reference, status=0)["needless"] == 0
    wrong = make(tmp_path / "wrong", granularity=granularity)
    assert verify(wrong, live, reference, status=1)["missed_segments"] == 1


def test_the_map_of_diff_verifies(tmp_path: Path) -> None:
    """What one verb writes the other accepts, to the segment."""
    live, reference = images.pair(tmp_path, 3_000_001, changed=[1, 5, 45])
    output = tmp_path / "map.qcow2"
    command.posthoc("diff", live, reference, "-o", output, "--granularity", "4K", status=1)
    facts = verify(output, live, reference, status=0)
    assert (facts["needless"], facts["differing"]) == (0, 3 * 4096)


def test_a_map_of_another_disk_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sizes must fit, but for the last sector that a carrier rounds up to."""
    live, reference = images.pair(tmp_path, SIZE)
    other = make(tmp_path / "map", size=SIZE + 512)
    assert cli.main(["verify", str(other), str(live), str(reference)]) == 2
    line = capsys.readouterr().err
    assert "is of a disk of" in line
    assert len(line.splitlines()) == 1


def test_what_is_no_map_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A raw file is no map, whatever is in it."""
    live, reference = images.pair(tmp_path, SIZE)
    assert cli.main(["verify", str(live), str(live), str(reference)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_an_unreadable_segment_outside_the_map_is_missed(tmp_path: Path) -> None:
    """In doubt a map must have it: missed without, exit code 3 with it."""
    live, reference = images.pair(tmp_path, changed=[2])
    bad = test_faults.BAD // SEGMENT
    size = live.stat().st_size
    with qemu.nbdkit(*test_faults.with_bad_sector(reference)) as address:
        without = verify(make(tmp_path / "one", 2, size=size), live, address, status=1)
        assert without["missed_extents"] == [{"start": bad * SEGMENT, "length": SEGMENT}]
        facts = verify(make(tmp_path / "two", 2, bad, size=size), live, address, status=3)
        assert (facts["missed"], facts["errors"]) == (0, 1)
