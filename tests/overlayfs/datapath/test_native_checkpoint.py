# SPDX-License-Identifier: Apache-2.0
"""drain and swap: what a checkpoint is made of. No write may fall between two maps."""

import os
import pathlib
import threading

import pytest

from tests import builds, wait
from tests.overlayfs.datapath import conftest, native

Serve = conftest.Serve
SEGMENT = native.SEGMENT
both_ways = conftest.both_ways
# Whole pages, which may go around the page cache.
NEW = b"new!" * 1024


def taken(it: native.Native) -> set[int]:
    return native.spread(it.facts()["taken"])


@both_ways
@builds.sanitized
def test_swap_moves_all_bits_once(mount: native.Native) -> None:
    """What was written before is taken, what is written after is not; commit forgets, back gives back."""
    descriptor = os.open(mount.disk, os.O_RDWR)
    os.pwrite(descriptor, b"1" * 4096, 0)
    os.pwrite(descriptor, b"1" * 4096, 5 * SEGMENT)
    assert mount.ask("swap") == "ok"
    os.pwrite(descriptor, b"2" * 4096, 5 * SEGMENT)
    os.pwrite(descriptor, b"2" * 4096, 9 * SEGMENT)
    assert (taken(mount), mount.written()) == ({0, 5}, {5, 9})
    assert mount.ask("back") == "ok"
    assert (taken(mount), mount.written()) == (set(), {0, 5, 9})
    assert mount.ask("swap") == "ok"
    assert mount.ask("commit") == "ok"
    assert (taken(mount), mount.written()) == (set(), set())
    os.close(descriptor)


def test_swap_not_committed_is_given_back_when_the_session_dies(serve: Serve) -> None:
    """Whoever took the bits is dead, and what it wanted with them was not done: they count as written."""
    with serve() as it:
        with open(it.disk, "r+b", buffering=0) as disk:
            disk.write(b"x" * 100_000)
        assert it.ask("swap") == "ok"
        it.kill("server")
        it.kill("keeper")
        assert (taken(it), it.written()) == ({0, 1}, set())
        it.kill("session")
        assert (taken(it), it.written()) == (set(), {0, 1})


@both_ways
@pytest.mark.parametrize("idle", [True, False], ids=["idle", "busy"])
def test_drain_waits_for_the_writes_in_flight_only(serve: Serve, idle: bool) -> None:
    """It returns at once when there are none, and otherwise with the slowest of them."""
    with serve(faults="before-write=1500000") as it:
        if idle:
            assert it.ask("drain") == "ok"
            return
        descriptor = os.open(it.disk, os.O_RDWR)
        writer = threading.Thread(target=os.pwrite, args=[descriptor, NEW, 0])
        writer.start()
        wait.until(lambda: it.written() == {0}, "the write is marked")
        assert it.live.read_bytes()[:3] != b"new"
        assert it.ask("drain") == "ok"
        assert it.live.read_bytes()[:3] == b"new"
        writer.join()
        os.close(descriptor)


@both_ways
def test_drain_ends_when_the_server_dies(serve: Serve) -> None:
    """Its writes are in flight no more; they come again, and are marked again, with the next one."""
    with serve(faults="before-write=2000000") as it:
        descriptor = os.open(it.disk, os.O_RDWR)
        writer = threading.Thread(target=os.pwrite, args=[descriptor, NEW, 0])
        writer.start()
        wait.until(lambda: it.written() == {0}, "the write is marked")
        assert it.ask("swap") == "ok"
        drained: list[str] = []
        waiting = threading.Thread(target=lambda: drained.append(it.ask("drain")))
        waiting.start()
        it.kill("server")
        waiting.join()
        writer.join()
        assert drained == ["ok"]
        assert it.written() == {0}
        os.close(descriptor)


def lost_segments(it: native.Native, rounds: int) -> int:
    """Write segments in turn while their bits are swapped out and the disk is read right after: return how many
    writes are neither in what was read nor in a map that comes after."""
    disk = os.open(it.disk, os.O_RDWR)
    count = 32
    ended = threading.Event()

    def write() -> None:
        number = 0
        while not ended.is_set():
            number += 1
            os.pwrite(disk, number.to_bytes(8, "little") * 512, number % count * SEGMENT)

    writer = threading.Thread(target=write)
    writer.start()
    live = os.open(it.live, os.O_RDONLY)
    # What a chain of incremental backups would hold: at each round the taken segments are copied.
    backup = [os.pread(live, 8, i * SEGMENT) for i in range(count)]
    try:
        for _ in range(rounds):
            assert it.ask("swap") == "ok"
            assert it.ask("drain") == "ok"
            for i in taken(it):
                backup[i] = os.pread(live, 8, i * SEGMENT)
            assert it.ask("commit") == "ok"
    finally:
        ended.set()
        writer.join()
    dirty = it.written()
    lost = sum(backup[i] != os.pread(live, 8, i * SEGMENT) and i not in dirty for i in range(count))
    os.close(disk)
    os.close(live)
    return lost


@both_ways
@builds.sanitized
def test_no_segment_is_lost_between_two_checkpoints(serve: Serve) -> None:
    """Swap, drain, read: whatever is written meanwhile is read, or is in the next map."""
    with serve(faults="before-write=3000", threads=2) as it:
        assert lost_segments(it, 60) == 0


@both_ways
def test_marking_after_the_write_alone_would_do_too(serve: Serve) -> None:
    """The second mark, without the drain, loses nothing either: two nets, each holds."""
    with serve(faults="before-write=3000,no-drain", threads=2) as it:
        assert lost_segments(it, 60) == 0


@both_ways
def test_the_drain_is_needed_where_only_the_first_mark_is_made(serve: Serve) -> None:
    """With it nothing is lost."""
    with serve(faults="before-write=3000,no-mark-after", threads=2) as it:
        assert lost_segments(it, 60) == 0


@both_ways
def test_without_the_drain_segments_are_lost(serve: Serve, tmp_path: pathlib.Path) -> None:
    """So the checks above can fail: the same rounds with both nets cut away."""
    with serve(faults="before-write=3000,no-mark-after,no-drain", threads=2) as it:
        wait.until(lambda: lost_segments(it, 60) > 0, "a segment is lost")
