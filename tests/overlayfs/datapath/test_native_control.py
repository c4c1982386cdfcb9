# SPDX-License-Identifier: Apache-2.0
"""What goes through Python while C serves the disk: slow, stopped, crowded, refused, or cut off."""

import concurrent.futures
import contextlib
import errno
import os
import pathlib
import signal
import subprocess
import threading

import pytest

from tests import builds, wait
from tests.overlayfs.datapath import conftest, native

Serve = conftest.Serve
SEGMENT = native.SEGMENT
HAS_RESEND, ASYNC_DIO, ALLOW_MMAP = 1 << 39, 1 << 15, 1 << 36
# All of flags2, INIT_EXT that announces them, and MAX_PAGES: Linux 4.19.
OLD = 0xFFFF_FFFF << 32 | 1 << 30 | 1 << 22


def open_and_close(path: pathlib.Path) -> None:
    os.close(os.open(path, os.O_RDONLY))


@builds.sanitized
def test_thousands_of_opens(mount: native.Native) -> None:
    """From many threads at a time; nothing is lost, and status says so after."""
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        for _ in pool.map(open_and_close, [mount.disk, mount.mountpoint / "status.json"] * 1000):
            pass
    assert sorted(os.listdir(mount.mountpoint)) == ["control", "dirty.qcow2", "disk", "status.json"]
    assert mount.facts()["control"] == []


