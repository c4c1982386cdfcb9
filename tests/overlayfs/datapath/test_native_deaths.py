# SPDX-License-Identifier: Apache-2.0
"""Who dies is replaced, and the guest sees no error: server, keeper and session, under load and in turns."""

import contextlib
import json
import os
import pathlib
import random
import signal
import subprocess
import threading
from collections.abc import Iterator

import pytest

from tests import builds, oracle, wait
from tests.overlayfs.datapath import conftest, native

Serve = conftest.Serve
SEGMENT = native.SEGMENT
PAGE = 4096
both_ways = conftest.both_ways


class Writer(threading.Thread):
    """Writes pages of numbered content at random places of the disk and reads them back, until told to stop."""

    def __init__(
        self, path: pathlib.Path, model: oracle.ModelDisk, start: int, end: int, seed: int
    ):
        super().__init__(daemon=True)
        self._path = path
        self._model = model
        self._range = (start, end)
        self._numbers = random.Random(seed)
        self._ended = threading.Event()
        self.rounds = 0
        self.failure: str | None = None

    def run(self) -> None:
        disk = os.open(self._path, os.O_RDWR)
        try:
            while not self._ended.is_set():
                self._round(disk)
                self.rounds += 1
        except OSError as error:
            self.failure = repr(error)
        finally:
            os.close(disk)

    def _round(self, disk: int) -> None:
        # Whole pages may go around the page cache, other requests may not.
        unit = self._numbers.choice([512, PAGE])
        start = self._numbers.randrange(*self._range) // unit * unit
        data = self._numbers.randbytes(unit * self._numbers.randrange(1, 17))
        data = data[: self._range[1] - start]
        done = os.pwrite(disk, data, start)
        self._model.write(start, data)
        if done != len(data):
            self.failure = f"{done} bytes written of {len(data)} at {start}"
        if os.pread(disk, len(data), start) != data:
            self.failure = f"other bytes read at {start}"

    def stop(self) -> None:
        self._ended.set()
        self.join()


@contextlib.contextmanager
def load(it: native.Native) -> Iterator[list[Writer]]:
    """Two writers, each in its half of the disk; afterwards neither has seen an error, the image is what they
    wrote, and all they wrote is in the map."""
    model = oracle.ModelDisk.of(it.live, SEGMENT)
    half = len(model.content) // 2 // SEGMENT * SEGMENT
    ranges = [(0, half), (half, len(model.content))]
    writers = [Writer(it.disk, model, *bounds, seed) for seed, bounds in enumerate(ranges)]
    for writer in writers:
        writer.start()
    try:
        go_on(writers)
        yield writers
    finally:
        for writer in writers:
            writer.stop()
    assert [writer.failure for writer in writers] == [None, None]
    assert it.live.read_bytes() == model.content
    assert model.written <= it.written()
    # Work that a dead server had done on a request that was sent again may be marked, nothing else.
    assert it.end() == model.written


def go_on(writers: list[Writer]) -> None:
    """Return when each writer has done some more."""
    before = [writer.rounds for writer in writers]
    wait.until(
        lambda: all(
            writer.rounds > count + 3 or writer.failure
            for writer, count in zip(writers, before, strict=True)
        ),
        "the writers go on",
    )


@both_ways
@builds.sanitized
@pytest.mark.parametrize("role", ["server", "keeper", "session"])
def test_killed_under_load(serve: Serve, role: str) -> None:
    """Ten times (sessions four), and every time the next one takes over what is open."""
    with serve() as it, load(it) as writers:
        for _ in range(4 if role == "session" else 10):
            go_on(writers)
            it.kill(role)
        go_on(writers)
        assert it.facts()["description"].startswith("native")


