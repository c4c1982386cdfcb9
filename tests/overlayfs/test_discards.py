# SPDX-License-Identifier: Apache-2.0
"""fallocate(2) of a disk that the session serves behind the native program: zeros, marks, errors, deaths."""

import ctypes
import errno
import os
import pathlib
import random
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest

from tests import oracle, wait
from tests.overlayfs import conftest, mounted

Serve = Callable[..., AbstractContextManager[mounted.Mounted]]
KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 1, 2, 16
SIZE, PAGE, SEGMENT = conftest.SIZE, 4096, 65536


@pytest.fixture
def datapath() -> str:
    return "forward"


@contextmanager
def opened(path: pathlib.Path, flags: int = os.O_RDWR) -> Iterator[int]:
    descriptor = os.open(path, flags)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def fallocate(descriptor: int, mode: int, start: int, length: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    if libc.fallocate(descriptor, mode, start, length):
        raise OSError(ctypes.get_errno(), "fallocate")


def refused(call: Callable[..., object], *arguments: object) -> int | None:
    with pytest.raises(OSError) as error:
        call(*arguments)
    return error.value.errno


def test_punch_hole_and_zero_range_are_what_the_image_is_asked_for(mount: mounted.Mounted) -> None:
    """Each is its own verb, marks every segment that it touches in part, and is counted as a discard."""
    with opened(mount.disk) as disk:
        fallocate(disk, PUNCH_HOLE | KEEP_SIZE, SEGMENT - 1, SEGMENT + 2)
        fallocate(disk, ZERO_RANGE | KEEP_SIZE, 10 * SEGMENT, SEGMENT)
        fallocate(disk, ZERO_RANGE, 20 * SEGMENT + 5, 6)
    facts = mount.facts()
    assert facts["zeroed"] == [
        ["discard", SEGMENT - 1, SEGMENT + 2],
        ["zero", 10 * SEGMENT, SEGMENT],
        ["zero", 20 * SEGMENT + 5, 6],
    ]
    assert facts["guest"]["discard"] == [3, 2 * SEGMENT + 8, 0, 3]
    assert facts["guest"]["write"][0] == 0
    assert mount.written() == {0, 1, 2, 10, 20}


@pytest.mark.parametrize("extra", [0, os.O_DIRECT], ids=["buffered", "direct"])
def test_random_operations_equal_a_model(mount: mounted.Mounted, extra: int) -> None:
    """What the page cache of the mount holds is zeros, too, after a hole was made."""
    numbers = random.Random(11)
    model = oracle.ModelDisk.of(mount.live, SEGMENT)
    with opened(mount.disk, os.O_RDWR | extra) as disk:
        for _ in range(300):
            length = numbers.choice([1, 512, PAGE, SEGMENT, numbers.randrange(1, 400_000)])
            start = numbers.randrange(SIZE - length)
            if extra:
                start, length = start // PAGE * PAGE, max(length // PAGE * PAGE, PAGE)
            kind = numbers.random()
            if kind < 0.3:
                data = numbers.randbytes(length)
                model.write(start, data)
                assert os.pwritev(disk, [conftest.aligned(data)], start) == length
            elif kind < 0.6:
                mode = numbers.choice([PUNCH_HOLE, ZERO_RANGE]) | KEEP_SIZE
                model.write(start, bytes(length))
                fallocate(disk, mode, start, length)
            else:
                buffer = conftest.aligned(bytes(length))
                assert os.preadv(disk, [buffer], start) == length
                assert buffer[:] == model.read(start, length)
    assert mount.live.read_bytes() == model.content
    assert mount.written() == model.written


@pytest.mark.parametrize(
    ("mode", "start", "length", "number"),
    [
        pytest.param(PUNCH_HOLE | KEEP_SIZE, SIZE, PAGE, errno.EINVAL, id="beyond-the-end"),
        pytest.param(ZERO_RANGE, SIZE - 10, PAGE, errno.EFBIG, id="zeroing-that-would-grow"),
        pytest.param(0, 0, PAGE, errno.EOPNOTSUPP, id="allocation"),
        pytest.param(8, 0, PAGE, errno.EOPNOTSUPP, id="collapse"),
    ],
)
def test_refused_changes_of_allocation(
    mount: mounted.Mounted, mode: int, start: int, length: int, number: int
) -> None:
    """As where the native program serves the disk; and what is asked for next is done."""
    with opened(mount.disk) as disk:
        assert refused(fallocate, disk, mode, start, length) == number
        assert mount.written() == set()
        fallocate(disk, PUNCH_HOLE | KEEP_SIZE, 0, 1)
    assert mount.written() == {0}


def test_a_hole_across_the_end_ends_there(mount: mounted.Mounted) -> None:
    """The last partial segment can be discarded in whole."""
    last = SIZE // SEGMENT * SEGMENT
    with opened(mount.disk) as disk:
        fallocate(disk, PUNCH_HOLE | KEEP_SIZE, last, SEGMENT)
        assert os.pread(disk, SEGMENT, last) == bytes(SIZE - last)
    assert mount.facts()["zeroed"] == [["discard", last, SIZE - last]]
    assert mount.written() == {SIZE // SEGMENT}


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC], ids=os.strerror)
def test_a_failed_discard_leaves_its_bits_set(mount: mounted.Mounted, number: int) -> None:
    """Any part of it may have been done."""
    mount.ask("break", "discard", SEGMENT, number)
    with opened(mount.disk) as disk:
        assert refused(fallocate, disk, PUNCH_HOLE | KEEP_SIZE, 0, 3 * SEGMENT) == number
        mount.ask("mend")
        fallocate(disk, PUNCH_HOLE | KEEP_SIZE, 9 * SEGMENT, 1)
    assert mount.written() == {0, 1, 2, 9}
    assert mount.facts()["guest"]["discard"] == [2, 1, 1, 2]


