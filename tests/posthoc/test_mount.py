# SPDX-License-Identifier: Apache-2.0
"""`posthoc mount` as a user meets it: the disk, the map, the status, the ends."""

import json
import mmap
import os
import pathlib
import signal
import stat
import subprocess

import pytest

from tests import command, oracle, pages, qemu, wait
from tests.posthoc import images
from tests.posthoc.images import MIB, SEGMENT

Path = pathlib.Path


def session_pid(mountpoint: Path) -> int:
    return int(command.status(mountpoint)["pid"])


def ended(pid: int) -> bool:
    """Whether the process is gone; one that waits to be reaped by init is."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


def test_mount_scan_write_umount(tmp_path: Path, mountpoint: Path, datapath: str) -> None:
    """The whole of it: ready when the command returns, a map at the end that has scan and writes."""
    live, reference = images.pair(tmp_path, 4 * MIB + 100, changed=[3, 64])
    output = tmp_path / "map.qcow2"
    with command.mounted(
        live, reference, mountpoint, "--datapath", datapath, "--output", output
    ) as mount:
        assert (mount / "disk").stat().st_size == 4 * MIB + 100
        assert (mount / "disk").read_bytes() == live.read_bytes()
        command.posthoc("wait", mount)
        assert qemu.dirty_segments(output, SEGMENT) == {3, 64}
        images.overwrite(mount / "disk", 10 * SEGMENT - 1, b"ab")
        status = command.status(mount)
        assert status["state"] == "complete"
        assert status["differing"] == SEGMENT + 100
        assert status["written"] == 2 * SEGMENT
        assert status["dirty"] == 3 * SEGMENT + 100
        assert status["datapath"].startswith(datapath)
        assert status["guest"]["writes"]["operations"] >= 1
    assert qemu.dirty_segments(output, SEGMENT) == {3, 9, 10, 64}
    qemu.check(output)
    assert stat.S_IMODE(output.stat().st_mode) == 0o600
    assert live.read_bytes()[10 * SEGMENT - 1 :][:2] == b"ab"


@pytest.mark.parametrize("granularity", [512, 4096, 2 * MIB])
def test_a_quiet_map_is_exact_at_every_granularity(
    tmp_path: Path, mountpoint: Path, datapath: str, granularity: int
) -> None:
    live, reference = images.pair(tmp_path, 5 * MIB - 700, changed=[0, 7, 8, 79])
    output = tmp_path / "map.qcow2"
    options = ["--granularity", str(granularity), "--datapath", datapath, "--output", output]
    with command.mounted(live, reference, mountpoint, *options) as mount:
        command.until_state(mount, "complete")
    expected = oracle.differing(live, reference, granularity)
    assert len(expected) > 1
    assert qemu.dirty_segments(output, granularity) == expected


def test_status_has_the_contracts_keys_in_their_order(tmp_path: Path, mountpoint: Path) -> None:
    live, reference = images.pair(tmp_path)
    with command.mounted(live, reference, mountpoint, "--paused") as mount:
        text = (mount / "status").read_text()
        keys = [line.split(":")[0] for line in text.splitlines()]
        first = ["state", "live", "reference", "size", "granularity", "scanned", "skipped"]
        second = ["differing", "written", "dirty", "rate", "eta", "errors", "datapath", "since"]
        contract = first + second
        assert keys[: len(contract)] == contract
        assert "size: 4194304 (4.0 MiB)\n" in text
        assert "state: paused\n" in text
        assert "dirty: 4194304 (4.0 MiB)" in text
        facts = json.loads((mount / "status.json").read_text())
        assert set(contract) <= set(facts)
        assert command.posthoc("status", mount).stdout.startswith("state: paused\n")
        assert json.loads(command.posthoc("status", mount, "--json").stdout)["size"] == 4 * MIB


def test_status_has_latencies_and_the_depth(
    tmp_path: Path, mountpoint: Path, datapath: str
) -> None:
    """For programs: every verb's histogram, which its percentiles come from; how many requests are at work."""
    live, reference = images.pair(tmp_path)
    with command.mounted(live, reference, mountpoint, "--datapath", datapath) as mount:
        for segment in range(20):
            images.overwrite(mount / "disk", segment * SEGMENT, b"timed")
        facts = command.status(mount)
        writes = facts["guest"]["writes"]
        assert sum(count for _, count in writes["latency_us"]) == writes["operations"] == 20
        bounds = [bound for bound, _ in writes["latency_us"]]
        assert bounds == sorted(bounds)
        assert writes["p50_us"] in bounds
        assert facts["guest"]["discards"]["latency_us"] == []
        # The last close(), of these files too, is answered after it returns, and waits for a thread until then.
        wait.until(lambda: command.status(mount)["depth"] == 0, "no request is at work")
        wait.until(lambda: "depth: 0\n" in (mount / "status").read_text(), "nor one in words")


