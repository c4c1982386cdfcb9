# SPDX-License-Identifier: Apache-2.0
"""A request that is always the death of its server gets EIO and is not sent again for ever; no other one does."""

import errno
import os
import threading
from collections.abc import Callable

import pytest

from tests import wait
from tests.overlayfs.datapath import conftest, native, test_native_deaths, test_native_disk

Serve = conftest.Serve
SEGMENT = native.SEGMENT
PUNCH = test_native_disk.PUNCH_HOLE | test_native_disk.KEEP_SIZE
both_ways = conftest.both_ways
# Where nobody else's request begins: those are at multiples of 512.
POISON = 5 * SEGMENT + 1
OPENDIR, WRITE = 27, 16
# The first and as many more as it takes.
SERVERS = 1 + 3


class Request(threading.Thread):
    """A call in a thread of its own, which a test need not hang with."""

    def __init__(self, call: Callable[..., object], *arguments: object) -> None:
        super().__init__(daemon=True)
        self._call = lambda: call(*arguments)
        self.error: int | None = None
        self.start()

    def run(self) -> None:
        try:
            self._call()
        except OSError as error:
            self.error = error.errno

    def outcome(self) -> int | None:
        """Return the call's errno, None where it did what it was to do."""
        self.join(wait.DEADLINE)
        assert not self.is_alive(), "the request hangs"
        return self.error


def write(disk: int, start: int, length: int) -> None:
    assert os.pwrite(disk, b"x" * length, start) == length


def slow_writes(it: native.Native, disk: int, count: int) -> list[Request]:
    """Begin writes of segments from 10 on that linger (before-write=...); all are in service at the return."""
    writes = [Request(write, disk, (10 + i) * SEGMENT, 4096) for i in range(count)]
    wait.until(lambda: it.facts()["depth"] >= count, "the writes are in service")
    return writes


@both_ways
@pytest.mark.parametrize(
    ("verb", "call", "dirty"),
    [
        ("read", lambda disk: os.pread(disk, 4096, POISON), set()),
        ("write", lambda disk: write(disk, POISON, SEGMENT), {5, 6}),
        ("discard", lambda disk: test_native_disk.fallocate(disk, PUNCH, POISON, 4096), {5}),
    ],
    ids=["read", "write", "discard"],
)
def test_fatal_request_gets_eio(
    serve: Serve, verb: str, call: Callable[[int], object], dirty: set[int]
) -> None:
    """After three servers; what it would have changed is dirty, and everything else goes on."""
    with serve(faults=f"crash={POISON}") as it:
        disk = os.open(it.disk, os.O_RDWR)
        assert Request(call, disk).outcome() == errno.EIO
        facts = it.facts()
        assert facts["servers"] == SERVERS
        # Of those that died none has lived to count it.
        operations, _, errors, _ = facts["guest"][verb]
        assert (operations, errors) == (1, 1)
        write(disk, 20 * SEGMENT, 4096)
        assert os.pread(disk, 4096, 20 * SEGMENT) == b"x" * 4096
        os.fsync(disk)
        os.close(disk)
        assert it.facts()["pid"] == it.process.pid
        assert it.log.count("request answered with EIO") == 1
        assert it.end() == dirty | {20}


def test_dirty_again_after_a_swap(serve: Serve) -> None:
    """The next one that is given up marks like the first, whatever took its marks out meanwhile."""
    with serve(faults=f"crash={POISON}") as it:
        disk = os.open(it.disk, os.O_RDWR)
        for _ in range(2):
            assert Request(write, disk, POISON, 4096).outcome() == errno.EIO
            assert it.written() == {5}
            assert it.ask("swap") == it.ask("commit") == "ok"
            assert it.written() == set()
        os.close(disk)


@both_ways
def test_innocent_requests_beside_it_get_no_error(serve: Serve) -> None:
    """They are in service when the first server dies of it, long enough to be so at every death."""
    with serve(faults=f"crash={POISON},before-write=300000") as it:
        disk = os.open(it.disk, os.O_RDWR)
        innocent = slow_writes(it, disk, 4)
        fatal = [Request(write, disk, POISON, 4096), Request(os.pread, disk, 4096, POISON)]
        assert [request.outcome() for request in fatal] == [errno.EIO, errno.EIO]
        assert [request.outcome() for request in innocent] == [None] * 4
        os.close(disk)
        assert it.end() == {5, 10, 11, 12, 13}


@both_ways
def test_fatal_requests_under_load(serve: Serve) -> None:
    """Writers who check every byte see nothing of servers that die over and over."""
    with serve(faults=f"crash={POISON}") as it, test_native_deaths.load(it) as writers:
        disk = os.open(it.disk, os.O_RDONLY)
        for _ in range(4):
            test_native_deaths.go_on(writers)
            fatal = [Request(os.pread, disk, 4096, POISON) for _ in range(3)]
            assert [request.outcome() for request in fatal] == [errno.EIO] * 3
        test_native_deaths.go_on(writers)
        os.close(disk)


@both_ways
def test_killed_from_outside_is_no_fault_of_the_request(serve: Serve) -> None:
    """In service at more deaths than it takes, and done all the same."""
    with serve(faults="before-write=2000000") as it:
        disk = os.open(it.disk, os.O_RDWR)
        writes = slow_writes(it, disk, 2)
        for _ in range(SERVERS + 2):
            it.kill("server")
            wait.until(lambda: it.facts()["depth"] >= 2, "both are in service again")
        assert [request.outcome() for request in writes] == [None, None]
        os.close(disk)
        assert it.end() == {10, 11}


def test_fatal_command_gets_eio(serve: Serve) -> None:
    """On its way to the session, which never hears of it."""
    with serve(faults=f"crash-send={WRITE}") as it:
        assert Request(it.command, "hello").outcome() == errno.EIO
        facts = it.facts()
        assert facts["servers"] == SERVERS
        assert facts["control"] == []
        assert it.log.count("control request answered with EIO") == 1


@both_ways
def test_fatal_answer_becomes_eio(serve: Serve) -> None:
    """The main thread dies of it, which is no fault of those who are in service meanwhile."""
    with serve(faults=f"crash-answer={OPENDIR},before-write=300000") as it:
        disk = os.open(it.disk, os.O_RDWR)
        innocent = slow_writes(it, disk, 4)
        assert Request(os.listdir, it.mountpoint).outcome() == errno.EIO
        assert it.facts()["servers"] == SERVERS
        assert [request.outcome() for request in innocent] == [None] * 4
        os.close(disk)
        assert it.end() == {10, 11, 12, 13}
