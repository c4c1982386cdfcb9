# SPDX-License-Identifier: Apache-2.0
"""posthoc diff: exact, exits like cmp, and a map that QEMU reads."""

import contextlib
import io
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import pytest

from dirtymap.qcow2 import carrier
from posthoc import cli
from tests import command, oracle, qemu
from tests.posthoc import images, test_faults

Path = pathlib.Path


def diff(*arguments: str | Path, status: int) -> dict[str, Any]:
    """Run `posthoc diff --json` and return what it says."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert cli.main(["diff", "--json", *map(str, arguments)]) == status
    facts: dict[str, Any] = json.loads(printed.getvalue())
    return facts


def refused(capsys: pytest.CaptureFixture[str], arguments: Sequence[str | Path]) -> str:
    """Run a diff that is a mistake and return its one line."""
    assert cli.main(["diff", *map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1, captured.err
    return captured.err


@pytest.mark.parametrize("granularity", [512, 4096, 65536, 2 << 20])
def test_the_map_is_the_difference_as_qemu_reads_it(tmp_path: Path, granularity: int) -> None:
    """Exit code 1, and segment by segment what a plain comparison finds, at an odd size."""
    live, reference = images.pair(tmp_path, size=4_500_003, changed=[0, 1, 30, 68])
    output = tmp_path / "map.qcow2"
    facts = diff(live, reference, "-o", output, "--granularity", str(granularity), status=1)
    expected = oracle.differing(live, reference, granularity)
    assert expected
    assert qemu.dirty_segments(output, granularity) == expected
    assert (facts["state"], facts["size"], facts["scanned"]) == ("complete", 4_500_003, 4_500_003)
    covered = (
        min((segment + 1) * granularity, 4_500_003) - segment * granularity for segment in expected
    )
    assert facts["differing"] == facts["dirty"] == sum(covered)
    qemu.check(output)


def test_identical_images_exit_with_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The map of no difference is a map with no bit."""
    live, reference = images.pair(tmp_path)
    output = tmp_path / "map.qcow2"
    assert cli.main(["diff", str(live), str(reference), "-o", str(output)]) == 0
    assert "dirty: 0 (0 B)\n" in capsys.readouterr().out
    assert carrier.read(output).count() == 0