def test_a_map_is_valid_at_every_moment(tmp_path: Path, mountpoint: Path, datapath: str) -> None:
    """Before the scan has begun everything is dirty; an open dirty.qcow2 does not change."""
    live, reference = images.pair(tmp_path)
    with command.mounted(live, reference, mountpoint, "--paused", "--datapath", datapath) as mount:
        everything = set(range(64))
        with open(mount / "dirty.qcow2", "rb") as early:
            begin = early.read()
            command.control(mount, "resume")
            command.until_state(mount, "complete")
            early.seek(0)
            assert early.read() == begin
        (tmp_path / "early.qcow2").write_bytes(begin)
        assert qemu.dirty_segments(tmp_path / "early.qcow2", SEGMENT) == everything
        assert qemu.dirty_segments(mount / "dirty.qcow2", SEGMENT) == set()
        qemu.check(mount / "dirty.qcow2")


def test_control_pauses_cancels_scans_again_and_bounds(
    tmp_path: Path, mountpoint: Path, datapath: str
) -> None:
    live, reference = images.pair(tmp_path, changed=[5])
    options = ["--paused", "--rate", "1M", "--datapath", datapath]
    with command.mounted(live, reference, mountpoint, *options) as mount:
        command.control(mount, "rate 2M\nworkers 3\npacing off")
        assert "pacing: off\n" in (mount / "status").read_text()
        command.control(mount, "pacing on")
        assert command.status(mount)["pacing"] == 1.0
        command.control(mount, "cancel")
        assert command.until_state(mount, "cancelled")["dirty"] > 0
        assert command.posthoc("wait", mount, status=2).stderr == "posthoc: the scan is cancelled\n"
        command.control(mount, "rate none")
        command.control(mount, "rescan")
        command.control(mount, "resume")
        assert command.until_state(mount, "complete")["differing"] == SEGMENT
        command.control(mount, "pause")
        command.control(mount, "rescan")
        assert command.until_state(mount, "paused")["dirty"] == 4 * MIB
        command.control(mount, "resume")
        assert command.until_state(mount, "complete")["dirty"] == SEGMENT


@pytest.mark.parametrize(
    "line", ["stop", "rate", "rate 0", "rate -1", "workers 0", "workers 65", "pause now", "\xff"]
)
def test_a_wrong_command_is_einval_and_changes_nothing(
    tmp_path: Path, mountpoint: Path, line: str
) -> None:
    live, reference = images.pair(tmp_path)
    with command.mounted(live, reference, mountpoint) as mount:
        with pytest.raises(OSError, match="Invalid argument"):
            command.control(mount, line)
        assert command.until_state(mount, "complete")["dirty"] == 0


def test_read_only(tmp_path: Path, mountpoint: Path, datapath: str) -> None:
    live, reference = images.pair(tmp_path, changed=[1])
    live.chmod(0o400)
    with command.mounted(
        live, reference, mountpoint, "--read-only", "--datapath", datapath
    ) as mount:
        assert (mount / "disk").read_bytes() == live.read_bytes()
        with pytest.raises(OSError, match="Read-only|Permission"):
            images.overwrite(mount / "disk", 0, b"x")
        assert command.until_state(mount, "complete")["dirty"] == SEGMENT