def test_a_discard_that_takes_long_holds_up_no_read(serve: Serve) -> None:
    """It is marked and in flight, a checkpoint waits for it, and another opener reads and asks for the status."""
    with serve(threads=1) as mount, opened(mount.disk) as disk:
        mount.ask("close_gate", "before")
        arguments = (disk, PUNCH_HOLE | KEEP_SIZE, 0, SEGMENT)
        thread = threading.Thread(target=fallocate, args=arguments)
        thread.start()
        try:
            mount.wait_until_waiting("before")
            assert mount.written() == {0}
            mount.ask("drain")
            read = ["dd", f"if={mount.disk}", "of=/dev/null", "bs=4K", "count=1", "skip=99"]
            subprocess.run([*read, "iflag=direct", "status=none"], check=True)
            assert not mount.facts()["drained"]
        finally:
            mount.ask("open_gate", "before")
            thread.join()
        wait.until(lambda: mount.facts()["drained"], "drained")


def test_other_files_and_a_clients_own_attributes(mount: mounted.Mounted) -> None:
    """Neither changes the disk, nor makes the kernel believe that there are no discards."""
    value = b"\x03" + bytes(15) + b"\x01" + bytes(7)
    for name in ("posthoc.fallocate", "user.any"):
        assert refused(os.setxattr, mount.disk, name, value) == errno.EOPNOTSUPP
    with opened(mount.mountpoint / "control", os.O_WRONLY) as control:
        assert refused(fallocate, control, PUNCH_HOLE | KEEP_SIZE, 0, 1) == errno.EOPNOTSUPP
    assert mount.facts()["zeroed"] == []
    assert mount.written() == set()
    with opened(mount.disk) as disk:
        fallocate(disk, PUNCH_HOLE | KEEP_SIZE, SEGMENT, 1)
    assert mount.written() == {1}