@both_ways
def test_all_killed_in_turns(serve: Serve) -> None:
    """Each has been started by another than its parent, and still everything is replaced."""
    with serve() as it, load(it) as writers:
        for role in [
            "server",
            "keeper",
            "session",
            "keeper",
            "server",
            "session",
            "session",
            "keeper",
        ]:
            go_on(writers)
            it.kill(role)
        go_on(writers)
        facts = it.facts()
        assert facts["sessions"] == 3
        assert facts["servers"] >= 3


@both_ways
@builds.sanitized
def test_killed_between_mark_write_and_reply(serve: Serve) -> None:
    """Stretched by delays, a kill hits each place; the write is done again, and is in the map."""
    faults = "before-write=2000,after-write=2000,before-reply=2000"
    with serve(faults=faults) as it, load(it) as writers:
        for _ in range(10):
            go_on(writers)
            it.kill("server")
        go_on(writers)


def test_server_killed_while_the_session_is_stopped(serve: Serve) -> None:
    """Two of three are away: the disk goes on with the third."""
    with serve() as it, load(it) as writers:
        session = it.pid("session")
        os.kill(session, signal.SIGSTOP)
        try:
            for _ in range(5):
                go_on(writers)
                it.kill("server")
            go_on(writers)
        finally:
            os.kill(session, signal.SIGCONT)


@both_ways
def test_an_open_disk_goes_on_without_python(serve: Serve) -> None:
    """The session is stopped, then dead with nobody to start it again: readers and writers see nothing of it."""
    with serve(restart=False) as it, contextlib.ExitStack() as stack:
        writers = stack.enter_context(load(it))
        os.kill(it.process.pid, signal.SIGSTOP)
        go_on(writers)
        it.die()
        go_on(writers)
        it.process = native.spawn_adopting(it.folder)
        assert native.first_line(it) == f"mounted {it.mountpoint}"
        assert it.facts()["sessions"] == 0
        go_on(writers)


def test_status_works_again_after_the_session_died(serve: Serve) -> None:
    """A file that was open goes on, and the disk's description and the statistics are those from before."""
    with serve() as it:
        with (
            open(it.disk, "r+b", buffering=0) as disk,
            open(it.mountpoint / "status.json") as status,
        ):
            disk.write(b"x" * 4096)
            before = it.facts()
            it.kill("session")
            after = it.facts()
            assert after["pid"] != before["pid"]
            assert after["guest"]["write"][0] == before["guest"]["write"][0]
            assert after["written"] == [[0, 1]]
            assert json.loads(status.read())["pid"] == after["pid"]
            disk.write(b"y" * 4096)
        assert it.end() == {0}


def test_two_sessions_at_a_time_are_refused(serve: Serve) -> None:
    """Whoever comes second is told who serves, and the first goes on."""
    with serve() as it:
        other = native.spawn_adopting(it.folder)
        second = native.Native(other, it.folder)
        line = native.first_line(second)
        assert line == f"refused a session serves this mount already (process {it.process.pid})"
        other.wait()
        assert other.stdout is not None
        other.stdout.close()
        assert it.facts()["pid"] == it.process.pid


def test_command_that_kills_its_session_does_not_kill_the_next(serve: Serve) -> None:
    """It may have been obeyed in part, and must not be obeyed twice: EIO, from the one session that died of it."""
    with serve() as it:
        with pytest.raises(OSError, match="Input/output error"):
            it.command("die")
        facts = it.facts()
        assert facts["sessions"] == 1
        it.command("hello")
        assert it.facts()["control"] == ["hello"]


def test_command_is_done_once_though_the_server_dies(serve: Serve) -> None:
    """A session that is at work on a request is not sent it again by the next server; its answer arrives."""
    with serve() as it:
        thread = threading.Thread(target=it.command, args=["block 2"])
        thread.start()
        session = it.pid("session")
        # It sleeps in nanosleep as soon as it has the command.
        stat = pathlib.Path(f"/proc/{session}/syscall")
        wait.until(lambda: stat.read_text().startswith("230 "), "the command is being obeyed")
        it.kill("server")
        it.kill("server")
        thread.join()
        assert it.facts()["control"] == ["block 2"]
        assert it.pid("session") == session


