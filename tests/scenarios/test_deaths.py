# SPDX-License-Identifier: Apache-2.0
"""Processes of a mount are killed while a guest writes: no I/O error, nothing lost, no segment missed."""

import json
import os
import pathlib
import signal
import statistics
import subprocess
import time

import pytest

from tests import builds, command, oracle, qemu, wait
from tests.posthoc import images
from tests.posthoc.images import MIB, SEGMENT
from tests.scenarios import killing, test_race
from tests.vm import guest

Path = pathlib.Path


def test_a_killed_session_is_replaced_and_goes_on(tmp_path: Path, mountpoint: Path) -> None:
    """What was written and decided is kept, what was changed at run time too."""
    live, reference = images.pair(tmp_path, 8 * MIB, changed=[3])
    output = tmp_path / "map.qcow2"
    options = ["--datapath", "native", "--output", output]
    with command.mounted(live, reference, mountpoint, *options) as mount:
        before = command.until_state(mount, "complete")
        command.control(mount, "rate 7M")
        with open(mount / "disk", "r+b", buffering=0) as disk:
            disk.seek(20 * SEGMENT)
            disk.write(b"before")
            killing.kill_session(mount)
            disk.seek(40 * SEGMENT)
            disk.write(b"behind")
            os.fsync(disk.fileno())
            disk.seek(20 * SEGMENT)
            assert disk.read(6) == b"before"
        after = command.until_state(mount, "complete")
        assert after["differing"] == before["differing"] == SEGMENT
        assert after["written"] == 2 * SEGMENT
        assert after["since"] == before["since"]
        assert after["guest"]["writes"]["operations"] == 2
    assert qemu.dirty_segments(output, SEGMENT) == {3, 20, 40}


def test_a_scan_goes_on_where_its_session_died(tmp_path: Path, mountpoint: Path) -> None:
    live, reference = images.pair(tmp_path, 64 * MIB, changed=[3])
    with command.mounted(live, reference, mountpoint, "--datapath", "native", "--paused") as mount:
        command.control(mount, "rate 8M")
        command.control(mount, "resume")
        wait.until(lambda: command.status(mount)["scanned"] >= 2 * MIB, "a part is scanned")
        command.control(mount, "pause")
        killing.kill_session(mount)
        status = command.status(mount)
        assert status["state"] == "paused"
        assert status["scanned"] >= 2 * MIB
        command.control(mount, "rate none\nresume")
        assert command.until_state(mount, "complete")["dirty"] == SEGMENT


def test_a_cancelled_scan_stays_cancelled(tmp_path: Path, mountpoint: Path) -> None:
    live, reference = images.pair(tmp_path)
    with command.mounted(live, reference, mountpoint, "--datapath", "native", "--paused") as mount:
        command.control(mount, "cancel")
        command.until_state(mount, "cancelled")
        killing.kill_session(mount)
        assert command.until_state(mount, "cancelled")["dirty"] == 4 * MIB


@pytest.mark.parametrize("how", ["content", "other-file", "gone"])
def test_a_reference_that_has_changed_is_not_trusted(
    tmp_path: Path, mountpoint: Path, how: str
) -> None:
    """What was equal to the old one says nothing of the new one: it is scanned again, or all is dirty."""
    live, reference = images.pair(tmp_path, 2 * MIB)

    def change() -> None:
        if how == "content":
            images.overwrite(reference, 5 * SEGMENT, b"changed")
        else:
            reference.unlink()
        if how == "other-file":
            other = bytearray(live.read_bytes())
            other[5 * SEGMENT] ^= 1
            reference.write_bytes(other)

    with command.mounted(live, reference, mountpoint, "--datapath", "native") as mount:
        assert command.until_state(mount, "complete")["dirty"] == 0
        killing.replace_session(mount, change)
        if how == "gone":
            assert command.until_state(mount, "failed")["dirty"] == 2 * MIB
            assert (mount / "disk").read_bytes() == live.read_bytes()
            command.posthoc("umount", mount, status=3)
        else:
            assert command.until_state(mount, "complete")["dirty"] == SEGMENT


