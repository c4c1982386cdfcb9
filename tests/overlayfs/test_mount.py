# SPDX-License-Identifier: Apache-2.0
"""Beginning and end of a mount: refused in one line, or gone when its process is."""

import errno
import itertools
import mmap
import os
import pathlib
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress

import pytest

from tests import wait
from tests.overlayfs import conftest, mounted
from tests.overlayfs.conftest import gated, python_only

NOBODY = 65534
Serve = Callable[..., AbstractContextManager[mounted.Mounted]]


@contextmanager
def spawned(
    tmp_path: pathlib.Path, live: pathlib.Path, mountpoint: pathlib.Path, **config: object
) -> Iterator[mounted.Mounted]:
    """Start a server whose first line the test reads."""
    it = mounted.spawn(tmp_path, live, mountpoint, **config)  # type: ignore[arg-type]
    try:
        yield it
    finally:
        it.close()


def script(path: pathlib.Path, body: str) -> pathlib.Path:
    """Write a command that stands in for a tool."""
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def lives(pid: int) -> bool:
    """Return whether a process, nobody's child of ours, still runs."""
    try:
        state = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


# Refused


def test_mountpoint_that_is_not_empty(
    tmp_path: pathlib.Path, live: pathlib.Path, mountpoint: pathlib.Path, datapath: str
) -> None:
    """One line, nothing mounted, what was in the folder is untouched."""
    (mountpoint / "mine").write_text("mine")
    with spawned(tmp_path, live, mountpoint, datapath=datapath) as it:
        assert it.line() == {"refused": f"{mountpoint}: the directory is not empty"}
        it.end()
        assert not it.is_mounted()
    assert (mountpoint / "mine").read_text() == "mine"


@python_only
def test_mountpoint_that_is_mounted_already(mount: mounted.Mounted, tmp_path: pathlib.Path) -> None:
    """A second session on one mountpoint is refused and the first goes on."""
    folder = tmp_path / "second"
    folder.mkdir()
    other = conftest.fill(folder / "live", 1 << 20)
    with spawned(folder, other, mount.mountpoint) as second:
        line = second.line()["refused"]
        assert line.startswith(f"{mount.mountpoint}: fuse.posthoc is mounted here already")
        second.end()
    assert mount.disk.stat().st_size == conftest.SIZE


@python_only
def test_two_mounts_at_a_time(mount: mounted.Mounted, tmp_path: pathlib.Path) -> None:
    """Sessions of different processes do not disturb each other."""
    folder = tmp_path / "second"
    (folder / "mnt").mkdir(parents=True)
    other = conftest.fill(folder / "live", 1 << 20)
    with mounted.serving(folder, other, folder / "mnt") as second:
        assert second.disk.read_bytes() == other.read_bytes()
        assert mount.disk.read_bytes() == mount.live.read_bytes()
    assert mount.disk.stat().st_size == conftest.SIZE


def test_mount_that_does_not_answer_is_taken_away(
    tmp_path: pathlib.Path, live: pathlib.Path, mountpoint: pathlib.Path, datapath: str
) -> None:
    """started() is only said of a mount that a child's statfs got an answer from."""
    broken = script(tmp_path / "stat", "exit 7")
    environment = {"POSTHOC_STAT": str(broken)}
    with spawned(tmp_path, live, mountpoint, datapath=datapath, environment=environment) as it:
        line = it.line()["refused"]
        assert line == f"{mountpoint}: the mount does not answer: {broken} ended with status 7"
        it.end()
        assert not it.is_mounted()


def test_cancelled_while_the_mount_is_being_asked(
    tmp_path: pathlib.Path, live: pathlib.Path, mountpoint: pathlib.Path, datapath: str
) -> None:
    """SIGTERM during the start: a child that gets no answer is not waited for, the mount is gone."""
    asked = tmp_path / "asked"
    stuck = script(tmp_path / "stat", f"touch {asked}\nexec sleep 1000")
    environment = {"POSTHOC_STAT": str(stuck)}
    with spawned(tmp_path, live, mountpoint, datapath=datapath, environment=environment) as it:
        wait.until(asked.exists, "the mount is being asked")
        assert it.terminate() == 0
        assert not it.is_mounted()