def test_without_the_program_an_attribute_is_none(
    tmp_path: pathlib.Path, live: pathlib.Path, mountpoint: pathlib.Path
) -> None:
    """Plain python has no discards: not by fallocate, and not under its other name."""
    with mounted.serving(tmp_path, live, mountpoint, datapath="python") as mount:
        value = b"\x03" + bytes(15) + b"\x01" + bytes(7)
        assert refused(os.setxattr, mount.disk, "posthoc.fallocate", value) == errno.EOPNOTSUPP
        with opened(mount.disk) as disk:
            number = refused(fallocate, disk, PUNCH_HOLE | KEEP_SIZE, 0, 1)
            assert number == errno.EOPNOTSUPP
        assert mount.written() == set()


def test_read_only(serve: Serve) -> None:
    """There is nobody who could ask, to root too."""
    with serve(read_only=True) as mount:
        assert refused(os.open, mount.disk, os.O_RDWR) == errno.EROFS
        with opened(mount.disk, os.O_RDONLY) as disk:
            assert refused(fallocate, disk, PUNCH_HOLE | KEEP_SIZE, 0, 1) == errno.EBADF
        assert mount.disk.read_bytes() == mount.live.read_bytes()
        assert mount.facts()["description"] == "python, 4 threads, behind the native server"


def test_requests_fit_the_smallest_socket(serve: Serve) -> None:
    """Where the kernel gives a socket but a page or two, requests are small, and none is lost or cut."""
    with serve(socket_buffer=4096) as mount:
        content = mount.live.read_bytes()
        for flags in (0, os.O_DIRECT):
            with opened(mount.disk, os.O_RDWR | flags) as disk:
                buffer = conftest.aligned(bytes(1 << 20))
                assert os.preadv(disk, [buffer], 0) == 1 << 20
                assert buffer[:] == content[: 1 << 20]
                data = random.Random(flags).randbytes(1 << 20)
                assert os.pwritev(disk, [conftest.aligned(data)], 2 << 20) == 1 << 20
                fallocate(disk, PUNCH_HOLE | KEEP_SIZE, 1 << 20, 1 << 20)
            assert mount.live.read_bytes()[1 << 20 : 3 << 20] == bytes(1 << 20) + data
            assert mount.disk.read_bytes() == mount.live.read_bytes()


@pytest.mark.parametrize("role", ["server", "keeper"])
def test_killed_during_discards_and_writes(mount: mounted.Mounted, role: str) -> None:
    """What the session has not got is sent again: no error, nothing lost."""
    model = oracle.ModelDisk.of(mount.live, SEGMENT)
    ended, rounds, failures = threading.Event(), [0], list[str]()

    def work() -> None:
        numbers = random.Random(3)
        with opened(mount.disk, os.O_RDWR | os.O_DIRECT) as disk:
            while not ended.is_set():
                start, length = numbers.randrange(1800) * PAGE, numbers.randrange(1, 33) * PAGE
                try:
                    if numbers.random() < 0.5:
                        model.write(start, bytes(length))
                        fallocate(disk, PUNCH_HOLE | KEEP_SIZE, start, length)
                    else:
                        data = numbers.randbytes(length)
                        model.write(start, data)
                        assert os.pwritev(disk, [conftest.aligned(data)], start) == length
                except OSError as error:
                    failures.append(repr(error))
                    return
                rounds[0] += 1

    worker = threading.Thread(target=work)
    worker.start()
    try:
        for _ in range(8):
            before, servers = rounds[0], mount.ask("servers")
            wait.until(lambda n=before: rounds[0] > n + 5 or failures, "the guest goes on")
            mount.ask("kill", role)
            wait.until(lambda n=servers: mount.ask("servers") > n, "the next server is there")
        before = rounds[0]
        wait.until(lambda: rounds[0] > before + 5 or failures, "the guest goes on")
    finally:
        ended.set()
        worker.join()
    assert failures == []
    assert mount.live.read_bytes() == model.content
    assert mount.written() == model.written