def test_what_a_guest_has_read_stays_in_the_page_cache(
    workdir: Path, mountpoint: Path, datapath: str
) -> None:
    """A scan leaves the cache as it was; a guest that reads a place reads it again."""
    live, reference = images.pair(workdir)
    with command.mounted(live, reference, mountpoint, "--paused", "--datapath", datapath) as mount:
        with open(live, "rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert 0 not in pages.resident(live)
        guest = os.open(mount / "disk", os.O_RDONLY | os.O_DIRECT)
        try:
            with mmap.mmap(-1, MIB) as buffer:
                assert os.preadv(guest, [buffer], 0) == MIB
        finally:
            os.close(guest)
        assert set(range(MIB // mmap.PAGESIZE)) <= pages.resident(live)


def test_a_longer_live_disk_is_compared_with_zeros(
    tmp_path: Path, mountpoint: Path, datapath: str
) -> None:
    live, reference = images.pair(tmp_path)
    os.truncate(live, 4 * MIB + 3 * SEGMENT)
    images.overwrite(live, 4 * MIB + SEGMENT, b"x")
    with command.mounted(live, reference, mountpoint, "--datapath", datapath) as mount:
        assert command.until_state(mount, "complete")["dirty"] == SEGMENT


def test_a_shorter_live_disk_needs_a_word(tmp_path: Path, mountpoint: Path, datapath: str) -> None:
    live, reference = images.pair(tmp_path, changed=[2])
    os.truncate(live, 3 * MIB)
    refused = command.posthoc(
        "mount", "--datapath", datapath, live, reference, mountpoint, status=2
    )
    assert "--allow-shrunk" in refused.stderr
    assert not command.is_mounted(mountpoint)
    with command.mounted(
        live, reference, mountpoint, "--allow-shrunk", "--datapath", datapath
    ) as mount:
        assert command.until_state(mount, "complete")["dirty"] == SEGMENT


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_unmounts_and_writes_the_map(
    tmp_path: Path, mountpoint: Path, number: signal.Signals, datapath: str
) -> None:
    live, reference = images.pair(tmp_path, changed=[4])
    output = tmp_path / "map.qcow2"
    command.posthoc(
        "mount", live, reference, mountpoint, "--output", output, "--datapath", datapath
    )
    command.until_state(mountpoint, "complete")
    images.overwrite(mountpoint / "disk", 0, b"new")
    pid = session_pid(mountpoint)
    os.kill(pid, number)
    wait.until(lambda: ended(pid), "the session ended")
    assert not command.is_mounted(mountpoint)
    assert qemu.dirty_segments(output, SEGMENT) == {0, 4}


def test_umount_8_writes_the_map_too(tmp_path: Path, mountpoint: Path, datapath: str) -> None:
    """Whoever knows nothing of posthoc unmounts as ever, and loses nothing."""
    live, reference = images.pair(tmp_path, changed=[4])
    output = tmp_path / "map.qcow2"
    command.posthoc(
        "mount", live, reference, mountpoint, "--output", output, "--datapath", datapath
    )
    command.until_state(mountpoint, "complete")
    images.overwrite(mountpoint / "disk", 0, b"new")
    pid = session_pid(mountpoint)
    subprocess.run(["umount", mountpoint], check=True)
    wait.until(lambda: ended(pid), "the session ended")
    assert qemu.dirty_segments(output, SEGMENT) == {0, 4}


def test_json_of_mount_and_umount(tmp_path: Path, mountpoint: Path) -> None:
    """Where everything is, and how it ended."""
    live, reference = images.pair(tmp_path, changed=[4])
    output = tmp_path / "map.qcow2"
    mounted = command.posthoc("mount", "--json", "--output", output, live, reference, mountpoint)
    facts = json.loads(mounted.stdout)
    assert facts["mountpoint"] == str(mountpoint)
    assert (facts["disk"], facts["map"], facts["control"]) == tuple(
        str(mountpoint / name) for name in ("disk", "dirty.qcow2", "control")
    )
    assert facts["live"] == str(live)
    assert facts["pid"] == session_pid(mountpoint)
    with open(mountpoint / "disk", "rb"):
        refused = command.posthoc("umount", "--json", mountpoint, status=2)
        assert refused.stdout == ""
    command.posthoc("wait", mountpoint)
    ended = command.posthoc("umount", "--json", mountpoint)
    assert json.loads(ended.stdout) == {
        "mountpoint": str(mountpoint),
        "exit_code": 0,
        "message": "",
    }


def test_no_pacing(tmp_path: Path, mountpoint: Path) -> None:
    live, reference = images.pair(tmp_path)
    with command.mounted(live, reference, mountpoint, "--no-pacing") as mount:
        assert command.status(mount)["pacing"] is None
        assert "pacing: off\n" in (mount / "status").read_text()


def test_the_scan_s_threads_step_back_and_no_other(tmp_path: Path, mountpoint: Path) -> None:
    """The lowest CPU priority and the idle class of I/O: a busy guest's requests go before theirs."""
    live, reference = images.pair(tmp_path, 16 * MIB)
    with command.mounted(live, reference, mountpoint, "--rate", "64K", "--workers", "3") as mount:
        tasks = Path(f"/proc/{session_pid(mount)}/task")

        def nices() -> dict[str, int]:
            stats = {task.name: (task / "stat").read_text() for task in tasks.iterdir()}
            return {name: int(text.rpartition(")")[2].split()[16]) for name, text in stats.items()}

        wait.until(lambda: list(nices().values()).count(19) == 3, "three threads scan")
        for thread, nice in nices().items():
            told = subprocess.run(["ionice", "-p", thread], capture_output=True, text=True).stdout
            assert (told == "idle\n") == (nice == 19), told
        command.control(mount, "cancel")


@pytest.mark.parametrize("size", [1, 511, 513])
def test_disks_of_no_whole_sectors(
    tmp_path: Path, mountpoint: Path, size: int, datapath: str
) -> None:
    """QEMU counts in sectors, a file system in bytes: the last of them is in the map, and is the guest's."""
    live, reference = images.pair(tmp_path, size, changed=[0])
    output = tmp_path / "map.qcow2"
    options = ["--granularity", "512", "--datapath", datapath, "--output", output]
    with command.mounted(live, reference, mountpoint, *options) as mount:
        command.posthoc("wait", mount)
        last = (size - 1) // 512
        assert qemu.dirty_segments(output, 512) == {min(77, size - 1) // 512}
        assert (mount / "disk").stat().st_size == size
        images.overwrite(mount / "disk", size - 1, b"!")
        with pytest.raises(OSError, match="No space"):
            images.overwrite(mount / "disk", size, b"!")
        assert command.status(mount)["dirty"] == size
    qemu.check(output)
    assert qemu.dirty_segments(output, 512) == {0, last}
    assert live.read_bytes()[-1:] == b"!"
    assert live.stat().st_size == size
    told = json.loads(command.posthoc("verify", "--json", output, live, reference).stdout)
    assert told["missed"] == 0


def test_a_granularity_that_no_map_file_holds(
    tmp_path: Path, mountpoint: Path, datapath: str
) -> None:
    """Told at the start, not when the map is to be written."""
    for name in ("live", "reference"):
        (tmp_path / name).touch()
        os.truncate(tmp_path / name, 4 << 40)
    pair = (tmp_path / "live", tmp_path / "reference", mountpoint)
    refused = command.posthoc(
        "mount", "--granularity", "512", "--datapath", datapath, *pair, status=2
    )
    assert len(refused.stderr.splitlines()) == 1
    assert "choose a coarser granularity" in refused.stderr
    assert not command.is_mounted(mountpoint)


def test_a_scan_cut_short_costs_precision_only(
    tmp_path: Path, mountpoint: Path, datapath: str
) -> None:
    live, reference = images.pair(tmp_path, changed=[4])
    output = tmp_path / "map.qcow2"
    with command.mounted(
        live, reference, mountpoint, "--paused", "--datapath", datapath, "--output", output
    ):
        assert not output.exists()
    assert qemu.dirty_segments(output, SEGMENT) == set(range(64))


def test_foreground_stays_until_it_is_unmounted(
    tmp_path: Path, mountpoint: Path, datapath: str
) -> None:
    live, reference = images.pair(tmp_path)
    with command.in_foreground(live, reference, mountpoint, "--datapath", datapath) as (session, _):
        assert session_pid(mountpoint) == session.pid
        command.posthoc("umount", mountpoint)
        assert session.wait(60) == 0


def test_foreground_json_tells_when_it_is_ready(tmp_path: Path, mountpoint: Path) -> None:
    """It printed nothing at all: who had started it could not know when the disk was there."""
    live, reference = images.pair(tmp_path)
    with command.in_foreground(live, reference, mountpoint) as (session, facts):
        assert facts["mountpoint"] == str(mountpoint)
        assert facts["disk"] == str(mountpoint / "disk")
        assert facts["size"] == os.stat(facts["disk"]).st_size
        command.posthoc("umount", mountpoint)
        assert session.wait(60) == 0
        assert session.stdout is not None
        assert session.stdout.read() == ""


def test_umount_says_who_holds_the_disk(tmp_path: Path, mountpoint: Path, datapath: str) -> None:
    live, reference = images.pair(tmp_path)
    with command.mounted(live, reference, mountpoint, "--datapath", datapath) as mount:
        with open(mount / "disk", "rb"):
            refused = command.posthoc("umount", mount, status=2)
            assert f"(pid {os.getpid()})" in refused.stderr
            assert len(refused.stderr.splitlines()) == 1
            assert command.is_mounted(mount)


def test_umount_names_a_loop_device(tmp_path: Path, mountpoint: Path) -> None:
    live, reference = images.pair(tmp_path)
    with command.mounted(live, reference, mountpoint) as mount:
        with qemu.loop_device(mount / "disk") as device:
            assert f"is in use by {device}:" in command.posthoc("umount", mount, status=2).stderr


def test_a_lazy_umount_goes_on_until_the_last_close(
    tmp_path: Path, mountpoint: Path, datapath: str
) -> None:
    live, reference = images.pair(tmp_path)
    output = tmp_path / "map.qcow2"
    command.posthoc(
        "mount", "--datapath", datapath, live, reference, mountpoint, "--output", output
    )
    command.until_state(mountpoint, "complete")
    pid = session_pid(mountpoint)
    with open(mountpoint / "disk", "r+b", buffering=0) as disk:
        command.posthoc("umount", "--lazy", mountpoint)
        assert not command.is_mounted(mountpoint)
        again = command.posthoc("umount", mountpoint, status=2)
        assert "ends when the files that are open are closed" in again.stderr
        disk.seek(7 * SEGMENT)
        disk.write(b"late")
    wait.until(lambda: ended(pid), "the session ended")
    assert qemu.dirty_segments(output, SEGMENT) == {7}


@pytest.mark.parametrize("verb", ["umount", "status", "wait"])
def test_no_mount_there_is_one_line(tmp_path: Path, verb: str) -> None:
    refused = command.posthoc(verb, tmp_path, status=2)
    assert refused.stderr == f"posthoc: {tmp_path}: no posthoc is mounted here\n"


def test_a_dead_session_is_told_and_unmounted(tmp_path: Path, mountpoint: Path) -> None:
    live, reference = images.pair(tmp_path)
    command.posthoc("mount", live, reference, mountpoint, "--datapath", "python")
    pid = session_pid(mountpoint)
    os.kill(pid, signal.SIGKILL)
    wait.until(lambda: ended(pid), "the session is dead")
    assert "has died" in command.posthoc("status", mountpoint, status=2).stderr
    told = command.posthoc("umount", mountpoint, status=2)
    assert "the map is lost" in told.stderr
    assert not command.is_mounted(mountpoint)


def test_the_session_holds_no_folder_and_no_terminal(tmp_path: Path, mountpoint: Path) -> None:
    live, reference = images.pair(tmp_path)
    command.posthoc("mount", "live.raw", "reference.raw", mountpoint.name, cwd=tmp_path)
    try:
        pid = session_pid(mountpoint)
        assert os.readlink(f"/proc/{pid}/cwd") == "/"
        assert os.getsid(pid) == pid
        assert command.status(mountpoint)["live"] == str(live)
        assert command.status(mountpoint)["reference"] == str(reference)
    finally:
        command.posthoc("umount", mountpoint)


def test_a_mountpoint_by_a_link_and_names_that_look_like_options(
    tmp_path: Path, mountpoint: Path
) -> None:
    live, reference = images.pair(tmp_path)
    live.rename(tmp_path / "-live.raw")
    link = tmp_path / "link"
    link.symlink_to(mountpoint)
    command.posthoc("mount", "--paused", "--", "-live.raw", reference, link, cwd=tmp_path)
    assert command.status(mountpoint)["live"] == str(tmp_path / "-live.raw")
    command.posthoc("umount", link)
    assert not command.is_mounted(mountpoint)


def test_only_the_mounting_user_sees_it(tmp_path: Path, mountpoint: Path) -> None:
    live, reference = images.pair(tmp_path)
    tmp_path.chmod(0o755)
    look = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "ls", str(mountpoint)]
    for parent in tmp_path.parents:
        if parent.stat().st_uid == os.geteuid() and parent not in (Path("/"), Path("/tmp")):
            parent.chmod(parent.stat().st_mode | 0o011)
    with command.mounted(live, reference, mountpoint):
        assert subprocess.run(look, capture_output=True).returncode != 0
    os.chown(live, 65534, 65534)
    live.chmod(0o640)
    with command.mounted(live, reference, mountpoint, "--allow-other"):
        # As with the image itself: its owner may use the disk, whoever mounted it.
        disk = (mountpoint / "disk").stat()
        assert (disk.st_uid, disk.st_gid, stat.S_IMODE(disk.st_mode)) == (65534, 65534, 0o640)
        as_owner = [*look[:-2], "dd", f"if={mountpoint / 'disk'}", "of=/dev/null", "count=1"]
        assert subprocess.run(as_owner, capture_output=True).returncode == 0
        assert subprocess.run(look, capture_output=True, text=True).stdout.split() == [
            "control",
            "dirty.qcow2",
            "disk",
            "status",
            "status.json",
        ]
