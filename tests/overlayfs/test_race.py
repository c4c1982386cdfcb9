# SPDX-License-Identifier: Apache-2.0
"""The race: whoever writes however through the mount, no changed segment is without its bit.

A scan is played by the plainest one there is: it reads live and reference from first segment to last,
while the writers write before, in and behind its cursor. What it found different or what is written must
be all that differs, judged by oracle.differing, which knows none of our code.

That this can fail is shown where a write stands still between its two halves: with the marking behind
the write, and with the bitmap emptied after the scan has begun.
"""

import itertools
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest

from tests import oracle, wait
from tests.overlayfs import conftest, mounted
from tests.overlayfs.conftest import gated, python_only

Serve = Callable[..., AbstractContextManager[mounted.Mounted]]
WRITER = pathlib.Path(__file__).with_name("writer.py")
SEGMENT = 65536


@contextmanager
def loop_device(disk: pathlib.Path) -> Iterator[str]:
    """Lay a block device on the mounted disk: its page cache, and mappings of it, are above ours."""
    attach = ["losetup", "--find", "--show", "--direct-io=on", str(disk)]
    loop = subprocess.run(attach, check=True, capture_output=True, text=True).stdout.strip()
    try:
        yield loop
    finally:
        subprocess.run(["losetup", "--detach", loop], check=True)
        associated = ["losetup", "--noheadings", "--associated", str(disk)]
        wait.until(
            lambda: not subprocess.run(associated, check=True, capture_output=True).stdout,
            "the loop device lets go of the disk",
        )