# Ended from outside


def test_umount_ends_it(serve: Serve) -> None:
    """Who unmounts ends the session, with success."""
    with serve() as mount:
        subprocess.run(["umount", mount.mountpoint], check=True)
        assert mount.end() == 0
        assert not mount.is_mounted()


def test_umount_is_refused_while_a_file_is_open(serve: Serve) -> None:
    """A guest that uses the disk keeps it; afterwards umount works."""
    with serve() as mount:
        with mount.disk.open("rb"):
            done = subprocess.run(["umount", mount.mountpoint], capture_output=True, text=True)
            assert "busy" in done.stderr
            assert mount.disk.stat().st_size == conftest.SIZE
        subprocess.run(["umount", mount.mountpoint], check=True)
        assert mount.end() == 0


def test_lazy_umount_serves_open_files_until_they_are_closed(serve: Serve) -> None:
    """Detached, the disk works for who has it open, writes are recorded, and then the session ends."""
    with serve() as mount:
        disk = os.open(mount.disk, os.O_RDWR)
        try:
            subprocess.run(["umount", "--lazy", mount.mountpoint], check=True)
            assert not mount.is_mounted()
            assert os.pwrite(disk, b"x" * 100, 70_000) == 100
            assert os.pread(disk, 100, 70_000) == b"x" * 100
            assert mount.written() == {1}
            assert mount.process.poll() is None
        finally:
            os.close(disk)
        assert mount.end() == 0


def test_abort_of_the_connection_ends_it(serve: Serve, tmp_path: pathlib.Path) -> None:
    """fusectl's abort leaves a dead mount behind; the session takes it away."""
    control = tmp_path / "fusectl"
    control.mkdir()
    with serve() as mount:
        device = os.stat(mount.mountpoint).st_dev
        subprocess.run(["mount", "-t", "fusectl", "none", control], check=True)
        try:
            (control / str(os.minor(device)) / "abort").write_text("1")
        finally:
            subprocess.run(["umount", control], check=True)
        assert mount.end() == 0
        assert not mount.is_mounted()