@pytest.mark.parametrize("place", ["before-send", "after-send"])
def test_killed_in_the_act_of_passing_on(serve: Serve, faulty: pathlib.Path, place: str) -> None:
    """Nobody knows then whether the session has it: it is done, and not done again after its answer."""
    environment = {"POSTHOC_DATAPATH": str(faulty), "POSTHOC_FAULTS": f"{place}=30000"}
    with serve(environment=environment) as mount:
        before = mount.facts()["guest"]["discard"][0]
        with opened(mount.disk) as disk:
            for number in range(10):
                arguments = (disk, PUNCH_HOLE | KEEP_SIZE, number * SEGMENT, SEGMENT)
                thread = threading.Thread(target=fallocate, args=arguments)
                servers = mount.ask("servers")
                thread.start()
                if place == "after-send":
                    wait.until(lambda n=number: n in mount.written(), "the session has it")
                mount.ask("kill", "server")
                thread.join(wait.DEADLINE)
                assert not thread.is_alive()
                wait.until(lambda n=servers: mount.ask("servers") > n, "the next server is there")
        assert mount.written() == set(range(10))
        assert mount.live.read_bytes()[: 10 * SEGMENT] == bytes(10 * SEGMENT)
        assert mount.facts()["guest"]["discard"][0] == before + 10


@pytest.mark.parametrize("way", ["send", "answer"])
def test_a_write_that_no_server_survives_gets_eio(
    serve: Serve, faulty: pathlib.Path, way: str
) -> None:
    """On its way to the session or of its answer on the way back; whatever it may have changed is marked."""
    write = 16
    environment = {"POSTHOC_DATAPATH": str(faulty), "POSTHOC_FAULTS": f"crash-{way}={write}"}
    with serve(environment=environment) as mount, opened(mount.disk) as disk:
        before = mount.live.read_bytes()
        outcome: list[int | None] = []
        call = (os.pwrite, disk, b"x" * PAGE, 5 * SEGMENT)
        thread = threading.Thread(target=lambda: outcome.append(refused(*call)), daemon=True)
        servers = mount.ask("servers")
        thread.start()
        thread.join(wait.DEADLINE)
        assert outcome == [errno.EIO]
        assert mount.ask("servers") == servers + 3
        changed = mount.live.read_bytes() != before
        assert mount.written() == ({5} if changed else set())
        assert changed == (way == "answer")
        fallocate(disk, PUNCH_HOLE | KEEP_SIZE, 0, SEGMENT)
        assert os.pread(disk, SEGMENT, 0) == bytes(SEGMENT)


@pytest.mark.parametrize("with_keeper", [False, True], ids=["alone", "with-the-keeper"])
def test_a_session_that_is_killed_takes_the_mount_along(serve: Serve, with_keeper: bool) -> None:
    """The write bitmap dies with it: whoever is at work gets an error, and nothing stays mounted."""
    with serve() as mount:
        disk = os.open(mount.disk, os.O_RDWR | os.O_DIRECT)
        try:
            mount.ask("close_gate", "before")
            outcome: list[int | None] = []
            arguments = (fallocate, disk, PUNCH_HOLE | KEEP_SIZE, 0, SEGMENT)
            thread = threading.Thread(target=lambda: outcome.append(refused(*arguments)))
            thread.start()
            mount.wait_until_waiting("before")
            if with_keeper:
                mount.ask("kill", "keeper")
            mount.process.kill()
            thread.join(wait.DEADLINE)
            assert outcome[0] in (errno.ENOTCONN, errno.ECONNABORTED)
            assert refused(os.pread, disk, PAGE, 0) in (errno.ENOTCONN, errno.ECONNABORTED)
            wait.until(lambda: not mount.is_mounted(), "nothing is mounted")
            mount.end()
        finally:
            conftest.hang_up(disk)