def write(kind: str, path: pathlib.Path | str, seed: int, count: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-S", WRITER, kind, path, str(seed), str(count)])


def scan(mount: mounted.Mounted, reference: pathlib.Path) -> set[int]:
    """Return the segments found different, read one after the other while writers are at work."""
    return oracle.differing(mount.live, reference, mount.granularity)


@pytest.mark.parametrize(
    ("granularity", "datapath"),
    [
        *itertools.product([512, 65536, 2 << 20], ["python", "native", "direct"]),
        (65536, "forward"),
    ],
    indirect=["datapath"],
)
def test_thousands_of_writes_of_several_processes(
    serve: Serve, tmp_path: pathlib.Path, granularity: int
) -> None:
    """pwrite, O_DIRECT and a mapping of a loop device on top, and scans all the while."""
    race(serve, tmp_path, granularity)


@pytest.mark.parametrize("datapath", ["native", "direct", "forward"], indirect=True)
@pytest.mark.parametrize("variant", ["thread", "address"])
def test_the_race_under_sanitizers(serve: Serve, tmp_path: pathlib.Path) -> None:
    """The same, and the server's threads race with nobody but the guest."""
    race(serve, tmp_path, SEGMENT)


def race(serve: Serve, tmp_path: pathlib.Path, granularity: int) -> None:
    """Let several kinds of writers and scans loose on a mount, and judge every scan's map."""
    reference = tmp_path / "reference"
    with serve(granularity=granularity) as mount:
        shutil.copyfile(mount.live, reference)
        with loop_device(mount.disk) as loop:
            writers = [
                write("buffered", mount.disk, 1, 500),
                write("buffered", mount.disk, 2, 500),
                write("direct", mount.disk, 3, 500),
                write("mapped", loop, 4, 500),
            ]
            try:
                found = []
                while not found or any(writer.poll() is None for writer in writers):
                    found.append(scan(mount, reference))
                assert [writer.wait() for writer in writers] == [0] * 4
            finally:
                for writer in writers:
                    writer.kill()
                    writer.wait()
        differing = oracle.differing(mount.live, reference, granularity)
        assert len(differing) > (conftest.SIZE // granularity) // 4
        written = mount.written()
        assert differing <= written
        # Whenever a scan had been made: what it found and what is written is all that differs.
        assert all(differing <= one | written for one in found)


@gated
def test_bits_stand_before_bytes_change(serve: Serve, tmp_path: pathlib.Path) -> None:
    """A write that has not changed a byte yet has its bits; so it has while its answer is held back."""
    reference = tmp_path / "reference"
    with serve() as mount:
        shutil.copyfile(mount.live, reference)
        mount.ask("close_gate", "before")
        mount.ask("close_gate", "after")
        with subprocess.Popen(_write_segments(mount, 3, 2)) as writer:
            try:
                mount.wait_until_waiting("before")
                assert mount.written() == {3, 4}
                assert oracle.differing(mount.live, reference, SEGMENT) == set()
                mount.ask("open_gate", "before")
                mount.wait_until_waiting("after")
                assert oracle.differing(mount.live, reference, SEGMENT) == {3, 4}
                assert mount.written() == {3, 4}
            finally:
                mount.ask("open_gate", "before")
                mount.ask("open_gate", "after")
            assert writer.wait(wait.DEADLINE) == 0


# The mistake is made in Python's disk, or in the native program: the one in front of a session marks nothing.
@pytest.mark.parametrize("datapath", ["python", "stacked"], indirect=True)
def test_marking_after_the_write_misses_segments(serve: Serve, tmp_path: pathlib.Path) -> None:
    """The check can fail: with the mark behind the write, a map taken between the two is too clean."""
    reference = tmp_path / "reference"
    with serve(mark_late=True) as mount:
        shutil.copyfile(mount.live, reference)
        # The scan reads the segments before they change and decides that they are the same.
        found = scan(mount, reference)
        mount.ask("close_gate", "after")
        with subprocess.Popen(_write_segments(mount, 3, 2)) as writer:
            try:
                mount.wait_until_waiting("after")
                missed = oracle.differing(mount.live, reference, SEGMENT) - mount.written() - found
            finally:
                mount.ask("open_gate", "after")
            assert writer.wait(wait.DEADLINE) == 0
        assert missed == {3, 4}


@gated
def test_a_bitmap_armed_after_the_first_read_misses_segments(
    serve: Serve, tmp_path: pathlib.Path
) -> None:
    """The check can fail: what is written between the scan's read and the bitmap's begin is lost."""
    reference = tmp_path / "reference"
    with serve() as mount:
        shutil.copyfile(mount.live, reference)
        found = scan(mount, reference)
        subprocess.run(_write_segments(mount, 3, 2), check=True)
        mount.ask("swap")
        subprocess.run(_write_segments(mount, 9, 1), check=True)
        differing = oracle.differing(mount.live, reference, SEGMENT)
        assert differing - mount.written() - found == {3, 4}


@gated
def test_a_checkpoint_waits_for_the_writes_in_flight(serve: Serve, tmp_path: pathlib.Path) -> None:
    """After swap and drain, what the swap took is on the disk, and what comes later has a bit."""
    checkpoint = tmp_path / "checkpoint"
    with serve() as mount:
        mount.ask("close_gate", "before")
        with subprocess.Popen(_write_segments(mount, 3, 2)) as writer:
            try:
                mount.wait_until_waiting("before")
                assert mount.ask("swap") == [3, 4]
                mount.ask("drain")
                assert not mount.facts()["drained"]
            finally:
                mount.ask("open_gate", "before")
            assert writer.wait(wait.DEADLINE) == 0
        wait.until(lambda: mount.facts()["drained"], "drained")
        shutil.copyfile(mount.live, checkpoint)
        subprocess.run(_write_segments(mount, 20, 1), check=True)
        assert oracle.differing(mount.live, checkpoint, SEGMENT) == {20}
        # The native data path marks once more behind a write: too much rather than too little.
        assert {20} <= mount.written() <= {3, 4, 20}


@pytest.mark.parametrize("datapath", ["native"], indirect=True)
def test_what_a_checkpoint_has_taken_is_kept_until_it_is_committed(serve: Serve) -> None:
    """A session that dies before finds it written again; the next swap takes what came since, and nothing twice."""
    with serve() as mount:
        subprocess.run(_write_segments(mount, 3, 1), check=True)
        assert mount.ask("swap") == mount.ask("taken") == [3]
        assert mount.written() == set()
        mount.ask("drain")
        wait.until(lambda: mount.facts()["drained"], "drained")
        subprocess.run(_write_segments(mount, 5, 1), check=True)
        mount.ask("commit")
        assert mount.ask("taken") == []
        assert mount.ask("swap") == mount.ask("taken") == [5]


@python_only
def test_without_drain_a_checkpoint_loses_segments(serve: Serve, tmp_path: pathlib.Path) -> None:
    """The check can fail: read after the swap alone, the write in flight lands later, without a bit."""
    checkpoint = tmp_path / "checkpoint"
    with serve() as mount:
        mount.ask("close_gate", "before")
        with subprocess.Popen(_write_segments(mount, 3, 2)) as writer:
            try:
                mount.wait_until_waiting("before")
                mount.ask("swap")
                shutil.copyfile(mount.live, checkpoint)
            finally:
                mount.ask("open_gate", "before")
            assert writer.wait(wait.DEADLINE) == 0
        lost = oracle.differing(mount.live, checkpoint, SEGMENT) - mount.written()
        assert lost == {3, 4}


def _write_segments(mount: mounted.Mounted, first: int, count: int) -> list[str]:
    """Return the command that writes zeros over whole segments in one request."""
    command = ["dd", "if=/dev/zero", f"of={mount.disk}", f"bs={count * SEGMENT}", "count=1"]
    command += [f"seek={first * SEGMENT}", "oflag=direct,seek_bytes", "conv=notrunc"]
    return [*command, "status=none"]