def test_dirty_pages_of_a_mapping_are_written_at_the_end(serve: Serve) -> None:
    """What was written through a mapping is in the image when umount has returned."""
    with serve() as mount:
        disk = os.open(mount.disk, os.O_RDWR)
        with mmap.mmap(disk, 0) as mapping:
            mapping[200_000:200_004] = b"late"
            os.close(disk)
        subprocess.run(["umount", mount.mountpoint], check=True)
        assert mount.end() == 0
        assert mount.live.read_bytes()[200_000:200_004] == b"late"
        assert mount.written() == {200_000 // 65536}


# Ended by a signal


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_signal_unmounts(serve: Serve, number: signal.Signals) -> None:
    """Cancelled, it unmounts and ends well."""
    with serve() as mount:
        mount.process.send_signal(number)
        assert mount.end() == 0
        assert not mount.is_mounted()


def test_signal_while_a_file_is_open(serve: Serve) -> None:
    """The mount goes all the same; who has the disk open gets an error, never a hang."""
    with serve() as mount:
        disk = os.open(mount.disk, os.O_RDWR | os.O_DIRECT)
        try:
            assert mount.terminate() == 0
            assert not mount.is_mounted()
            with pytest.raises(OSError) as error:
                os.pread(disk, 4096, 0)
            assert error.value.errno in (errno.ENOTCONN, errno.ECONNABORTED, errno.EINVAL)
        finally:
            conftest.hang_up(disk)


@gated
def test_signal_finishes_the_write_that_is_under_way(serve: Serve) -> None:
    """A write that has reached us lands whole, is marked, and is answered before the process ends."""
    with serve() as mount:
        mount.ask("close_gate", "before")
        # The exit status is the write's: a close that follows may find the mount gone.
        program = (
            "import mmap, os, sys\n"
            "disk = os.open(sys.argv[1], os.O_WRONLY | os.O_DIRECT)\n"
            "os._exit(os.pwritev(disk, [mmap.mmap(-1, 65536)], 3 * 65536) != 65536)\n"
        )
        with subprocess.Popen([sys.executable, "-S", "-c", program, mount.disk]) as writer:
            try:
                mount.wait_until_waiting("before")
                mount.process.send_signal(signal.SIGTERM)
                wait.until(lambda: not mount.is_mounted(), "detached")
                assert mount.process.poll() is None
            finally:
                mount.open_gates()
            assert writer.wait(wait.DEADLINE) == 0
        assert mount.end() == 0
        assert mount.live.read_bytes()[3 * 65536 : 4 * 65536] == bytes(65536)
        assert mount.written() == {3}


@pytest.mark.parametrize(
    ("datapath", "number"),
    [
        *itertools.product(["python", "native", "direct"], [signal.SIGTERM, signal.SIGINT]),
        ("forward", signal.SIGTERM),
    ],
    indirect=["datapath"],
    ids=lambda value: value.name if isinstance(value, signal.Signals) else value,
)
def test_signal_under_load(serve: Serve, number: signal.Signals) -> None:
    """Writers that never stop get an error in the end, and what changed is in the bitmap."""
    with serve() as mount:
        before = mount.live.read_bytes()
        program = (
            "import os,sys\n"
            "disk = os.open(sys.argv[1], os.O_RDWR)\n"
            "print('begun', flush=True)\n"
            "n = int(sys.argv[2])\n"
            "while True:\n"
            "    n = (n * 1103515245 + 12345) % 8388608\n"
            "    os.pwrite(disk, n.to_bytes(4, 'little') * 300, n)\n"
        )
        writers = [
            subprocess.Popen(
                ["python3", "-c", program, mount.disk, str(seed)],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            for seed in (1, 2, 3)
        ]
        try:
            for writer in writers:
                assert writer.stdout is not None
                assert writer.stdout.readline() == b"begun\n"
            wait.until(lambda: len(mount.written()) > 20, "writes arrive")
            mount.process.send_signal(number)
            assert mount.end() == 0
            assert not mount.is_mounted()
            assert [writer.wait(wait.DEADLINE) for writer in writers] == [1, 1, 1]
        finally:
            for writer in writers:
                writer.kill()
                writer.communicate()
        after = mount.live.read_bytes()
        changed = {i for i in range(129) if before[i << 16 :][:65536] != after[i << 16 :][:65536]}
        assert changed
        assert changed <= mount.written()


# Behind the native program the keeper takes it away (as_user.py, test_discards.py).
@pytest.mark.parametrize("datapath", ["python", "native"], indirect=True)
def test_killed_processes_leave_a_dead_mount_that_umount_takes_away(
    serve: Serve, datapath: str
) -> None:
    """SIGKILL gives nobody the time to unmount; no thread of the process hangs on its own mount."""
    with serve() as mount:
        others = mount.ask("pids") if datapath == "native" else []
        # Stopped before, so that none of them can make good for another.
        for pid in [*others, mount.process.pid]:
            os.kill(pid, signal.SIGSTOP)
        for pid in [*others, mount.process.pid]:
            os.kill(pid, signal.SIGKILL)
        assert mount.end() == -signal.SIGKILL
        wait.until(lambda: not any(map(lives, others)), "nothing serves")
        with pytest.raises(OSError) as error:
            os.stat(mount.disk)
        assert error.value.errno == errno.ENOTCONN
        subprocess.run(["umount", mount.mountpoint], check=True)


# Broken


@python_only
def test_failing_data_path_is_unmounted_and_told(serve: Serve) -> None:
    """A bug ends in a traceback, and with nothing mounted."""
    with serve() as mount:
        mount.ask("fail_run")
        assert mount.end() == 1
        assert not mount.is_mounted()
        assert "RuntimeError: the data path has failed" in mount.log.read_text()


@python_only
def test_failing_data_path_while_a_file_is_open(serve: Serve) -> None:
    """The same with a reader at work: it gets an error and never hangs."""
    with serve() as mount:
        disk = os.open(mount.disk, os.O_RDONLY | os.O_DIRECT)
        outcome: list[object] = []

        def read() -> None:
            with mmap.mmap(-1, 4096) as buffer, suppress(OSError):
                while True:
                    os.preadv(disk, [buffer], 0)
            outcome.append("ended")

        reader = threading.Thread(target=read)
        reader.start()
        try:
            mount.ask("fail_run")
            assert mount.end() == 1
            assert not mount.is_mounted()
            reader.join(wait.DEADLINE)
            assert outcome == ["ended"]
        finally:
            conftest.hang_up(disk)


# Access


@python_only
def test_only_the_mounting_user_sees_it(mount: mounted.Mounted) -> None:
    """Without allow_other another user's stat is EACCES, whatever the modes say."""
    assert _as_nobody(mount.mountpoint) == "Permission denied"


@python_only
def test_allow_other_lets_others_in_as_far_as_the_modes_say(serve: Serve) -> None:
    """With allow_other anybody reads status; the disk is still its owner's."""
    with serve(allow_other=True) as mount:
        assert _as_nobody(mount.mountpoint / "status") == ""
        assert _as_nobody(mount.disk) == "Permission denied"


def _as_nobody(path: pathlib.Path) -> str:
    """Return what `cat` or `ls` says when nobody asks for `path`."""
    # pytest's folders are closed to others: nobody comes in through a descriptor of its parent.
    tool = "cat" if path.name in ("status", "disk") else "ls"
    descriptor = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        done = subprocess.run(
            ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", tool, path.name],
            cwd=f"/proc/self/fd/{descriptor}",
            pass_fds=[descriptor],
            capture_output=True,
            text=True,
            env={"LC_ALL": "C", "PATH": os.environ["PATH"]},
        )
    finally:
        os.close(descriptor)
    return done.stderr.strip().rpartition(": ")[2]


@pytest.fixture
def users_folder() -> Iterator[pathlib.Path]:
    """A folder of nobody's. (pytest's are root's alone, and their parents let no other user through.)"""
    folder = pathlib.Path(tempfile.mkdtemp(prefix="posthoc-nobody-"))
    (folder / "mnt").mkdir()
    conftest.fill(folder / "live", 1 << 20)
    for path in (folder, folder / "mnt", folder / "live"):
        os.chown(path, NOBODY, NOBODY)
    yield folder
    shutil.rmtree(folder)


def run_as_user(folder: pathlib.Path, device_mode: int, datapath: str) -> str:
    """Run tests/overlayfs/as_user.py as nobody, who sees a /dev/fuse of `device_mode`."""
    node = folder / "fuse"
    os.mknod(node, stat.S_IFCHR | device_mode, os.stat("/dev/fuse").st_rdev)
    node.chmod(device_mode)
    # In a namespace of its own: what the machine's /dev/fuse allows is not changed for others.
    bind = 'mount --bind "$1" /dev/fuse && shift && exec "$@"'
    command = ["unshare", "--mount", "--", "sh", "-c", bind, "sh", str(node)]
    command += ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    command += [sys.executable, "-m", "tests.overlayfs.as_user", str(folder), datapath]
    done = subprocess.run(command, cwd=mounted.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def test_mounting_without_root(users_folder: pathlib.Path, datapath: str) -> None:
    """Another user mounts and unmounts through fusermount3, with the same behaviour."""
    assert run_as_user(users_folder, 0o666, datapath) == "done"


def test_device_that_the_user_may_not_open(users_folder: pathlib.Path, datapath: str) -> None:
    """One line says so."""
    said = run_as_user(users_folder, 0o600, datapath)
    assert said.startswith("refused: /dev/fuse cannot be opened by this user: ")
