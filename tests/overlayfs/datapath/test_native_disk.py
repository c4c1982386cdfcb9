# SPDX-License-Identifier: Apache-2.0
"""The disk's verbs, as the native data path serves them."""

import contextlib
import ctypes
import errno
import mmap
import os
import pathlib
import random
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator

import pytest

from tests import builds, oracle, qemu, wait
from tests.overlayfs.datapath import conftest, native

Serve = conftest.Serve
PAGE = 4096
KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 1, 2, 16
SIZE = conftest.SIZE


@contextlib.contextmanager
def opened(path: pathlib.Path, flags: int = os.O_RDWR) -> Iterator[int]:
    descriptor = os.open(path, flags)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def aligned(data: bytes) -> mmap.mmap:
    buffer = mmap.mmap(-1, max(len(data), 1))
    buffer[: len(data)] = data
    return buffer


def fallocate(descriptor: int, mode: int, start: int, length: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    if libc.fallocate(descriptor, mode, start, length):
        raise OSError(ctypes.get_errno(), "fallocate")


def refused(call: Callable[..., object], *arguments: object) -> int | None:
    with pytest.raises(OSError) as error:
        call(*arguments)
    return error.value.errno


@builds.sanitized
@pytest.mark.parametrize("cache", ["writeback", "none"])
@pytest.mark.parametrize("extra", [0, os.O_DIRECT], ids=["buffered", "direct"])
def test_random_operations_equal_a_model(
    serve: Serve, workdir: pathlib.Path, extra: int, cache: str
) -> None:
    """Reads, writes, holes and zeroes at any offset: the model's bytes, and exactly its segments."""
    numbers = random.Random(11)
    with serve(cache=cache) as it:
        model = oracle.ModelDisk.of(it.live, native.SEGMENT)
        with opened(it.disk, os.O_RDWR | extra) as disk:
            for _ in range(500):
                length = numbers.choice([1, 512, 4096, 65536, numbers.randrange(1, 400_000)])
                start = numbers.randrange(SIZE - length)
                if extra:
                    start, length = start // PAGE * PAGE, max(length // PAGE * PAGE, PAGE)
                kind = numbers.random()
                if kind < 0.4:
                    data = numbers.randbytes(length)
                    model.write(start, data)
                    assert os.pwritev(disk, [aligned(data)], start) == length
                elif kind < 0.6:
                    model.write(start, bytes(length))
                    fallocate(
                        disk, numbers.choice([PUNCH_HOLE, ZERO_RANGE]) | KEEP_SIZE, start, length
                    )
                else:
                    buffer = aligned(bytes(length))
                    assert os.preadv(disk, [buffer], start) == length
                    assert buffer[:] == model.read(start, length)
        assert it.end() == model.written
    assert it.live.read_bytes() == model.content


def test_a_block_device_has_all_verbs(serve: Serve, workdir: pathlib.Path) -> None:
    """In its sectors; it knows no holes, hence is all data, as a file without holes."""
    numbers = random.Random(12)
    size = SIZE // PAGE * PAGE
    image = conftest.fill(workdir, size)
    with qemu.loop_device(image) as device:
        with serve(live=str(device)) as it:
            model = oracle.ModelDisk.of(image, native.SEGMENT)
            with opened(it.disk) as disk:
                for _ in range(100):
                    length = numbers.choice([512, 4096, 65536, 512 * numbers.randrange(1, 800)])
                    start = numbers.randrange((size - length) // 512) * 512
                    data = numbers.choice([bytes(length), numbers.randbytes(length)])
                    model.write(start, data)
                    if any(data):
                        assert os.pwrite(disk, data, start) == length
                    else:
                        mode = numbers.choice([PUNCH_HOLE, ZERO_RANGE])
                        fallocate(disk, mode | KEEP_SIZE, start, length)
                    assert os.pread(disk, length, start) == data
                assert os.lseek(disk, 0, os.SEEK_HOLE) == size
                assert os.lseek(disk, PAGE, os.SEEK_DATA) == PAGE
                assert refused(os.lseek, disk, size, os.SEEK_DATA) == errno.ENXIO
                assert refused(fallocate, disk, PUNCH_HOLE | KEEP_SIZE, 1, 100) == errno.EINVAL
                model.written.add(0)
                os.fsync(disk)
            assert it.end() == model.written
    assert image.read_bytes() == model.content


def test_reads_at_the_end_are_short_and_beyond_are_empty(mount: native.Native) -> None:
    """The size is the image's to the byte."""
    with opened(mount.disk, os.O_RDONLY) as disk:
        assert os.pread(disk, PAGE, SIZE - 10) == mount.live.read_bytes()[-10:]
        assert os.pread(disk, PAGE, SIZE) == b""
        assert os.pread(disk, PAGE, 1 << 50) == b""


@builds.sanitized
def test_writes_at_the_end_are_cut_and_beyond_are_refused(mount: native.Native) -> None:
    """As on a block device; the image does not grow, and only what could change is marked."""
    with opened(mount.disk) as disk:
        assert os.pwrite(disk, b"x" * 100, SIZE - 40) == 40
        assert refused(os.pwrite, disk, b"x", SIZE) == errno.ENOSPC
        assert refused(os.pwrite, disk, b"x", 1 << 50) == errno.ENOSPC
    assert mount.live.stat().st_size == SIZE
    assert mount.written() == {SIZE // native.SEGMENT}


@pytest.mark.parametrize("mode", [PUNCH_HOLE, ZERO_RANGE], ids=["punch", "zero"])
def test_holes_are_made_seen_and_marked(mount: native.Native, mode: int) -> None:
    """Every segment a hole touches is marked, the image's space is freed, SEEK_HOLE tells it."""
    with opened(mount.disk) as disk:
        fallocate(disk, mode | KEEP_SIZE, 1 << 20, 4 << 20)
        assert os.pread(disk, 4 << 20, 1 << 20) == bytes(4 << 20)
        if mode == PUNCH_HOLE:
            assert os.lseek(disk, 0, os.SEEK_HOLE) == 1 << 20
            assert os.lseek(disk, 1 << 20, os.SEEK_DATA) == 5 << 20
            assert mount.live.stat().st_blocks * 512 < SIZE - (3 << 20)
        assert refused(os.lseek, disk, SIZE, os.SEEK_DATA) == errno.ENXIO
        assert os.lseek(disk, SIZE - 1, os.SEEK_HOLE) == SIZE
    assert mount.written() == set(range(16, 80))


@pytest.mark.parametrize(
    ("mode", "start", "length", "number"),
    [
        pytest.param(PUNCH_HOLE | KEEP_SIZE, SIZE, 4096, errno.EINVAL, id="beyond-the-end"),
        pytest.param(ZERO_RANGE, SIZE - 10, 4096, errno.EFBIG, id="zeroing-that-would-grow"),
        pytest.param(0, 0, 4096, errno.EOPNOTSUPP, id="allocation"),
        pytest.param(8, 0, 4096, errno.EOPNOTSUPP, id="collapse"),
    ],
)
def test_refused_allocation_changes(
    mount: native.Native, mode: int, start: int, length: int, number: int
) -> None:
    """What would change the size, or is no block device's verb."""
    with opened(mount.disk) as disk:
        assert refused(fallocate, disk, mode, start, length) == number
    assert mount.written() == set()
    assert mount.live.stat().st_size == SIZE


def test_hole_across_the_end_ends_there(mount: native.Native) -> None:
    """The last partial segment can be discarded in whole."""
    last = SIZE // native.SEGMENT * native.SEGMENT
    with opened(mount.disk) as disk:
        fallocate(disk, PUNCH_HOLE | KEEP_SIZE, last, native.SEGMENT)
        assert os.pread(disk, native.SEGMENT, last) == bytes(SIZE - last)
    assert mount.written() == {SIZE // native.SEGMENT}
    assert mount.live.stat().st_size == SIZE


def test_other_files_have_no_holes_and_the_disk_keeps_its_own(mount: native.Native) -> None:
    """What is refused of one file is not refused of all: the kernel, told ENOSYS once, would ask no more."""
    status = mount.mountpoint / "status.json"
    subprocess.run(["cp", status, mount.folder / "copy"], check=True)
    with opened(status, os.O_RDONLY) as file:
        assert refused(os.lseek, file, 0, os.SEEK_DATA) == errno.EINVAL
    with opened(mount.mountpoint / "control", os.O_WRONLY) as control:
        number = refused(fallocate, control, PUNCH_HOLE | KEEP_SIZE, 0, 1)
        assert number == errno.EOPNOTSUPP
    with opened(mount.disk) as disk:
        fallocate(disk, PUNCH_HOLE | KEEP_SIZE, 1 << 20, 1 << 20)
        assert os.lseek(disk, 0, os.SEEK_HOLE) == 1 << 20


def test_read_only(serve: Serve) -> None:
    """Nothing changes, and nothing is marked."""
    with serve(read_only=True) as it:
        assert refused(os.open, it.disk, os.O_RDWR) == errno.EROFS
        assert it.disk.read_bytes() == it.live.read_bytes()
        assert it.written() == set()


def test_truncation_is_refused(mount: native.Native) -> None:
    """By name and at opening; both reach Python."""
    assert refused(os.truncate, mount.disk, 5) == errno.EPERM
    assert refused(os.open, mount.disk, os.O_RDWR | os.O_TRUNC) == errno.EPERM
    assert mount.disk.stat().st_size == SIZE


@conftest.both_ways
def test_o_sync_and_fsync_are_counted(mount: native.Native) -> None:
    """A flush is one; an O_DSYNC write is a write."""
    with opened(mount.disk, os.O_RDWR | os.O_DSYNC) as disk:
        os.pwrite(disk, b"x" * 512, 0)
        os.pwrite(disk, b"y" * PAGE, PAGE)
        os.fsync(disk)
        os.fdatasync(disk)
    assert mount.live.read_bytes()[: 2 * PAGE : 512].startswith(b"x")
    assert mount.live.read_bytes()[PAGE : 2 * PAGE] == b"y" * PAGE
    guest = mount.facts()["guest"]
    assert guest["write"][:3] == [2, 512 + PAGE, 0]
    assert guest["flush"][0] >= 2


@builds.sanitized
def test_shared_mapping(mount: native.Native) -> None:
    """Pages of a writable mapping become writes, marked like any other."""
    with opened(mount.disk) as disk, mmap.mmap(disk, 1 << 20) as view:
        assert view[:100] == mount.live.read_bytes()[:100]
        view[300_000:300_004] = b"mmap"
        view.flush()
    assert mount.live.read_bytes()[300_000:300_004] == b"mmap"
    assert mount.written() == {300_000 // native.SEGMENT}


@builds.sanitized
def test_qemu_patterns_discards_and_zeroes(mount: native.Native) -> None:
    """QEMU's block layer, without a cache: patterns verify, zeroes and discards write no bytes."""
    steps = ["write -P 7 1M 64k", "write -z 2M 1M", "write -z -u 4M 1M", "discard 6M 1M", "flush"]
    steps += ["read -P 7 1M 64k", "read -P 0 2M 1M", "read -P 0 4M 1M", "read -P 0 6M 1M"]
    command = ["qemu-io", "--image-opts", "driver=file,cache.direct=on,discard=unmap,aio=threads"]
    command[2] = f"driver=raw,discard=unmap,file.driver=file,file.filename={mount.disk}"
    done = subprocess.run(
        [*command, *(word for step in steps for word in ("-c", step))],
        check=True,
        capture_output=True,
        text=True,
    )
    assert "failed" not in done.stdout, done.stdout
    assert mount.facts()["guest"]["write"][1] == 65536
    expected = {16, *range(32, 48), *range(64, 80), *range(96, 112)}
    assert mount.written() == expected


@conftest.both_ways
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_random_qemu_commands_equal_a_model(mount: native.Native, seed: int) -> None:
    """Writes, zeroes with and without unmapping, discards, in any order: QEMU reads the model's bytes, and exactly
    the model's segments are marked."""
    numbers = random.Random(seed)
    model = oracle.ModelDisk.of(mount.live, native.SEGMENT)
    commands = []
    for _ in range(120):
        length = PAGE * numbers.choice([1, 2, 16, 31, 100])
        start = numbers.randrange((SIZE - length) // PAGE) * PAGE
        verb = numbers.choice(["write -P", "aio_write -P", "write -z", "write -z -u", "discard"])
        if verb.endswith("-P"):
            pattern = numbers.randrange(1, 256)
            # Patterns overlap: one is finished before the next begins.
            commands += [f"{verb} {pattern} {start} {length}", "aio_flush"]
            commands.append(f"read -P {pattern} {start} {length}")
            model.write(start, bytes([pattern]) * length)
        else:
            commands += [f"{verb} {start} {length}", f"read -P 0 {start} {length}"]
            model.zero(start, length)
    options = f"driver=raw,discard=unmap,file.driver=file,file.filename={mount.disk}"
    done = subprocess.run(
        ["qemu-io", "--image-opts", *(word for c in commands for word in ("-c", c)), options],
        check=True,
        capture_output=True,
        text=True,
    )
    assert "failed" not in done.stdout, done.stdout
    assert mount.facts()["guest"]["discard"][0] > 20
    assert mount.end() == model.written
    assert mount.live.read_bytes() == model.content


@conftest.both_ways
def test_slow_disk(tmp_path: pathlib.Path, serve: Serve) -> None:
    """On a backing that takes its time: marks come first, others are not held up, and everything lands."""
    size = 4 << 20
    delays = ["memory", str(size), "delay-write=700ms", "delay-read=5ms"]
    with qemu.nbdkit(*delays, filters=["delay"]) as address:
        with qemu.nbdfuse(address, tmp_path / "slow") as live, serve(live=live, threads=3) as it:
            with opened(it.disk, os.O_RDWR | os.O_DIRECT) as disk:
                writers = [
                    threading.Thread(target=os.pwritev, args=[disk, [aligned(b"s" * PAGE)], at])
                    for at in range(0, size, size // 8)
                ]
                for writer in writers:
                    writer.start()
                wait.until(lambda: len(it.written()) > 2, "writes are marked")
                # The status has come while the first of them are still at work, and so does a read.
                assert it.facts()["guest"]["write"][0] < len(writers)
                for writer in writers:
                    writer.join()
                for at in range(0, size, size // 8):
                    assert os.pread(disk, PAGE, at) == b"s" * PAGE
            assert it.facts()["guest"]["write"][:3] == [8, 8 * PAGE, 0]
            assert it.end() == {at // native.SEGMENT for at in range(0, size, size // 8)}


def test_many_requests_are_with_the_disk_at_a_time(tmp_path: pathlib.Path, serve: Serve) -> None:
    """Of one thread, where they go around the page cache: sixteen; the other four are for who reads when all wait."""
    size = 4 << 20
    with (
        qemu.nbdkit("memory", str(size), "delay-write=700ms", filters=["delay"]) as address,
        qemu.nbdfuse(address, tmp_path / "slow") as live,
        serve(live=live, cache="none", threads=1) as it,
    ):
        with opened(it.disk, os.O_RDWR | os.O_DIRECT) as disk:
            writers = [
                threading.Thread(target=os.pwritev, args=[disk, [aligned(b"s" * PAGE)], i * PAGE])
                for i in range(20)
            ]
            for writer in writers:
                writer.start()
            wait.until(lambda: it.facts()["depth"] >= 16, "all of them are with the disk")
            assert it.facts()["guest"]["write"][0] == 0
            for writer in writers:
                writer.join()
        assert live.read_bytes()[: 20 * PAGE] == b"s" * 20 * PAGE
        assert it.facts()["description"].startswith("native, 1 thread")


@contextlib.contextmanager
def slow_file(folder: pathlib.Path, delay: str) -> Iterator[tuple[pathlib.Path, pathlib.Path]]:
    """A file of 4 MiB that takes its time, and the log of what is asked of it."""
    folder.mkdir()
    options = ["memory", str(4 << 20), delay, f"logfile={folder / 'log'}"]
    with (
        qemu.nbdkit(*options, filters=["log", "delay"]) as address,
        qemu.nbdfuse(address, folder / "mnt") as path,
    ):
        yield path, folder / "log"


def writes(log: pathlib.Path) -> list[str]:
    """Return what has become of the writes of a slow_file(), in order."""
    lines = [line for line in log.read_text().splitlines() if "Write" in line]
    return ["done" if "return=0" in line else "begun" for line in lines]


@contextlib.contextmanager
def looked_at(pid: int, folder: pathlib.Path) -> Iterator[None]:
    """Hold on to a process's memory, as who reads /proc/PID/mem does, for two seconds."""
    with slow_file(folder, "delay-read=2000ms") as (path, log):
        start = int(pathlib.Path(f"/proc/{pid}/maps").read_text().partition("-")[0], 16)
        with opened(path) as slow, mmap.mmap(slow, PAGE) as view:
            with opened(pathlib.Path(f"/proc/{pid}/mem"), os.O_RDONLY) as memory:
                # The memory is held while the page that it is to be copied to is being read.
                reader = threading.Thread(target=os.preadv, args=[memory, [view], start])
                reader.start()
                wait.until(lambda: "Read" in log.read_text(), "the reader waits for its page")
                try:
                    yield
                finally:
                    reader.join()


@pytest.mark.parametrize("held", [False, True], ids=["alone", "looked-at"])
def test_write_of_a_killed_server_is_over_before_the_next_begins(
    tmp_path: pathlib.Path, serve: Serve, held: bool
) -> None:
    """It would undo a later write of the same place, and may outlive its process where somebody looks at that."""
    with (
        slow_file(tmp_path / "disk", "delay-write=1500ms") as (live, log),
        serve(live=live, cache="none") as it,
    ):
        looking = looked_at(it.pid("server"), tmp_path / "other")
        with opened(it.disk, os.O_RDWR | os.O_DIRECT) as disk:
            with looking if held else contextlib.nullcontext():
                writer = threading.Thread(target=os.pwritev, args=[disk, [aligned(b"s" * PAGE)], 0])
                writer.start()
                wait.until(lambda: writes(log), "the write is with the disk")
                os.kill(it.pid("server"), signal.SIGKILL)
                # It is in flight until then for a checkpoint, too.
                assert it.ask("drain") == "ok"
                assert writes(log)[:2] == ["begun", "done"]
            writer.join()
        assert live.read_bytes()[:PAGE] == b"s" * PAGE
        assert writes(log) == ["begun", "done"] * 2


@conftest.both_ways
def test_slow_flush_holds_up_no_read(serve: Serve) -> None:
    """Of whole pages or not: a flush has a thread of its own."""
    with serve(faults="before-flush=3000000") as it, opened(it.disk) as disk:
        flush = threading.Thread(target=os.fsync, args=[disk])
        flush.start()
        wait.until(lambda: it.facts()["depth"] >= 1, "the flush is at work")
        content = it.live.read_bytes()
        assert os.pread(disk, 512, 512) == content[512:1024]
        assert os.pread(disk, PAGE, PAGE) == content[PAGE : 2 * PAGE]
        assert flush.is_alive()
        flush.join()


def test_without_asynchronous_io(serve: Serve) -> None:
    """Where the kernel has none to give (fs.aio-max-nr), each request has a thread for itself."""
    with serve(faults="no-aio", cache="none") as it:
        with opened(it.disk, os.O_RDWR | os.O_DIRECT) as disk:
            assert os.pwritev(disk, [aligned(b"d" * PAGE)], PAGE) == PAGE
            buffer = aligned(bytes(PAGE))
            assert os.preadv(disk, [buffer], PAGE) == PAGE
            assert buffer[:] == b"d" * PAGE
        it.kill("server")
        assert it.disk.read_bytes()[PAGE : 2 * PAGE] == b"d" * PAGE
        assert "no asynchronous I/O" in it.log


@conftest.both_ways
def test_loop_device_discards_what_ext4_frees(mount: native.Native) -> None:
    """mkfs and a discard of the whole device shrink the image; ext4 checks clean."""
    done = subprocess.run(
        ["losetup", "--find", "--show", "--direct-io=on", mount.disk],
        check=True,
        capture_output=True,
        text=True,
    )
    device = done.stdout.strip()
    try:
        subprocess.run(["blkdiscard", device], check=True)
        assert mount.live.stat().st_blocks * 512 < 1 << 20
        subprocess.run(["mkfs.ext4", "-q", "-E", "nodiscard", device], check=True)
        subprocess.run(["e2fsck", "-fn", device], check=True, capture_output=True)
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)
    # Its last sector is partial, and no part of the loop device.
    assert set(range(SIZE // native.SEGMENT)) <= mount.written()


@conftest.both_ways
def test_errors_reach_only_their_request(tmp_path: pathlib.Path, serve: Serve) -> None:
    """A backing with a broken place, by nbdkit's error filter: EIO there, good data around, bits set."""
    backing = tmp_path / "broken"
    backing.mkdir()
    (backing / "nbd").touch()
    (tmp_path / "data").write_bytes(bytes(4 << 20))
    # Reads and writes fail while the file `fail` is there.
    command = ["nbdfuse", str(backing / "nbd"), "[", "nbdkit", "--exit-with-parent"]
    command += ["--filter=error", "file", str(tmp_path / "data"), "error=EIO", "error-rate=100%"]
    command += [f"error-file={tmp_path / 'fail'}", "]"]
    with subprocess.Popen(command) as fuse:
        try:
            size = (backing / "nbd").stat
            wait.until(lambda: size().st_size == 4 << 20, "nbdfuse serves")
            with serve(live=backing / "nbd") as it, opened(it.disk) as disk:
                assert os.pwrite(disk, b"a" * 4096, 0) == 4096
                (tmp_path / "fail").touch()
                assert refused(os.pread, disk, 4096, 2 << 20) == errno.EIO
                (tmp_path / "fail").unlink()
                assert os.pread(disk, 4096, 2 << 20) == bytes(4096)
                assert os.pread(disk, 4096, 0) == b"a" * 4096
                assert it.facts()["guest"]["read"][2] == 1
                assert it.written() == {0}
        finally:
            subprocess.run(["fusermount3", "-u", "-z", backing / "nbd"], check=True)
            fuse.wait()
