# SPDX-License-Identifier: Apache-2.0
"""Processes of a mount are killed while a guest writes: no I/O error, nothing lost, no segment missed."""

import contextlib
import os
import pathlib
import signal
import subprocess
import time
from collections.abc import Callable, Iterator

import pytest

from overlayfs.datapath import shared
from tests import builds, command, oracle, qemu, wait
from tests.posthoc import images
from tests.posthoc.images import MIB, SEGMENT
from tests.scenarios import test_race

Path = pathlib.Path


def pid_of(mountpoint: Path) -> int:
    return int(command.status(mountpoint)["pid"])


def kill_session(mountpoint: Path) -> None:
    """Kill the session and wait until another one answers."""
    replace_session(mountpoint, lambda: None)


def replace_session(mountpoint: Path, change: Callable[[], object]) -> None:
    """Kill the session with `change` done before the next one looks, and wait until that answers."""
    pid = pid_of(mountpoint)
    os.kill(pid, signal.SIGSTOP)
    change()
    os.kill(pid, signal.SIGKILL)
    wait.until(lambda: pid_of(mountpoint) != pid, "the next session answers")


def natives(mountpoint: Path) -> list[int]:
    """The processes of the mount's data path: keeper, standby and server."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
            held = {os.readlink(fd) for fd in (process / "fd").iterdir()}
        except OSError:
            continue
        ours = b"keeper" in words and words[0].endswith(b"posthoc-datapath")
        if ours and str(mountpoint.parent / "live.raw") in held:
            found.append(int(process.name))
    return found


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
            kill_session(mount)
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
        kill_session(mount)
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
        kill_session(mount)
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
        replace_session(mount, change)
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
        replace_session(mount, lambda: second.rename(reference))
        assert command.until_state(mount, "complete")["dirty"] == 0
        replace_session(mount, lambda: first.rename(reference))
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
        replace_session(mount, lambda: images.overwrite(reference, 5 * SEGMENT, b"changed"))
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
        with open(mount / "disk", "r+b", buffering=0) as disk, shared_memory(mount) as memory:
            session = pid_of(mount)
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
        assert pid_of(mount) != session
        command.until_state(mount, "complete")
        assert command.status(mount)["written"] == 3 * SEGMENT


@contextlib.contextmanager
def shared_memory(mountpoint: Path) -> Iterator[shared.Memory]:
    """What the mount's processes share, from one of them."""
    for fd in Path(f"/proc/{natives(mountpoint)[0]}/fd").iterdir():
        if os.readlink(fd).startswith("/memfd:posthoc"):
            memory = shared.Memory(os.open(fd, os.O_RDWR))
            break
    try:
        yield memory
    finally:
        memory.close()


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
            killed = 0
            while any(writer.poll() is None for writer in writers) or killed < 6:
                for pid in natives(mount):
                    os.kill(pid, signal.SIGKILL)
                    killed += 1
                    wait.until(
                        lambda: len(natives(mount)) == 3, "keeper, standby and server are back"
                    )
                kill_session(mount)
                killed += 1
            assert [writer.wait() for writer in writers] == [0, 0, 0]
        command.control(mount, "rate none")
        command.until_state(mount, "complete")
    missed = oracle.differing(live, reference, 4096) - qemu.dirty_segments(output, 4096)
    assert not missed


def test_status_answers_within_a_second_after_a_kill(tmp_path: Path, mountpoint: Path) -> None:
    """A busy machine may take longer now and then: of some kills one is answered as fast as promised."""
    live, reference = images.pair(tmp_path)

    def answered_after() -> float:
        os.kill(pid_of(mountpoint), signal.SIGKILL)
        began = time.monotonic()
        subprocess.run(["cat", mountpoint / "status"], check=True, stdout=subprocess.DEVNULL)
        return time.monotonic() - began

    with command.mounted(live, reference, mountpoint, "--datapath", "native"):
        wait.until(lambda: answered_after() < 1.0, "a status within a second")


def test_a_file_system_outlives_every_death(tmp_path: Path, mountpoint: Path) -> None:
    """ext4 on a loop device over the disk, written and synced while processes are killed: sound, whole, no segment
    missed."""
    live, reference = images.pair(tmp_path, 48 * MIB)
    output = tmp_path / "map.qcow2"
    files = {f"file {number}": os.urandom(700_000 + number) for number in range(24)}
    options = ["--datapath", "native", "--granularity", "4096", "--rate", "10M"]
    with command.mounted(live, reference, mountpoint, *options, "--output", output) as mount:
        with qemu.loop_device(mount / "disk", direct=True) as device:
            qemu.mkfs_ext4(device)
            with qemu.mounted(device, tmp_path / "inside") as inside:
                for number, (name, content) in enumerate(files.items()):
                    (inside / name).write_bytes(content)
                    syncing = subprocess.Popen(["sync", "-f", inside])
                    for pid in natives(mount)[: 1 + number % 2]:
                        os.kill(pid, signal.SIGKILL)
                    if number % 6 == 5:
                        kill_session(mount)
                    assert syncing.wait(60) == 0
                    wait.until(
                        lambda: len(natives(mount)) == 3, "keeper, standby and server are back"
                    )
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
        while fio.poll() is None:
            for pid in natives(mount):
                os.kill(pid, signal.SIGKILL)
                wait.until(lambda: len(natives(mount)) == 3, "keeper, standby and server are back")
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
        session = pid_of(mount)
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
