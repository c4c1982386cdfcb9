# SPDX-License-Identifier: Apache-2.0
"""posthoc estimate: the share that differs, and the better choice."""

import json
import pathlib

import pytest

from posthoc.commands import estimate
from tests import command, qemu
from tests.posthoc import images

SEGMENT = images.SEGMENT


def test_a_small_disk_is_told_exactly(tmp_path: pathlib.Path) -> None:
    """4 MiB are 64 segments: all of them are the sample."""
    live, reference = images.pair(tmp_path, changed=[0, 5, 63])
    told = command.posthoc("estimate", live, reference, "--json", "--seconds", "60")
    facts = json.loads(told.stdout)
    assert (facts["sampled"], facts["sampled_differing"]) == (64, 3)
    assert facts["differing"] == {"low": 3 * SEGMENT, "about": 3 * SEGMENT, "high": 3 * SEGMENT}
    assert facts["to_read"] == 4 << 20
    assert facts["choice"] in (estimate.INCREMENTAL, estimate.FULL, estimate.EITHER, None)


def test_people_get_a_table(tmp_path: pathlib.Path) -> None:
    live, reference = images.pair(tmp_path, changed=[0, 5, 63])
    told = command.posthoc("estimate", live, reference, "--seconds", "60").stdout
    assert "4.69 % of 4.0 MiB differs" in told
    assert "3 of 64 segments of 64.0 KiB drawn" in told
    for line in ("scan: reads of each", "incremental: about", "full backup: at most", "quicker: "):
        assert line in told


def test_any_image_can_be_estimated(tmp_path: pathlib.Path) -> None:
    live, reference = images.pair(tmp_path, changed=[7])
    qemu.convert(live, tmp_path / "live.qcow2", "qcow2")
    command.posthoc("digest", reference, "-o", tmp_path / "full.digest")
    names = (f"qcow2:{tmp_path}/live.qcow2", tmp_path / "full.digest")
    told = command.posthoc("estimate", *names, "--json", "--seconds", "60")
    assert json.loads(told.stdout)["differing"]["about"] == SEGMENT


def test_identical_disks_known_by_their_zeros_need_no_sample(tmp_path: pathlib.Path) -> None:
    for name in ("live", "reference"):
        with open(tmp_path / name, "wb") as stream:
            stream.truncate(1 << 40)
    told = command.posthoc("estimate", tmp_path / "live", tmp_path / "reference", "--json")
    facts = json.loads(told.stdout)
    assert (facts["known"], facts["sampled"], facts["full"]) == (1 << 40, 0, 0)


@pytest.mark.parametrize(
    ("scan", "low", "high", "full", "choice"),
    [
        pytest.param(10.0, 1.0, 5.0, 100.0, "incremental", id="few-changes"),
        pytest.param(10.0, 80.0, 95.0, 89.0, "full", id="nearly-all-changed"),
        pytest.param(10.0, 80.0, 95.0, 100.0, "either", id="within-the-interval"),
        pytest.param(None, 1.0, 5.0, 100.0, None, id="not-measured"),
        pytest.param(10.0, None, None, None, None, id="no-rate"),
    ],
)
def test_the_choice_is_what_surely_takes_less_time(
    scan: float | None, low: float | None, high: float | None, full: float | None, choice: str
) -> None:
    assert estimate._choice(scan, low, high, full) == choice


def test_a_slow_storage_for_backups_favours_the_incremental(tmp_path: pathlib.Path) -> None:
    """At 64 KiB a second a full backup of 4 MiB takes a minute, the scan none."""
    live, reference = images.pair(tmp_path, changed=[1])
    arguments = ["--backup-rate", "64K", "--seconds", "60", "--json"]
    facts = json.loads(command.posthoc("estimate", live, reference, *arguments).stdout)
    assert facts["full_seconds"] == 64.0
    assert facts["incremental_seconds"]["about"] == 1.0
    assert facts["choice"] == "incremental"
    assert facts["break_even_rate"] > 64 << 10


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        pytest.param(["--samples", "0"], "more than 0", id="no-samples"),
        pytest.param(["--seconds", "x"], "not a size", id="seconds"),
        pytest.param(["--granularity", "3"], "power of two", id="granularity"),
    ],
)
def test_a_mistake_is_one_line(tmp_path: pathlib.Path, arguments: list[str], reason: str) -> None:
    live, reference = images.pair(tmp_path)
    told = command.posthoc("estimate", live, reference, *arguments, status=2)
    assert reason in told.stderr


def test_an_unreadable_disk_counts_as_differing(tmp_path: pathlib.Path) -> None:
    live, reference = images.pair(tmp_path)
    fail = ["error-pread=EIO", "error-pread-rate=100%"]
    with qemu.nbdkit("file", reference, *fail, filters=["error"]) as uri:
        told = command.posthoc("estimate", live, uri, "--json", "--seconds", "60", status=3)
    assert json.loads(told.stdout)["share"]["low"] == 1.0
    assert "could not be read" in told.stderr