@builds.sanitized
def test_requests_wait_for_a_stopped_session(serve: Serve) -> None:
    """More than the socket holds: they wait in the server, the disk goes on, and all are answered."""
    with serve(socket_buffer=4096) as it, open(it.disk, "r+b", buffering=0) as disk:
        os.kill(it.process.pid, signal.SIGSTOP)
        with concurrent.futures.ThreadPoolExecutor(200) as pool:
            try:
                opened = [pool.submit(open_and_close, it.disk) for _ in range(200)]
                for start in range(0, conftest.SIZE - SEGMENT, SEGMENT):
                    os.pwrite(disk.fileno(), b"on", start)
                assert not any(future.done() for future in opened)
            finally:
                os.kill(it.process.pid, signal.SIGCONT)
            for future in opened:
                future.result(wait.DEADLINE)
        assert it.written() == set(range(conftest.SIZE // SEGMENT))


@builds.sanitized
def test_releases_wait_for_a_stopped_session(serve: Serve) -> None:
    """More than the socket holds: each opener's map would stay in the session's memory until its end."""
    with serve(socket_buffer=4096) as it:
        opened = [os.open(it.mountpoint / "dirty.qcow2", os.O_RDONLY) for _ in range(300)]
        assert it.facts()["openers"] == 300
        os.kill(it.process.pid, signal.SIGSTOP)
        try:
            for descriptor in opened:
                os.close(descriptor)
        finally:
            os.kill(it.process.pid, signal.SIGCONT)
        wait.until(lambda: it.facts()["openers"] == 0, "the session has forgotten them")


def test_requests_wait_for_the_next_session(serve: Serve) -> None:
    """Those of a session that is dead, read by it or not, are answered by the one that adopts the mount."""
    with serve(restart=False) as it:
        os.kill(it.process.pid, signal.SIGSTOP)
        with concurrent.futures.ThreadPoolExecutor(50) as pool:
            opened = [pool.submit(open_and_close, it.disk) for _ in range(50)]
            it.die()
            it.process = native.spawn_adopting(it.folder)
            assert native.first_line(it) == f"mounted {it.mountpoint}"
            for future in opened:
                future.result(wait.DEADLINE)


def test_writers_do_not_wait_for_python(mount: native.Native) -> None:
    """After a write the kernel asks for the disk's size, holding a lock that every writer needs: never Python."""
    session = mount.process.pid

    def use(descriptor: int) -> None:
        for at in range(3):
            os.pwrite(descriptor, b"on", at * SEGMENT)
            assert os.lseek(descriptor, 0, os.SEEK_END) == conftest.SIZE
            os.pwrite(descriptor, b"on", at * SEGMENT)
            os.utime(descriptor)
            os.pwrite(descriptor, b"on", at * SEGMENT)
            assert os.fstat(descriptor).st_size == conftest.SIZE

    descriptor = os.open(mount.disk, os.O_RDWR)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        os.kill(session, signal.SIGSTOP)
        try:
            pool.submit(use, descriptor).result(wait.DEADLINE)
        finally:
            os.kill(session, signal.SIGCONT)
    os.close(descriptor)
    assert mount.written() == {0, 1, 2}


def test_attributes_are_refused_by_the_server_as_by_the_session(mount: native.Native) -> None:
    """Size, mode and owner stay; what changes nothing is accepted."""
    status = os.stat(mount.disk)
    with open(mount.disk, "r+b", buffering=0) as disk:
        os.ftruncate(disk.fileno(), conftest.SIZE)
        for size in (0, conftest.SIZE - 1, conftest.SIZE + 1):
            with pytest.raises(PermissionError):
                os.ftruncate(disk.fileno(), size)
        os.fchmod(disk.fileno(), 0o600)
        with pytest.raises(PermissionError):
            os.fchmod(disk.fileno(), 0o644)
        os.fchown(disk.fileno(), status.st_uid, status.st_gid)
        with pytest.raises(PermissionError):
            os.fchown(disk.fileno(), 1, status.st_gid)
        assert os.fstat(disk.fileno()) == status


def test_closing_waits_for_nobody(mount: native.Native, tmp_path: pathlib.Path) -> None:
    """A close of any file is answered though Python sleeps: unanswered ones would hold up asynchronous requests."""
    control = tmp_path / "fusectl"
    control.mkdir()
    minor = os.minor(os.stat(mount.disk).st_dev)
    files = [
        os.open(mount.mountpoint / name, os.O_RDONLY)
        for name in ["disk", "status.json", "dirty.qcow2"] * 40
    ]
    subprocess.run(["mount", "-t", "fusectl", "none", control], check=True)
    try:
        os.kill(mount.process.pid, signal.SIGSTOP)
        for descriptor in files:
            os.close(descriptor)
        waiting = control / str(minor) / "waiting"
        wait.until(lambda: waiting.read_text() == "0\n", "every close is answered")
    finally:
        os.kill(mount.process.pid, signal.SIGCONT)
        subprocess.run(["umount", control], check=True)
    assert mount.facts()["pid"] == mount.process.pid


@pytest.mark.parametrize("buffer", [4096, 65536, 208 * 1024], ids=["4K", "64K", "208K"])
def test_large_files_through_small_sockets(serve: Serve, buffer: int) -> None:
    """A reader gets every byte though no packet may be larger than the socket's buffer."""
    expected = b"".join(bytes([page % 251]) * 4096 for page in range(768)) + bytes(17)
    with serve(socket_buffer=buffer) as it:
        assert (it.mountpoint / "dirty.qcow2").read_bytes() == expected
        descriptor = os.open(it.mountpoint / "dirty.qcow2", os.O_RDONLY)
        assert os.pread(descriptor, 100, 5000) == expected[5000:5100]
        os.close(descriptor)


def test_large_requests_of_the_disk(serve: Serve) -> None:
    """A data path with requests of 1 MiB still refuses such a command."""
    with serve(max_write=1 << 20) as it:
        descriptor = os.open(it.disk, os.O_RDWR)
        assert os.pwrite(descriptor, b"z" * (4 << 20), 12345) == 4 << 20
        assert os.pread(descriptor, 4 << 20, 12345) == b"z" * (4 << 20)
        os.close(descriptor)
        control = os.open(it.mountpoint / "control", os.O_WRONLY)
        with pytest.raises(OSError) as error:
            os.write(control, b"x" * (1 << 20))
        assert error.value.errno in (errno.EFBIG, errno.EMSGSIZE)
        os.close(control)
        assert it.facts()["control"] == []


@pytest.mark.parametrize(
    ("mask", "missing"),
    [
        pytest.param(HAS_RESEND, "not replaced when killed", id="resend"),
        pytest.param(ASYNC_DIO, "without asynchronous direct I/O", id="async-dio"),
        pytest.param(ALLOW_MMAP, "without shared mappings", id="mmap"),
        pytest.param(OLD, "not replaced when killed", id="before-flags2"),
    ],
)
def test_old_kernel(serve: Serve, mask: int, missing: str) -> None:
    """A flag that the kernel does not have is not granted; the disk works, and the status says it."""
    with serve(faults=f"mask={mask:x}") as it:
        facts = it.facts()
        assert missing in facts["description"]
        # Flags that libfuse adds of itself are beyond this data path.
        assert not facts["granted_flags"] & mask & (ASYNC_DIO | ALLOW_MMAP)
        descriptor = os.open(it.disk, os.O_RDWR)
        assert os.pwrite(descriptor, b"old" * 1000, 100_000) == 3000
        assert os.pread(descriptor, 3000, 100_000) == b"old" * 1000
        os.close(descriptor)
        assert it.end() == {1}


def test_without_resend_a_killed_server_ends_the_mount(serve: Serve) -> None:
    """What cannot be sent again would hang for ever: everybody gets an error instead, and nobody is left."""
    with serve(faults=f"mask={HAS_RESEND:x}") as it:
        os.kill(it.pid("server"), signal.SIGKILL)
        wait.until(lambda: not it.processes(), "no process is left")
        assert not it.is_mounted()


@conftest.both_ways
@builds.sanitized
@pytest.mark.parametrize("writers", [6, 20])
def test_status_answers_while_the_disk_hangs(serve: Serve, writers: int) -> None:
    """Every data thread waits for a slow disk, spare ones too, and more requests than there are threads."""
    with serve(faults="before-write=500000") as it:
        descriptor = os.open(it.disk, os.O_RDWR)
        threads = [
            threading.Thread(target=os.pwrite, args=[descriptor, b"slow" * 1024, i * SEGMENT])
            for i in range(writers)
        ]
        for thread in threads:
            thread.start()
        wait.until(lambda: it.facts()["depth"] >= min(writers, 9), "spare readers take requests")
        assert it.facts()["guest"]["write"][0] < writers
        for thread in threads:
            thread.join()
        os.close(descriptor)
        assert it.written() == set(range(writers))


class Load:
    """Reads and writes of the disk from three threads until they fail."""

    def __init__(self, it: native.Native) -> None:
        self.descriptor = os.open(it.disk, os.O_RDWR)
        self.done = 0
        self.errors: list[int | None] = []
        self.threads = [threading.Thread(target=self._run, args=[i]) for i in range(3)]
        for thread in self.threads:
            thread.start()
        wait.until(lambda: self.done > 100, "the load runs")

    def _run(self, number: int) -> None:
        try:
            while True:
                os.pwrite(self.descriptor, b"load" * 1024, number * SEGMENT)
                os.pread(self.descriptor, 4096, number * SEGMENT)
                self.done += 1
        except OSError as error:
            self.errors.append(error.errno)

    def end(self) -> None:
        """Let the threads fail on a file that is none of the mount's."""
        reader, writer = os.pipe()
        os.dup2(reader, self.descriptor)
        os.close(reader)
        os.close(writer)
        self.join()

    def join(self) -> None:
        for thread in self.threads:
            thread.join(wait.DEADLINE)
            assert not thread.is_alive(), "a request hangs"
        with contextlib.suppress(OSError):
            os.close(self.descriptor)


def left_well(it: native.Native) -> None:
    """The session ends by itself with status 0, and with it everything."""
    assert it.process.wait(wait.DEADLINE) == 0, it.log
    wait.until(lambda: not it.processes(), "no process is left")
    assert not it.is_mounted()
    assert native.spread(native.read_map(it.folder)) == {0, 1, 2}


@builds.sanitized
def test_abort_under_load(mount: native.Native, tmp_path: pathlib.Path) -> None:
    """An administrator's abort (fusectl) ends requests and session; the map is written."""
    control = tmp_path / "fusectl"
    control.mkdir()
    load = Load(mount)
    minor = os.minor(os.stat(mount.disk).st_dev)
    subprocess.run(["mount", "-t", "fusectl", "none", control], check=True)
    try:
        (control / str(minor) / "abort").write_text("1")
    finally:
        subprocess.run(["umount", control], check=True)
    load.join()
    left_well(mount)


def test_names_are_listed_under_load(mount: native.Native) -> None:
    """By several at a time, while others write and read: every listing is whole, and the load goes on."""
    names = ["control", "dirty.qcow2", "disk", "status.json"]
    load = Load(mount)
    try:
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            for listed in pool.map(os.listdir, [mount.mountpoint] * 400):
                assert sorted(listed) == names
        done = load.done
        wait.until(lambda: load.done > done, "the load goes on")
        assert load.errors == []
    finally:
        load.end()
    assert mount.written() == {0, 1, 2}


def test_lazy_umount_under_load(mount: native.Native) -> None:
    """The disk works until its last user closes it; then all ends."""
    load = Load(mount)
    subprocess.run(["umount", "--lazy", mount.mountpoint], check=True)
    done = load.done
    wait.until(lambda: load.done > done + 100, "the open disk goes on")
    assert mount.process.poll() is None
    load.end()
    left_well(mount)


@builds.sanitized
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_signal_under_load(mount: native.Native, number: signal.Signals) -> None:
    """The session unmounts, lazily because it is busy: what was begun is finished, the rest fails."""
    load = Load(mount)
    mount.process.send_signal(number)
    load.join()
    assert set(load.errors) <= {errno.ENOTCONN, errno.ECONNABORTED}
    left_well(mount)


def test_umount_of_an_idle_mount(mount: native.Native) -> None:
    """From outside; nothing is left but the map."""
    subprocess.run(["umount", mount.mountpoint], check=True)
    assert mount.process.wait(wait.DEADLINE) == 0, mount.log
    wait.until(lambda: not mount.processes(), "no process is left")
    assert native.read_map(mount.folder) == []


def test_program_that_does_not_serve_is_refused(
    tmp_path: pathlib.Path, request: pytest.FixtureRequest
) -> None:
    """Whatever is wrong with the program: one line, nothing mounted, so that python can serve instead."""
    conftest.fill(tmp_path)
    for program, reason in (
        ("/nonexistent/posthoc-datapath", "was not built"),
        ("/dev/null", "was not built"),
        ("/bin/false", "ended with status 1"),
    ):
        it = native.spawn(tmp_path, pathlib.Path(program))
        request.addfinalizer(it.close)
        line = native.first_line(it)
        assert line.startswith("refused the native data path cannot be used: ")
        assert line.endswith(reason)
        assert it.process.wait() == 2
        assert not it.is_mounted()
