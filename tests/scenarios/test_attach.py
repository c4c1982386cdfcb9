# SPDX-License-Identifier: Apache-2.0
"""`posthoc attach` on a real QEMU that is written to: nothing is missed, and nothing is left behind."""

import dataclasses
import logging
import pathlib
import signal
import subprocess
import time

import nbd as libnbd
import pytest

from dirtymap import errors
from dirtymap.images import export, nbd
from posthoc.sessions import attached
from scanner import reader
from tests import command, qemu, wait
from tests.posthoc.qemu import running
from tests.scenarios import attaching


@pytest.mark.parametrize(
    ("system", "format", "iothread"),
    [
        pytest.param(True, "raw", False, id="system-raw"),
        pytest.param(True, "qcow2", False, id="system-qcow2"),
        # Not the daemon in an iothread: below 9.0 only its raw file can be read (see further down).
        pytest.param(True, "raw", True, id="system-raw-iothread"),
        pytest.param(True, "qcow2", True, id="system-qcow2-iothread"),
        pytest.param(False, "raw", False, id="daemon-raw"),
        pytest.param(False, "qcow2", False, id="daemon-qcow2"),
    ],
)
def test_writes_during_attach_are_all_in_the_bitmap(
    tmp_path: pathlib.Path,
    system: bool,
    format: str,  # noqa: A002
    iothread: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Writes land before, in and behind each part of the disk while it is read, and after that: none is missed.

    Judges: QEMU's own blockdev-backup with qemu-img compare, and the bytes of a raw disk.
    """
    disks = attaching.pair(tmp_path, format)
    ask = nbd.Connection.read
    with running.running(disks.live, system=system, iothread=iothread) as vm:
        server = None if system else str(vm.server)
        with running.chasing(vm, "disk0", attaching.SIZE) as chaser:

            def read(connection: nbd.Connection, start: int, buffer: memoryview) -> None:
                chaser.read(start, len(buffer), lambda: ask(connection, start, buffer))

            monkeypatch.setattr(nbd.Connection, "read", read)
            # Many parts, for many writes before, in and behind one.
            monkeypatch.setattr(export.NbdImage, "at_once", 0)
            monkeypatch.setattr(reader, "PIECE", 512 << 10)
            outcome = attaching.attach_here(
                vm, disks, workers=1, accept_iothread_risk=iothread, nbd_server=server
            )
            done = chaser.count
            wait.until(lambda: chaser.count > done + 20, "writes after it is done")
        assert chaser.reads >= 32
        assert min(chaser.landed.values()) >= chaser.reads - 1
        assert outcome.statistics.state == "complete"
        assert outcome.disk.target.persistent == (format == "qcow2")
        bitmap = vm.bitmaps("disk0")
        assert bitmap.keys() == {"backup0"}
        assert bitmap["backup0"]["recording"]
        assert bitmap["backup0"]["persistent"] == (format == "qcow2")
        assert attaching.agree(vm, disks)
        assert list(attaching.private(vm).iterdir()) == []
    if format == "qcow2":
        # As QEMU stored it when it ended.
        dirty = qemu.dirty_segments(disks.live.path, attaching.GRANULARITY, "backup0")
        raw = tmp_path / "live.raw"
        qemu.convert(disks.live.path, raw, "raw", "qcow2")
        flat = attaching.Pair(running.Disk("disk0", raw), disks.reference)
        assert attaching.missed(flat, dirty) == set()


def test_bitmap_added_after_the_diff_misses_what_was_written_between(
    tmp_path: pathlib.Path,
) -> None:
    """The control: the wrong order fails the check that the right order passes."""
    disks = attaching.pair(tmp_path)
    diff = tmp_path / "diff.qcow2"
    with running.running(disks.live, system=True) as vm:
        address = {"type": "unix", "data": {"path": str(vm.folder / "nbd")}}
        vm.client("nbd-server-start", {"addr": address})
        vm.client("block-export-add", {"type": "nbd", "id": "e", "name": "e", "node-name": "disk0"})
        uri = qemu.uri(vm.folder / "nbd", "e")
        command.posthoc("diff", "-o", diff, uri, disks.reference, status=1)
        vm.write("disk0", 200 * attaching.GRANULARITY, 4096, 7)
        names = {"node": "disk0", "name": "backup0"}
        vm.client("block-dirty-bitmap-add", {**names, "granularity": attaching.GRANULARITY})
        vm.client("blockdev-add", running.Disk("map", diff, "qcow2").blockdev())
        source = {"node": "map", "name": "posthoc"}
        merge = {"node": "disk0", "target": "backup0", "bitmaps": [source]}
        vm.client("block-dirty-bitmap-merge", merge)
        assert vm.bitmaps("disk0")["backup0"]["count"] == 4 * attaching.GRANULARITY
        assert not attaching.agree(vm, disks)


def test_quiet_disk_gives_the_exact_difference(tmp_path: pathlib.Path) -> None:
    """With no writes the bitmap is the difference, segment by segment, and QEMU stores it so."""
    disks = attaching.pair(tmp_path, "qcow2")
    with running.running(disks.live) as vm:
        before = vm.state()
        attaching.attach(vm, disks)
        assert vm.bitmaps("disk0")["backup0"]["count"] == 4 * attaching.GRANULARITY
        vm.client("block-dirty-bitmap-remove", {"node": "disk0", "name": "backup0"})
        assert vm.state() == before
        attaching.attach(vm, disks)
    dirty = qemu.dirty_segments(disks.live.path, attaching.GRANULARITY, "backup0")
    assert dirty == attaching.CHANGED


def test_several_disks_are_recorded_from_one_instant(tmp_path: pathlib.Path) -> None:
    """Every disk's bitmap is right, with all of them written all the while."""
    first, second = (attaching.pair(tmp_path, node=name) for name in ("disk0", "disk1"))
    with running.running(first.live, second.live, system=True) as vm:
        with (
            running.writing(vm, "disk0", attaching.SIZE),
            running.writing(vm, "disk1", attaching.SIZE),
        ):
            command.posthoc(
                *("attach", "--qmp", vm.qmp, "--rate", "64M", "--directory", vm.folder),
                *("--disk", f"disk0={first.reference}:backup0"),
                *("--disk", f"disk1={second.reference}:backup0"),
            )
        for disks in (first, second):
            assert attaching.agree(vm, disks)


def test_bitmap_is_not_known_before_it_is_whole(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Looked at from another monitor at each step: there is none of the name, or it has every bit."""
    disks = attaching.pair(tmp_path)
    counts: dict[str, int | None] = {}
    with running.running(disks.live, system=True) as vm:

        def look(record: logging.LogRecord) -> bool:
            step = record.getMessage()
            if step == "scanned":
                vm.write("disk0", 200 * attaching.GRANULARITY, 4096, 7)
            counts[step] = vm.bitmaps("disk0").get("backup0", {}).get("count")
            return True

        logger = logging.getLogger("posthoc.sessions.attached")
        with caplog.at_level(logging.DEBUG, logger.name):
            logger.addFilter(look)
            try:
                attaching.attach_here(vm, disks)
            finally:
                logger.removeFilter(look)
    assert tuple(counts) == attached.STEPS
    published = attached.STEPS.index("published")
    assert {counts[step] for step in attached.STEPS[:published]} == {None}
    assert {counts[step] for step in attached.STEPS[published:]} == {5 * attaching.GRANULARITY}


@pytest.mark.parametrize("step", attached.STEPS)
def test_posthoc_killed_at_a_step_harms_nothing(tmp_path: pathlib.Path, step: str) -> None:
    """QEMU runs on, knows no bitmap of that name that lacks a bit, and the next attach cleans up."""
    disks = attaching.pair(tmp_path)
    with running.running(disks.live, system=True) as vm:
        before = vm.state()
        killed = attaching.attach_with_signal_at(step, signal.SIGKILL, vm, disks)
        assert killed.returncode == -signal.SIGKILL
        vm.write("disk0", 200 * attaching.GRANULARITY, 4096, 7)
        if "backup0" in vm.bitmaps("disk0"):
            assert attaching.agree(vm, disks)
        if step == "ended":
            with pytest.raises(errors.UserError, match="exists and is good"):
                attaching.attach_here(vm, disks)
        else:
            attaching.attach_here(vm, disks)
        assert list(attaching.private(vm).iterdir()) == []
        assert attaching.agree(vm, disks)
        assert vm.bitmaps("disk0")["backup0"]["count"] == 5 * attaching.GRANULARITY
        vm.client("block-dirty-bitmap-remove", {"node": "disk0", "name": "backup0"})
        assert vm.state() == before


@pytest.mark.parametrize("step", ["opened", "verifying"])
def test_posthoc_killed_beside_its_qemu_harms_nothing(tmp_path: pathlib.Path, step: str) -> None:
    """The same where the raw file is read, and the disk is in an iothread: nothing waits for a client."""
    disks = attaching.pair(tmp_path)
    with running.running(disks.live, system=True, iothread=True) as vm:
        before = vm.state()
        option = "--reference-side-only"
        killed = attaching.attach_with_signal_at(step, signal.SIGKILL, vm, disks, option)
        assert killed.returncode == -signal.SIGKILL
        vm.write("disk0", 200 * attaching.GRANULARITY, 4096, 7)
        attaching.attach_here(vm, disks, reference_side_only=True)
        assert list(attaching.private(vm).iterdir()) == []
        assert attaching.agree(vm, disks)
        assert vm.bitmaps("disk0")["backup0"]["count"] == 5 * attaching.GRANULARITY
        vm.client("block-dirty-bitmap-remove", {"node": "disk0", "name": "backup0"})
        assert vm.state() == before


@pytest.mark.parametrize("step", ["exported", "published"])
def test_posthoc_killed_with_two_disks_harms_neither(tmp_path: pathlib.Path, step: str) -> None:
    """What the first of them has and the other has not yet is found, and gone on with, all the same."""
    pairs = [attaching.pair(tmp_path, "qcow2", node=name) for name in ("disk0", "disk1")]
    first, second = pairs
    with running.running(first.live, second.live, system=True) as vm:
        before = vm.state()
        words = [f"--disk={pair.live.node}={pair.reference}:backup0" for pair in pairs]
        killed = attaching.command_with_signal_at(step, signal.SIGKILL, vm, *words)
        assert killed.returncode == -signal.SIGKILL
        vm.write("disk1", 200 * attaching.GRANULARITY, 4096, 7)
        attaching.attach_all_here(vm, *pairs)
        assert list(attaching.private(vm).iterdir()) == []
        for pair, count in ((first, 4), (second, 5)):
            assert attaching.agree(vm, pair)
            bitmap = vm.bitmaps(pair.live.node)["backup0"]
            assert (bitmap["count"], bitmap["persistent"]) == (count * attaching.GRANULARITY, True)
            names = {"node": pair.live.node, "name": "backup0"}
            vm.client("block-dirty-bitmap-remove", names)
        assert vm.state() == before


def test_killed_posthoc_is_cleaned_up_after_wherever_its_folder_was(tmp_path: pathlib.Path) -> None:
    """The next attach needs no --directory to find the server's socket: QEMU itself knows the folder."""
    disks = attaching.pair(tmp_path)
    with running.running(disks.live, system=True) as vm:
        before = vm.state()
        attaching.attach_with_signal_at("exported", signal.SIGKILL, vm, disks)
        (folder,) = attaching.private(vm).iterdir()
        attaching.attach_here(vm, disks, directory=None)
        assert not folder.exists()
        vm.client("block-dirty-bitmap-remove", {"node": "disk0", "name": "backup0"})
        assert vm.state() == before


def test_attach_to_another_qemu_leaves_a_killed_one_s_server_to_be_found(
    tmp_path: pathlib.Path,
) -> None:
    """Killed on one, attached to another, with the same folder: the first is cleaned up after all the same."""
    first, second = (attaching.pair(tmp_path, node=name) for name in ("disk0", "disk1"))
    with running.running(first.live, system=True) as vm, running.running(second.live) as other:
        attaching.attach_with_signal_at("exported", signal.SIGKILL, vm, first)
        attaching.attach_here(other, second, directory=str(attaching.private(vm)))
        attaching.attach_here(vm, first)
        assert vm.bitmaps("disk0").keys() == {"backup0"}
        assert list(attaching.private(vm).iterdir()) == []


def test_living_session_is_seen_whatever_its_folder(tmp_path: pathlib.Path) -> None:
    """An attach through another monitor, with another folder, is refused and harms nothing."""
    disks = attaching.pair(tmp_path)
    with running.running(disks.live, system=True) as vm:
        words = ("attach", "--qmp", vm.qmp, "--node", "disk0", "--bitmap", "backup0")
        options = ("--rate", "16M", "--directory", attaching.private(vm))
        with subprocess.Popen(
            command.words(*words, *options, disks.reference),
            env=command.environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as process:
            wait.until(lambda: vm.client("query-block-exports"), "the export")
            vm.client.close()
            other = ("attach", "--qmp", vm.folder / "side", *words[3:-1], "other")
            result = command.posthoc(*other, disks.reference, status=2)
            assert "another posthoc is attached to this QEMU" in result.stderr
            assert process.wait(command.TIMEOUT) == 0
        vm.client = running.Client(vm.folder / "side")
        assert vm.bitmaps("disk0").keys() == {"backup0"}


def test_good_bitmap_is_refused_though_a_killed_session_merged_into_it(
    tmp_path: pathlib.Path,
) -> None:
    """Only what a killed session was making is its own to go on with."""
    disks = attaching.pair(tmp_path)
    with running.running(disks.live, system=True) as vm:
        vm.client("block-dirty-bitmap-add", {"node": "disk0", "name": "backup0"})
        attaching.attach_with_signal_at("scanned", signal.SIGKILL, vm, disks, "--merge")
        with pytest.raises(errors.UserError, match="exists and is good: --merge"):
            attaching.attach_here(vm, disks)
        attaching.attach_here(vm, disks, merge=True)
        assert vm.bitmaps("disk0").keys() == {"backup0"}


def test_bitmap_of_a_session_killed_twice_is_gone_on_with(tmp_path: pathlib.Path) -> None:
    """Killed when it was made, and killed again when that was being gone on with: the third succeeds."""
    disks = attaching.pair(tmp_path)
    with running.running(disks.live, system=True) as vm:
        attaching.attach_with_signal_at("published", signal.SIGKILL, vm, disks)
        attaching.attach_with_signal_at("scanned", signal.SIGKILL, vm, disks)
        attaching.attach_here(vm, disks)
        assert vm.bitmaps("disk0").keys() == {"backup0"}


@pytest.mark.parametrize("step", attached.STEPS[:-1])
def test_qemu_killed_at_a_step_is_one_clear_line(tmp_path: pathlib.Path, step: str) -> None:
    """posthoc says that QEMU has gone, exits with 2 and removes its files."""
    disks = attaching.pair(tmp_path)
    with running.running(disks.live, system=True) as vm:
        result = attaching.attach_with_signal_at(
            step, signal.SIGKILL, vm, disks, "--rate", attaching.RATE, to_qemu=True
        )
        assert result.returncode == 2
        assert result.stdout == ""
        (line,) = result.stderr.splitlines()
        assert line.startswith(f"posthoc: {vm.qmp}: QEMU ")
        assert list(attaching.private(vm).iterdir()) == []


@pytest.mark.parametrize("step", attached.STEPS)
def test_interrupted_attach_leaves_qemu_as_it_was(tmp_path: pathlib.Path, step: str) -> None:
    """Ctrl-C ends it in order: no bitmap, node, export, server or file is left. At the end it is too late."""
    disks = attaching.pair(tmp_path)
    with running.running(disks.live) as vm:
        before = vm.state()
        result = attaching.attach_with_signal_at(step, signal.SIGINT, vm, disks)
        if step == "ended":
            assert result.returncode == 0
            assert result.stdout.startswith("state: complete\n")
            assert vm.bitmaps("disk0").keys() == {"backup0"}
        else:
            assert result.returncode == 130
            assert result.stderr == "posthoc: interrupted: QEMU is left as it was found\n"
            assert vm.state() == before
        assert list(attaching.private(vm).iterdir()) == []


@pytest.mark.parametrize("step", ["scanned", "published"])
def test_interrupted_merge_says_what_stays(tmp_path: pathlib.Path, step: str) -> None:
    """Bits that were added to a good bitmap cannot be taken out of it again."""
    disks = attaching.pair(tmp_path)
    with running.running(disks.live) as vm:
        vm.client("block-dirty-bitmap-add", {"node": "disk0", "name": "backup0"})
        result = attaching.attach_with_signal_at(step, signal.SIGINT, vm, disks, "--merge")
        assert result.returncode == 130
        count = vm.bitmaps("disk0")["backup0"]["count"]
        if step == "scanned":
            assert count == 0
            assert result.stderr == "posthoc: interrupted: QEMU is left as it was found\n"
        else:
            assert count == 4 * attaching.GRANULARITY
            assert result.stderr == (
                "posthoc: bitmap backup0 of disk0 keeps what was added to it: more than it needs, never less\n"
                "posthoc: interrupted: QEMU is left as it was found, apart from that\n"
            )


def test_interrupted_replacement_says_that_the_inconsistent_one_is_gone(
    tmp_path: pathlib.Path,
) -> None:
    """It was worth nothing, and is not put back."""
    disks = attaching.pair(tmp_path, "qcow2")
    with running.running(disks.live) as vm:
        attaching.attach_here(vm, disks)
    with running.running(disks.live) as vm:
        vm.kill()
    with running.running(disks.live) as vm:
        result = attaching.attach_with_signal_at("published", signal.SIGINT, vm, disks, "--replace")
        assert vm.bitmaps("disk0") == {}
        assert result.stderr == (
            "posthoc: the inconsistent bitmap backup0 of disk0 is removed\n"
            "posthoc: interrupted: QEMU is left as it was found, apart from that\n"
        )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_further_signals_do_not_break_the_clean_up(
    tmp_path: pathlib.Path, number: signal.Signals
) -> None:
    """Ctrl-C once more, at each step back, is told and changes nothing."""
    disks = attaching.pair(tmp_path)
    with running.running(disks.live) as vm:
        before = vm.state()
        result = attaching.attach_with_signal_at("exported", number, vm, disks, again=True)
        assert result.returncode == 130, result.stderr
        told, last = set(result.stderr.splitlines()[:-1]), result.stderr.splitlines()[-1]
        assert told == {"posthoc: ending already: what was added to QEMU is being taken back"}
        assert last == "posthoc: interrupted: QEMU is left as it was found"
        assert vm.state() == before
        assert list(attaching.private(vm).iterdir()) == []


@pytest.mark.parametrize("step", ["cleared", "exported", "published"])
def test_bitmap_kept_on_failure_has_every_bit(tmp_path: pathlib.Path, step: str) -> None:
    """With --keep-on-failure what is left is valid and told, from when on there is anything to keep."""
    disks = attaching.pair(tmp_path, "qcow2")
    with running.running(disks.live, system=True) as vm:
        before = vm.state()
        result = attaching.attach_with_signal_at(
            step, signal.SIGINT, vm, disks, "--keep-on-failure"
        )
        assert result.returncode == 130
        lines = result.stderr.splitlines()
        if step == "cleared":
            assert lines == ["posthoc: interrupted: QEMU is left as it was found"]
            assert vm.state() == before
            return
        assert "posthoc: bitmap backup0 of disk0 is kept, with every bit set" in lines
        assert lines[-1] == "posthoc: interrupted: QEMU is left as it was found, apart from that"
        bitmap = vm.bitmaps("disk0")["backup0"]
        assert bitmap["count"] == attaching.SIZE
        assert bitmap["recording"]
        assert bitmap["persistent"]
        assert attaching.agree(vm, disks)
        vm.client("block-dirty-bitmap-remove", {"node": "disk0", "name": "backup0"})
        assert vm.state() == before


def test_client_that_goes_takes_an_old_qemu_with_an_iothread_along(tmp_path: pathlib.Path) -> None:
    """The danger that attach refuses is there below 9.0, in this very set-up, and not from 9.0 on."""
    disks = attaching.pair(tmp_path)
    with running.running(disks.live, system=True, iothread=True) as vm:
        old = vm.client("query-version")["qemu"]["major"] < 9
        address = {"type": "unix", "data": {"path": str(vm.folder / "nbd")}}
        vm.client("nbd-server-start", {"addr": address})
        vm.client("block-export-add", {"type": "nbd", "id": "e", "name": "e", "node-name": "disk0"})
        reader = libnbd.NBD()
        reader.connect_uri(qemu.uri(vm.folder / "nbd", "e"))
        reader.shutdown()
        if old:
            assert vm.process.wait(wait.DEADLINE) == -signal.SIGABRT
        else:
            assert vm.client("query-block-exports")


def test_old_qemu_with_an_iothread_is_refused(tmp_path: pathlib.Path) -> None:
    """Below 9.0 the reason and both ways out are told; from 9.0 on there is nothing to refuse."""
    disks = attaching.pair(tmp_path)
    with running.running(disks.live, system=True, iothread=True) as vm:
        before = vm.state()
        old = vm.client("query-version")["qemu"]["major"] < 9
        result = attaching.attach(vm, disks, status=2 if old else 0)
        if old:
            for part in ("aborts the VM", "--reference-side-only", "--accept-iothread-risk"):
                assert part in result.stderr
            assert vm.state() == before


def test_old_daemon_with_an_iothread_is_refused_whatever_is_accepted(
    tmp_path: pathlib.Path,
) -> None:
    """Where an export holds the disk in the iothread, the end of another one aborts a daemon below 9.0.

    posthoc ended well, and the daemon with every client of it did not: --accept-iothread-risk is no way out.
    """
    disks = attaching.pair(tmp_path)
    with running.running(disks.live, iothread=True) as vm:
        vm.write("disk0", 0, 512, 1)
        old = vm.client("query-version")["qemu"]["major"] < 9
        options = ("--accept-iothread-risk", *attaching.server(vm))
        result = attaching.attach(vm, disks, *options, status=2 if old else 0)
        if old:
            (line,) = result.stderr.splitlines()
            assert "may abort when one of several exports" in line
            assert "--reference-side-only" in line
            assert "--accept-iothread-risk" not in line
            assert vm.bitmaps("disk0") == {}
        vm.write("disk0", 0, 512, 2)
        assert vm.process is not None
        assert vm.process.poll() is None


@pytest.mark.parametrize("way", [[], ["--reference-side-only"]], ids=["export", "file"])
def test_old_daemon_that_serves_from_an_iothread_is_refused(
    tmp_path: pathlib.Path, way: list[str]
) -> None:
    """Each transaction may crash a daemon below 9.0 beside a busy NBD client (one in 20 attaches did)."""
    disks = attaching.pair(tmp_path)
    with running.running(disks.live, iothread=True) as vm:
        vm.write("disk0", 0, 512, 1)
        old = vm.client("query-version")["qemu"]["major"] < 9
        result = attaching.attach(vm, disks, *way, *attaching.server(vm), status=2 if old else 0)
        if old:
            (line,) = result.stderr.splitlines()
            assert "may crash" in line
            assert "exports guest-disk0:" in line
            assert "--accept-iothread-risk" in line
            assert vm.bitmaps("disk0") == {}
        vm.write("disk0", 0, 512, 2)


@pytest.mark.parametrize("way", [[], ["--keep-on-failure"]], ids=["undone", "kept"])
def test_export_that_is_made_meanwhile_is_refused(tmp_path: pathlib.Path, way: list[str]) -> None:
    """Before the bitmap is made it is looked again, and QEMU is left as it was found; nor is one made to be kept."""
    disks = attaching.pair(tmp_path)
    with running.running(disks.live, system=True, iothread=True) as vm:
        old = vm.client("query-version")["qemu"]["major"] < 9
        before = vm.state()
        with attaching.begun(vm, disks, "--reference-side-only", "--rate", "8M", *way) as process:
            wait.until(lambda: vm.bitmaps("disk0"), "the recording bitmap")
            address = {"type": "unix", "data": {"path": str(vm.folder / "nbd")}}
            vm.client("nbd-server-start", {"addr": address})
            vm.client("block-export-add", {"type": "nbd", "id": "pull", "node-name": "disk0"})
            _, stderr = process.communicate(timeout=command.TIMEOUT)
        assert process.returncode == (2 if old else 0), stderr
        if old:
            assert stderr.count("exports pull:") == 1 + len(way)
            vm.client("nbd-server-stop")
            assert vm.state() == before


def test_export_of_a_killed_session_is_not_in_the_way(tmp_path: pathlib.Path) -> None:
    """Nobody uses it any more: it is removed, not refused."""
    disks = attaching.pair(tmp_path)
    with running.running(disks.live, system=True, iothread=True) as vm:
        address = {"type": "unix", "data": {"path": str(vm.folder / "nbd")}}
        vm.client("nbd-server-start", {"addr": address})
        left = {"type": "nbd", "id": "posthoc-01234567-live-0", "node-name": "disk0"}
        vm.client("block-export-add", left)
        attaching.attach(vm, disks, "--reference-side-only")
        assert vm.client("query-block-exports") == []
        assert attaching.agree(vm, disks)


@pytest.mark.parametrize("direct", [False, True], ids=["cached", "direct"])
def test_raw_file_read_beside_an_old_qemu_with_an_iothread(
    workdir: pathlib.Path, direct: bool
) -> None:
    """With --reference-side-only no client connects to QEMU, and still nothing is missed."""
    disks = attaching.pair(workdir)
    live = dataclasses.replace(disks.live, direct=direct)
    with running.running(live, system=True, iothread=True) as vm:
        with running.writing(vm, "disk0", attaching.SIZE) as writer:
            began, before = time.monotonic(), writer.count
            attaching.attach(vm, disks, "--reference-side-only", "--rate", attaching.RATE)
            rate = (writer.count - before) / (time.monotonic() - began)
        # 400 a second on a quiet machine of two processors, 68 with six programs that leave it nothing.
        assert rate >= 20
        assert attaching.agree(vm, disks)
        nodes = vm.client("query-named-block-nodes", {"flat": True})
        names = [node["node-name"] for node in nodes]
        bitmaps = [found["name"] for node in nodes for found in node.get("dirty-bitmaps", [])]
        assert not [name for name in names + bitmaps if name.startswith("posthoc-")]


def test_snapshot_taken_meanwhile_is_told(tmp_path: pathlib.Path) -> None:
    """When the guest writes to an overlay by the end, the bitmap is right for its own node, and that is said."""
    disks = attaching.pair(tmp_path)
    with running.running(disks.live, system=True) as vm:
        with attaching.begun(vm, disks, "--rate", "16M") as process:
            wait.until(lambda: vm.client("query-block-exports"), "the export")
            overlay = tmp_path / "overlay.qcow2"
            qemu.create(overlay, attaching.SIZE, "qcow2")
            added = {**running.Disk("overlay", overlay, "qcow2").blockdev(), "backing": None}
            vm.client("blockdev-add", added)
            vm.client("blockdev-snapshot", {"node": "disk0", "overlay": "overlay"})
            _, stderr = process.communicate(timeout=command.TIMEOUT)
        assert process.returncode == 0, stderr
        assert "disk0 is not the guest's node any more" in stderr
        assert vm.bitmaps("disk0")["backup0"]["count"] == 4 * attaching.GRANULARITY