def test_a_reference_that_comes_back_is_compared_again(tmp_path: Path, mountpoint: Path) -> None:
    """What was decided against the one in between says nothing of the first, though it is as it was."""
    live, reference = images.pair(tmp_path, 2 * MIB, changed=[5])
    first, second = tmp_path / "first", tmp_path / "second"
    os.link(reference, first)
    second.write_bytes(live.read_bytes())
    with command.mounted(live, reference, mountpoint, "--datapath", "native") as mount:
        assert command.until_state(mount, "complete")["dirty"] == SEGMENT
        killing.replace_session(mount, lambda: second.rename(reference))
        assert command.until_state(mount, "complete")["dirty"] == 0
        killing.replace_session(mount, lambda: first.rename(reference))
        assert command.until_state(mount, "complete")["dirty"] == SEGMENT


def test_a_reference_whose_backing_file_has_changed_is_not_trusted(
    tmp_path: Path, mountpoint: Path
) -> None:
    """The overlay itself is the file that it was."""
    live, reference = images.pair(tmp_path, 2 * MIB)
    overlay = tmp_path / "overlay.qcow2"
    qemu.create(overlay, 2 * MIB, "qcow2", backing=(reference, "raw"))
    names = (live, f"qcow2:{overlay}", mountpoint)
    with command.mounted(*names, "--datapath", "native") as mount:
        assert command.until_state(mount, "complete")["dirty"] == 0
        killing.replace_session(mount, lambda: images.overwrite(reference, 5 * SEGMENT, b"changed"))
        assert command.until_state(mount, "complete")["dirty"] == SEGMENT


def test_adopting_what_has_a_session_is_refused(tmp_path: Path, mountpoint: Path) -> None:
    live, reference = images.pair(tmp_path)
    with command.mounted(live, reference, mountpoint, "--datapath", "native") as mount:
        refused = command.posthoc("mount", "--adopt", mount, status=2)
        assert "another posthoc session serves it" in refused.stderr
        assert command.until_state(mount, "complete")["dirty"] == 0


def test_a_session_that_cannot_go_on_leaves_the_disk(tmp_path: Path, mountpoint: Path) -> None:
    """Whatever makes Python give up (here: what its predecessor left is of another version), the guest goes on."""
    live, reference = images.pair(tmp_path, 4 * MIB)
    with command.mounted(live, reference, mountpoint, "--datapath", "native") as mount:
        with (
            open(mount / "disk", "r+b", buffering=0) as disk,
            killing.shared_memory(mount) as memory,
        ):
            session = killing.pid_of(mount)
            left = memory.session
            memory.write_session(b'{"of": "another version"}')
            os.kill(session, signal.SIGKILL)
            tries = memory.header.sessions
            wait.until(lambda: memory.header.sessions >= tries + 3, "the third has given up")
            for segment in (1, 30, 60):
                disk.seek(segment * SEGMENT)
                disk.write(b"goes on")
            os.fsync(disk.fileno())
            memory.write_session(left)
        # Only the next session can answer.
        assert killing.pid_of(mount) != session
        command.until_state(mount, "complete")
        assert command.status(mount)["written"] == 3 * SEGMENT


def test_adopting_by_hand(tmp_path: Path, mountpoint: Path) -> None:
    """Where the keeper starts no session, the command does: of the same scan and the same map."""
    live, reference = images.pair(tmp_path, 4 * MIB, changed=[3])
    output = tmp_path / "map.qcow2"
    options = ["--datapath", "native", "--output", output]
    with command.mounted(live, reference, mountpoint, *options) as mount:
        dead = command.until_state(mount, "complete")
        with open(mount / "disk", "r+b", buffering=0) as disk:
            with killing.shared_memory(mount) as memory:
                memory.write_restart([])
                os.kill(dead["pid"], signal.SIGKILL)
                os.pwrite(disk.fileno(), b"without a session", 20 * SEGMENT)
                adopted = json.loads(command.posthoc("mount", "--adopt", mount, "--json").stdout)
                # Nobody but the command has started it.
                assert memory.header.sessions == 0
            os.pwrite(disk.fileno(), b"with the next one", 40 * SEGMENT)
            os.fsync(disk.fileno())
        status = command.until_state(mount, "complete")
        assert status["pid"] == adopted["pid"] != dead["pid"]
        assert status["since"] == dead["since"]
        # The next death is the keeper's again.
        killing.kill_session(mount)
        command.posthoc("wait", mount)
    assert qemu.dirty_segments(output, SEGMENT) == {3, 20, 40}


def test_adopting_nothing_is_one_line(tmp_path: Path) -> None:
    refused = command.posthoc("mount", "--adopt", tmp_path, status=2)
    assert len(refused.stderr.splitlines()) == 1