def test_holes_are_not_read_and_compare_as_zeros(tmp_path: Path) -> None:
    """A sparse terabyte with some data takes no time, and --read-all of a small disk says the same."""
    live, reference = tmp_path / "live", tmp_path / "reference"
    for path, byte in ((live, b"a"), (reference, b"b")):
        with path.open("wb") as file:
            os.truncate(file.fileno(), 1 << 40)
            os.pwrite(file.fileno(), byte * 5, 77 << 30)
            os.pwrite(file.fileno(), b"same", 99 << 30)
    os.truncate(reference, 3 << 39)
    output = tmp_path / "map.qcow2"
    facts = diff(live, reference, "--allow-shrunk", "-o", output, status=1)
    assert list(carrier.read(output).runs()) == [((77 << 30) // 65536, 1)]
    assert facts["skipped"] > (1 << 40) - (8 << 20)
    assert facts["savings"]["zeros"] == facts["skipped"]


def test_read_all_reads_what_is_a_hole(tmp_path: Path) -> None:
    """Nothing is skipped, the map is the same."""
    live, reference = tmp_path / "live", tmp_path / "reference"
    for path in (live, reference):
        path.write_bytes(b"x" * 70_000)
        os.truncate(path, 3 << 20)
    facts = diff(live, reference, "--read-all", status=0)
    assert (facts["skipped"], facts["scanned"]) == (0, 3 << 20)


def test_one_shortcut_alone_is_switched_off(tmp_path: Path) -> None:
    """--without says which; a name that is none is refused with those that are."""
    live, reference = tmp_path / "live", tmp_path / "reference"
    live.write_bytes(b"x" * 700_000)
    for path in (live, reference):
        path.touch()
        os.truncate(path, 3 << 20)
    usual = diff(live, reference, status=1)
    assert usual["savings"]["zeros"] > 1 << 20
    facts = diff(live, reference, "--without", "zeros", status=1)
    assert facts["savings"]["zeros"] == 0
    assert facts["savings"]["one-side"] == usual["savings"]["one-side"] > 0
    assert facts["differing"] == usual["differing"]
    refused = command.posthoc("diff", live, reference, "--without", "luck", status=2)
    assert "reflinks" in refused.stderr


def test_a_longer_live_disk_is_compared_with_zeros_and_said_so(tmp_path: Path) -> None:
    """Zeros beyond the reference's end are no difference, anything else is; one line tells."""
    live, reference = images.pair(tmp_path, size=1 << 20)
    with live.open("ab") as file:
        file.write(bytes(100_000) + b"more" + bytes(500_000))
    output = tmp_path / "map.qcow2"
    result = command.posthoc("diff", live, reference, "-o", output, status=1)
    assert "the rest is compared with zeros" in result.stderr
    assert set(carrier.read(output).runs()) == {(17, 1)}


def test_a_shorter_live_disk_is_refused_unless_allowed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A shrunk disk may be a mix-up; allowed, the map has the live disk's size."""
    live, reference = images.pair(tmp_path, size=1 << 20)
    os.truncate(live, 700_000)
    assert "--allow-shrunk" in refused(capsys, [live, reference])
    output = tmp_path / "map.qcow2"
    facts = diff("--allow-shrunk", live, reference, "-o", output, status=0)
    assert facts["size"] == 700_000


def test_mistakes_are_one_line_and_leave_no_map(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same file under any name, a missing one, a folder, a map over an image: refused, nothing written."""
    live, reference = images.pair(tmp_path, changed=[1])
    link = tmp_path / "link"
    link.symlink_to(live)
    output = tmp_path / "map.qcow2"
    before = live.read_bytes()
    mistakes: list[tuple[list[str | Path], str]] = [
        ([live, live], "are the same disk"),
        ([live, link], "are the same disk"),
        ([live, tmp_path / "missing"], "missing"),
        ([tmp_path, reference], "is a directory"),
        ([live, reference, "-o", live], "is one of the images"),
        ([live, reference, "-o", tmp_path / "none" / "map"], "there is no folder"),
        ([live, reference, "-o", tmp_path], "is a folder"),
        ([live, reference, "-o", output, "--bitmap", "n" * 2000], "1023"),
    ]
    for arguments, words in mistakes:
        assert words in refused(capsys, arguments)
    assert not output.exists()
    assert live.read_bytes() == before


@pytest.mark.parametrize("verb", ["diff", "mount", "merge"])
def test_a_disk_under_the_map_s_name_is_refused_before_anything_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    """A virtual machine's disk, given for the map by a slip, is told before the images that are missing."""
    vm = tmp_path / "vm.qcow2"
    qemu.create(vm, 1 << 20, "qcow2", options="compat=0.10")
    before = vm.read_bytes()
    missing = str(tmp_path / "missing")
    names = {"diff": [missing] * 2, "mount": [missing, missing, str(tmp_path)], "merge": [missing]}
    more = ["--foreground"] if verb == "mount" else []
    assert cli.main([verb, *names[verb], "--output", str(vm), *more]) == 2
    complaint = capsys.readouterr().err
    assert f"{vm}: stands there already" in complaint
    assert complaint.count("\n") == 1
    assert vm.read_bytes() == before


def test_a_loop_device_of_the_reference_is_the_reference(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same bytes behind a block device are found out."""
    live, _ = images.pair(tmp_path)
    with qemu.loop_device(live, read_only=True) as device:
        assert "are the same disk" in refused(capsys, [device, live])


def test_a_block_device_is_compared_like_a_file(tmp_path: Path) -> None:
    """LIVE on a loop device, the map against the oracle."""
    live, reference = images.pair(tmp_path, changed=[3, 40])
    output = tmp_path / "map.qcow2"
    with qemu.loop_device(live, read_only=True) as device:
        diff(device, reference, "-o", output, status=1)
    assert qemu.dirty_segments(output, 65536) == {3, 40}


def test_a_bad_sector_is_dirty_and_the_map_is_written(tmp_path: Path) -> None:
    """Exit code 3: the map is valid, has the unreadable segment, and the errors are named."""
    live, reference = images.pair(tmp_path, changed=[2])
    output = tmp_path / "map.qcow2"
    with qemu.nbdkit(*test_faults.with_bad_sector(reference)) as address:
        facts = diff(live, address, "-o", output, status=3)
    bad = test_faults.BAD // 65536
    assert qemu.dirty_segments(output, 65536) == {2, bad}
    assert facts["errors"] == 1
    assert facts["error_list"] == [f"reference: 65536 bytes at {bad * 65536}: Input/output error"]
    assert facts["state"] == "complete"


def test_rate_workers_and_name_are_obeyed(tmp_path: Path) -> None:
    """The options that do not change what is found."""
    live, reference = images.pair(tmp_path, changed=[5])
    output = tmp_path / "map.qcow2"
    options = ("--rate", "1G", "--workers", "4", "--bitmap", "nightly")
    diff(live, reference, "-o", output, *options, status=1)
    assert [info.name for info in carrier.names(output)] == ["nightly"]


def test_text_has_a_line_for_each_fact(tmp_path: Path) -> None:
    """For people: sizes in bytes with a human form, nothing but the result on stdout."""
    live, reference = images.pair(tmp_path, changed=[5])
    result = command.posthoc("diff", live, reference, status=1)
    assert result.stderr == ""
    lines = dict(line.split(": ", 1) for line in result.stdout.splitlines())
    assert lines["size"] == "4194304 (4.0 MiB)"
    assert lines["differing"] == lines["dirty"] == "65536 (64.0 KiB)"
    assert lines["errors"] == "0"


def test_totals_are_told_where_the_map_finds_no_room(tmp_path: Path, full_disk: Path) -> None:
    """Hours of reading ended in one line about the disk that was full, and no figure."""
    live, reference = images.pair(tmp_path, changed=[1])
    facts = diff(live, reference, "-o", full_disk / "map.qcow2", status=2)
    assert facts["dirty"] == images.SEGMENT
    assert [file.name for file in full_disk.iterdir()] == ["filler"]
