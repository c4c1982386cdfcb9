# SPDX-License-Identifier: Apache-2.0
"""`posthoc wait`: when it returns, what it shows, and with what it exits."""

import argparse
import json
import pathlib
from typing import Any

import pytest

from posthoc import exits
from posthoc.commands import status, wait
from tests import command, qemu, terminal
from tests.posthoc import images
from tests.posthoc.images import SEGMENT

Path = pathlib.Path

FACTS: dict[str, Any] = {
    "state": "complete",
    "size": 100,
    "scanned": 100,
    "eta": None,
    "errors": 0,
    "output_due": False,
    "output_failure": None,
}


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the mount says at one look after another, without the time between."""
    looks: list[dict[str, Any]] = []
    monkeypatch.setattr(status, "read", lambda _: FACTS | looks.pop(0))
    monkeypatch.setattr(wait.time, "sleep", lambda _: None)
    return looks


def waited() -> int:
    return wait.run(argparse.Namespace(mountpoint="mnt", json=False))


def test_it_waits_for_the_map_of_the_scan(told: list[dict[str, Any]]) -> None:
    """It returned when the scan was over, and a script that went on found no map."""
    told += [{"state": "scanning", "output_due": True}, {"output_due": True}, {}]
    assert waited() == exits.DONE
    assert told == []


def test_a_map_that_cannot_be_written_is_told(
    told: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    told += [{"output_due": True}, {"output_failure": "No space left on device"}]
    assert waited() == exits.MISTAKE
    assert (
        capsys.readouterr().err
        == "posthoc: the map is not safely written: No space left on device\n"
    )


def test_a_cancelled_scan_has_no_map_to_wait_for(tmp_path: Path, mountpoint: Path) -> None:
    live, reference = images.pair(tmp_path)
    output = tmp_path / "map.qcow2"
    with command.mounted(live, reference, mountpoint, "--paused", "--output", output) as mount:
        assert command.status(mount)["output_due"] is True
        command.control(mount, "cancel")
        command.posthoc("wait", mount, status=2)
        assert not output.exists()


def test_json_shows_the_last_status(tmp_path: Path, mountpoint: Path) -> None:
    live, reference = images.pair(tmp_path, changed=[3])
    output = tmp_path / "map.qcow2"
    with command.mounted(live, reference, mountpoint, "--output", output) as mount:
        facts = json.loads(command.posthoc("wait", mount, "--json").stdout)
        assert (facts["state"], facts["dirty"], facts["output_due"]) == ("complete", SEGMENT, False)
        assert qemu.dirty_segments(output, SEGMENT) == {3}
        command.control(mount, "rescan")
        command.posthoc("wait", mount)


def test_a_bar_on_a_terminal(tmp_path: Path, mountpoint: Path) -> None:
    """What is being done, how far it is, and nothing else."""
    live, reference = images.pair(tmp_path)
    with command.mounted(live, reference, mountpoint, "--paused") as mount:
        with terminal.running(command.words("wait", mount)) as (process, screen):
            screen.until("paused")
            screen.until("0.0/4.0 MiB")
            command.control(mount, "resume")
            screen.until("complete")
            screen.until("4.0/4.0 MiB")
            assert process.wait(60) == 0