def test_everything_is_killed_in_turns_under_writers(tmp_path: Path, mountpoint: Path) -> None:
    """Session, server, keeper and standby, again and again: the writers see no error, the map misses nothing."""
    size = 24 * MIB
    live, reference = images.pair(tmp_path, size, changed=range(0, 380, 7))
    output = tmp_path / "map.qcow2"
    options = ["--datapath", "native", "--rate", "10M", "--granularity", "4096"]
    with command.mounted(live, reference, mountpoint, *options, "--output", output) as mount:
        disk = mount / "disk"
        with qemu.loop_device(disk) as device:
            writers = [
                test_race.writer(disk, size, 1, "pwrite"),
                test_race.writer(disk, size, 2, "direct"),
                test_race.writer(device, size, 3, "mmap"),
            ]
            with killing.turns(mount) as turns:
                turns.kill_while(lambda: any(writer.poll() is None for writer in writers))
            assert [writer.wait() for writer in writers] == [0, 0, 0]
        command.control(mount, "rate none")
        command.until_state(mount, "complete")
    missed = oracle.differing(live, reference, 4096) - qemu.dirty_segments(output, 4096)
    assert not missed


def test_status_answers_within_a_second_after_a_kill(tmp_path: Path, mountpoint: Path) -> None:
    """The median of five kills: a busy machine may take longer now and then."""
    live, reference = images.pair(tmp_path)

    def answered_after(mount: Path) -> float:
        dead = killing.pid_of(mount)
        os.kill(dead, signal.SIGKILL)
        began = time.monotonic()
        subprocess.run(["cat", mount / "status"], check=True, stdout=subprocess.DEVNULL)
        seconds = time.monotonic() - began
        assert killing.pid_of(mount) != dead
        return seconds

    with command.mounted(live, reference, mountpoint, "--datapath", "native") as mount:
        seconds = [answered_after(mount) for _ in range(5)]
    assert statistics.median(seconds) < 1.0, seconds


def test_a_file_system_outlives_every_death(tmp_path: Path, mountpoint: Path) -> None:
    """ext4 on a loop device over the disk, written and synced while processes are killed: sound, whole, no segment
    missed. 104 kills, eight of them of the session."""
    live, reference = images.pair(tmp_path, 48 * MIB)
    output = tmp_path / "map.qcow2"
    files = {f"file {number}": os.urandom(700_000 + number) for number in range(24)}
    options = ["--datapath", "native", "--granularity", "4096", "--rate", "10M"]
    with command.mounted(live, reference, mountpoint, *options, "--output", output) as mount:
        with qemu.loop_device(mount / "disk", direct=True) as device:
            qemu.mkfs_ext4(device)
            with (
                qemu.mounted(device, tmp_path / "inside") as inside,
                killing.turns(mount) as turns,
            ):
                for number, (name, content) in enumerate(files.items()):
                    (inside / name).write_bytes(content)
                    syncing = subprocess.Popen(["sync", "-f", inside])
                    for role in ["server", "keeper", "standby", "server"]:
                        turns.kill(role)
                    if number % 3 == 2:
                        turns.kill("session")
                    assert syncing.wait(60) == 0
            qemu.fsck_ext4(device)
            with qemu.mounted(device, tmp_path / "inside", "ro") as inside:
                assert all((inside / name).read_bytes() == files[name] for name in files)
        command.control(mount, "rate none")
        command.until_state(mount, "complete")
        assert command.status(mount)["guest"]["writes"]["errors"] == 0
    missed = oracle.differing(live, reference, 4096) - qemu.dirty_segments(output, 4096)
    assert not missed