@both_ways
def test_fio_verifies_under_kills(serve: Serve, tmp_path: pathlib.Path) -> None:
    """Another judge: fio's checksums at depth 16 with direct I/O while servers die."""
    with serve() as it:
        job = ["--name=verify", f"--filename={it.disk}", "--size=8M", "--rw=randwrite", "--bs=4k"]
        job += ["--direct=1", "--ioengine=libaio", "--iodepth=16", "--verify=crc32c"]
        job += ["--verify_fatal=1", "--verify_state_save=0", "--loops=6", "--output-format=json"]
        with subprocess.Popen(
            ["fio", *job, f"--output={tmp_path / 'fio.json'}"], cwd=tmp_path, stderr=subprocess.PIPE
        ) as fio:
            kills = 0
            while fio.poll() is None and kills < 20:
                it.kill("server")
                kills += 1
            _, said = fio.communicate()
        assert fio.returncode == 0, said
        assert set(range((8 << 20) // SEGMENT)) <= it.written()


def test_unmounted_while_nobody_serves(serve: Serve) -> None:
    """With the mount goes the keeper, though its session is dead."""
    with serve(restart=False) as it:
        it.die()
        subprocess.run(["umount", "--lazy", it.mountpoint], check=True)
        wait.until(lambda: not it.processes(), "no process is left")


@both_ways
def test_keeper_dies_before_the_next_session_is_there(serve: Serve) -> None:
    """Nobody is left who was there at the start, and no reader or writer sees an error."""
    with serve() as it, load(it) as writers:
        for _ in range(4):
            go_on(writers)
            session, keeper = it.pid("session"), it.pid("keeper")
            os.kill(session, signal.SIGKILL)
            os.kill(keeper, signal.SIGKILL)
            if session == it.process.pid:
                it.process.wait()
            wait.until(lambda old=session: it.pid("session") != old, "the next session is there")
        go_on(writers)


def test_keeper_dies_while_the_session_is_stopped(serve: Serve) -> None:
    """Python may sleep as long as it likes: its keeper is replaced by the standby, several times over."""
    with serve() as it, load(it) as writers:
        session = it.pid("session")
        os.kill(session, signal.SIGSTOP)
        try:
            for _ in range(5):
                go_on(writers)
                it.kill("keeper")
            go_on(writers)
        finally:
            os.kill(session, signal.SIGCONT)
        wait.until(lambda: it.pid("session") == session, "the session has come back")
        assert it.facts()["pid"] == session


@both_ways
def test_all_but_the_session_die_at_once(serve: Serve) -> None:
    """Keeper, standby and server: the session, which has every descriptor, starts the next keeper."""
    with serve() as it, load(it) as writers:
        for _ in range(4):
            go_on(writers)
            keeper = it.pid("keeper")
            session = it.pid("session")
            for pid in it.processes():
                if pid != session:
                    os.kill(pid, signal.SIGKILL)
            wait.until(lambda old=keeper: it.pid("keeper") != old, "the next keeper is there")
        go_on(writers)


@both_ways
def test_everything_dies_at_once(serve: Serve) -> None:
    """Nobody is left who could replace them: the connection ends, and no request hangs."""
    with serve() as it:
        disk = os.open(it.disk, os.O_RDONLY)
        for pid in it.processes():
            os.kill(pid, signal.SIGSTOP)
        for pid in it.processes():
            os.kill(pid, signal.SIGKILL)
        it.process.wait()
        wait.until(lambda: not it.processes(), "no process is left")
        with pytest.raises(OSError, match="not connected|connection abort"):
            os.pread(disk, 4096, 0)
        with contextlib.suppress(OSError):
            os.close(disk)  # tells of the end again
        subprocess.run(["umount", "--lazy", it.mountpoint], check=True)