def test_fio_verifies_across_kills(tmp_path: Path, mountpoint: Path) -> None:
    """Every block reads back as it was written, whoever died between."""
    live, reference = images.pair(tmp_path, 16 * MIB)
    with command.mounted(live, reference, mountpoint, "--datapath", "native") as mount:
        fio = subprocess.Popen(
            [
                *["fio", "--name=verify", f"--filename={mount / 'disk'}", "--size=16M"],
                *["--rw=randwrite", "--bs=4k", "--direct=1", "--ioengine=libaio", "--iodepth=8"],
                *["--verify=crc32c", "--verify_fatal=1", "--loops=4", "--verify_state_save=0"],
                *["--rate_iops=4000"],
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=tmp_path,
            text=True,
        )
        try:
            with killing.turns(mount) as turns:
                turns.kill_while(lambda: fio.poll() is None)
        finally:
            fio.kill()
            said, _ = fio.communicate()
        assert fio.returncode == 0, said
        assert command.status(mount)["guest"]["writes"]["errors"] == 0


def test_a_request_that_no_server_survives_gets_eio(tmp_path: Path, mountpoint: Path) -> None:
    """And nobody else: a guest beside it goes on, the session stays, and what the write was for is in the map."""
    live, reference = images.pair(tmp_path, 16 * MIB)
    output = tmp_path / "map.qcow2"
    fatal = 200 * SEGMENT
    env = {"POSTHOC_DATAPATH": str(builds.datapath("faults")), "POSTHOC_FAULTS": f"crash={fatal}"}
    options = ["--datapath", "native", "--paused", "--output", output]
    with command.mounted(live, reference, mountpoint, *options, env=env) as mount:
        session = killing.pid_of(mount)
        fio = subprocess.Popen(
            [
                *["fio", "--name=verify", f"--filename={mount / 'disk'}", "--size=4M"],
                *["--rw=randwrite", "--bs=4k", "--direct=1", "--ioengine=libaio", "--iodepth=8"],
                *["--verify=crc32c", "--verify_fatal=1", "--loops=4", "--verify_state_save=0"],
                *["--rate_iops=2000"],
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=tmp_path,
            text=True,
        )
        rounds = 0
        while fio.poll() is None:
            guest = subprocess.run(
                ["qemu-io", "-f", "raw", "-c", f"write -P 7 {fatal} 4k", mount / "disk"],
                capture_output=True,
                text=True,
                timeout=wait.DEADLINE,
            )
            assert "write failed: Input/output error" in guest.stdout + guest.stderr
            rounds += 1
        said, _ = fio.communicate()
        assert fio.returncode == 0, said
        assert rounds > 1
        status = command.status(mount)
        assert status["pid"] == session
        assert status["guest"]["writes"]["errors"] == rounds
        command.control(mount, "resume")
        command.until_state(mount, "complete")
    # Where the guest's data is the reference's there is nothing to be found but by the record.
    assert 200 in qemu.dirty_segments(output, SEGMENT)
    assert (
        live.read_bytes()[fatal : fatal + SEGMENT]
        == reference.read_bytes()[fatal : fatal + SEGMENT]
    )


WRITES_AND_TRIMS = """
set -e
mount -t ext4 /dev/vda /mnt
echo "guest: writing"
for i in $(seq 20); do
    dd if=/dev/urandom of=/mnt/new.$i bs=100k count=2 2>/dev/null
    sync
done
rm "/mnt/old 2"
fstrim /mnt
dd if=/dev/zero of="/mnt/old 3" bs=4k seek=100 count=10 conv=notrunc 2>/dev/null
sha256sum /mnt/new.* >/mnt/sums
umount /mnt
mount -t ext4 -o ro /dev/vda /mnt
sha256sum -c /mnt/sums | grep -v ': OK' && exit 1
umount /mnt
"""


def test_a_guest_outlives_every_death(workdir: Path, mountpoint: Path) -> None:
    """A guest that boots from the disk writes files and trims: it sees no error, its file system is sound, and no
    segment is missed."""
    live, reference, output = workdir / "live.raw", workdir / "reference", workdir / "map.qcow2"
    files = workdir / "files"
    files.mkdir()
    for number in range(4):
        (files / f"old {number}").write_bytes(os.urandom(MIB))
    qemu.create(reference, 48 * MIB)
    qemu.mkfs_ext4(reference, "-d", str(files))
    qemu.run("cp", "--sparse=always", reference, live)
    images.overwrite(live, 47 * MIB, b"unrecorded")
    options = ["--datapath", "native", "--rate", "4M", "--output", output]
    with command.mounted(live, reference, mountpoint, *options) as mount:
        with guest.boot(mount / "disk", WRITES_AND_TRIMS) as running:
            running.until("guest: writing")
            with killing.turns(mount) as turns:
                turns.kill_while(lambda: running.running)
            console = running.wait()
        command.control(mount, "rate none")
        status = command.until_state(mount, "complete")
    assert "error" not in console, console
    assert [verb for verb, counts in status["guest"].items() if counts["errors"]] == []
    assert status["guest"]["discards"]["operations"] > 0
    qemu.fsck_ext4(live)
    missed = oracle.differing(live, reference, SEGMENT) - qemu.dirty_segments(output, SEGMENT)
    assert not missed
