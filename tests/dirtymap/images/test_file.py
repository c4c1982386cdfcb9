# SPDX-License-Identifier: Apache-2.0
"""Raw images: files and block devices, their holes, their locks, the page cache."""

import contextlib
import errno
import mmap
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path

import numpy as np
import pytest

from dirtymap import errors, images
from dirtymap.extent import Extent
from dirtymap.images import base, file, lock, pagecache
from tests import pages, qemu, wait

MIB = 1 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """1 MiB of data, 1 MiB of hole, 100 bytes of data."""
    path = tmp_path / "disk.raw"
    with open(path, "wb") as stream:
        stream.write(b"\x01" * MIB)
        stream.seek(2 * MIB)
        stream.write(b"\x02" * 100)
    return path


@pytest.fixture
def loop(disk: Path) -> Iterator[str]:
    os.truncate(disk, 4 * MIB)
    made = subprocess.run(
        ["losetup", "--find", "--show", str(disk)], check=True, capture_output=True, text=True
    )
    device = made.stdout.strip()
    yield device
    subprocess.run(["losetup", "--detach", device], check=True)


def test_it_reads_any_range_into_a_buffer(disk: Path) -> None:
    image = images.open(str(disk))
    assert isinstance(image, base.WritableImage)
    assert image.size == 2 * MIB + 100
    buffer = bytearray(3)
    image.read_into(MIB - 2, memoryview(buffer))
    assert buffer == b"\x01\x01\x00"
    image.close()
    image.close()


def test_a_read_beyond_the_end_is_an_error_not_zeros(disk: Path) -> None:
    image = images.open(str(disk))
    with pytest.raises(OSError) as caught:
        image.read_into(2 * MIB + 99, memoryview(bytearray(2)))
    assert caught.value.errno == errno.EIO
    image.close()


def test_holes_are_zero_and_cover_the_range_exactly(disk: Path) -> None:
    image = images.open(str(disk))
    assert list(image.extents(0, image.size)) == [
        Extent(0, MIB),
        Extent(MIB, MIB, zero=True, hole=True),
        Extent(2 * MIB, 100),
    ]
    assert list(image.extents(MIB + 7, 10)) == [Extent(MIB + 7, 10, zero=True, hole=True)]
    image.close()


def test_a_hole_at_the_end_is_a_hole(disk: Path) -> None:
    os.truncate(disk, 3 * MIB)
    image = images.open(str(disk))
    *_, last = image.extents(0, image.size)
    assert last.zero
    assert last.end == 3 * MIB
    image.close()


@pytest.mark.parametrize("end", [MIB // 2, MIB + 5], ids=["within-data", "within-a-hole"])
def test_what_was_cut_off_after_opening_is_no_hole(disk: Path, end: int) -> None:
    """It cannot be read; a kernel that finds no data there does not say that it is zeros."""
    image = images.open(str(disk))
    os.truncate(disk, end)
    for start in (0, end, 2 * MIB):
        assert not any(
            found.zero and found.end > end for found in image.extents(start, image.size - start)
        )
    image.close()


def test_after_the_deadline_all_is_data(disk: Path) -> None:
    image = images.open(str(disk))
    past = time.monotonic() - 1
    assert list(image.extents(0, image.size, past)) == [Extent(0, image.size)]
    image.close()


def test_writes_land_and_flush(disk: Path) -> None:
    image = file.open_file(str(disk), writable=True)
    image.write(MIB - 1, b"ab")
    image.flush()
    image.flush(datasync=False)
    assert image.read(MIB - 2, 4) == b"\x01ab\x00"
    image.close()


def test_a_block_device_is_an_image(loop: str) -> None:
    image = file.open_file(loop, writable=True)
    assert image.size == 4 * MIB
    image.write(512, b"x")
    assert image.read(512, 1) == b"x"
    image.close()


def test_a_loop_device_and_its_file_are_the_same_bytes(loop: str, disk: Path) -> None:
    with open(loop, "rb") as device, open(disk, "rb") as backing:
        assert file.identity(device.fileno()) == file.identity(backing.fileno())
        with open(__file__, "rb") as other:
            assert file.identity(other.fileno()) != file.identity(backing.fileno())


def test_a_mounted_device_is_not_written(loop: str, tmp_path: Path) -> None:
    subprocess.run(["mkfs.ext4", "-q", loop], check=True)
    where = tmp_path / "mounted"
    where.mkdir()
    subprocess.run(["mount", loop, str(where)], check=True)
    try:
        with pytest.raises(errors.ImageError, match="in use"):
            file.open_file(loop, writable=True)
    finally:
        subprocess.run(["umount", str(where)], check=True)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("missing", "No such file"),
        ("folder", "directory"),
        ("empty", "is empty"),
        ("pipe", "neither"),
    ],
)
def test_what_is_no_image_is_one_line(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty").touch()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(errors.ImageError, match=words) as caught:
        images.open(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_an_unknown_format_is_refused_and_never_guessed() -> None:
    with pytest.raises(errors.ImageError, match=r"\./floppy:disk"):
        images.open("floppy:disk")


def test_a_raw_disk_that_looks_like_qcow2_is_raw(tmp_path: Path) -> None:
    path = tmp_path / "guest.raw"
    path.write_bytes(b"QFI\xfb" + b"\x00" * 4092)
    image = images.open(str(path))
    assert image.size == 4096
    image.close()


def test_two_writers_are_refused_and_two_readers_are_not(disk: Path) -> None:
    reader, other = images.open(str(disk)), images.open(str(disk))
    with pytest.raises(errors.ImageError, match="in use"):
        images.open(str(disk), writable=True)
    reader.close()
    other.close()
    writer = images.open(str(disk), writable=True)
    with pytest.raises(errors.ImageError, match="in use"):
        images.open(str(disk))
    writer.close()
    images.open(str(disk)).close()


def test_qemu_and_posthoc_keep_out_of_each_others_way(disk: Path, tmp_path: Path) -> None:
    """QEMU's tools refuse what we write, and we refuse what they write."""
    write = ["qemu-io", "-f", "raw", "-c", "write -P 9 0 512", str(disk)]
    os.truncate(disk, 4 * MIB)
    image = file.open_file(str(disk), writable=True)
    refused = subprocess.run(write, capture_output=True, text=True)
    assert refused.returncode != 0
    assert "lock" in refused.stderr
    image.close()
    subprocess.run(write, check=True, capture_output=True)

    socket = tmp_path / "nbd.sock"
    pid_file = tmp_path / "pid"
    subprocess.run(
        ["qemu-nbd", "--fork", "-f", "raw", "-t", "-k", socket, "--pid-file", pid_file, disk],
        check=True,
    )
    try:
        for writable in (True, False):
            with pytest.raises(errors.ImageError, match="in use"):
                images.open(str(disk), writable=writable)
    finally:
        os.kill(int(pid_file.read_text()), signal.SIGKILL)


def test_a_refused_lock_leaves_none_behind(disk: Path) -> None:
    writer = file.open_file(str(disk), writable=True)
    with open(disk, "rb") as stream:
        with pytest.raises(errors.ImageError):
            lock.take(stream.fileno(), "disk", writing=False)
        writer.close()
        images.open(str(disk), writable=True).close()


def read_in_turns(reader: pagecache.Reader, size: int, threads: int, unaligned: int) -> None:
    """Read all of it with several threads, each taking the next MiB, as a scan's workers do."""
    pieces, lock = iter(range(0, size, MIB)), threading.Lock()

    def work() -> None:
        buffer = np.frombuffer(mmap.mmap(-1, MIB + unaligned), np.uint8)[unaligned:]
        while True:
            with lock:
                start = next(pieces, None)
            if start is None:
                return
            part = buffer[: min(MIB, size - start)]
            reader.read_into(start, part.data)
            assert part[0] == start // MIB % 251

    with futures.ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(work) for _ in range(threads)]:
            done.result()


@pytest.mark.parametrize("unaligned", [0, 1], ids=["around-the-cache", "through-it"])
def test_the_page_cache_is_left_as_it_was_found(workdir: Path, unaligned: int) -> None:
    """Whatever readahead and two threads make of each other: what was not cached is not cached afterwards."""
    path = workdir / "cold.raw"
    size = 32 * MIB + 100
    path.write_bytes(b"".join(bytes([i]) + os.urandom(MIB - 1) for i in range(33))[:size])
    with open(path, "rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        os.pread(stream.fileno(), 2 * MIB, MIB)
        os.pread(stream.fileno(), 64 << 10, 7 * MIB + 4096)
        before = pages.resident(path)
        assert set(range(MIB // mmap.PAGESIZE, 3 * MIB // mmap.PAGESIZE)) < before
        assert 3 * MIB // mmap.PAGESIZE not in before
    with open(path, "rb") as stream:
        reader = pagecache.Reader(stream.fileno())
        read_in_turns(reader, size, 1 + (unaligned == 0), unaligned)
        reader.close()
    assert pages.resident(path) == before


@pytest.mark.parametrize("unaligned", [0, 1], ids=["around-the-cache", "through-it"])
def test_readahead_does_not_go_on_to_the_end(tmp_path: Path, unaligned: int) -> None:
    """A file whose beginning somebody has read: its last pages' mark fetched all the rest, window by window."""
    size = 96 * MIB
    with qemu.reflinks(tmp_path / "xfs") as folder:
        device = subprocess.check_output(["findmnt", "-no", "SOURCE", folder], text=True).strip()
        # In sectors: 8 MiB, as large arrays have it.
        subprocess.run(["blockdev", "--setra", str((8 * MIB) // 512), device], check=True)
        path = folder / "warm.raw"
        path.write_bytes(b"".join(bytes([i % 251]) + bytes(MIB - 1) for i in range(size // MIB)))
        with open(path, "rb", buffering=0) as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            stream.read(4 * MIB)
            # What was asked for and as much again, which is still on its way.
            wait.until(lambda: len(pages.resident(path)) >= 8 * MIB // mmap.PAGESIZE, "it is there")
            before = pages.resident(path)
            assert len(before) < size // mmap.PAGESIZE // 2
            reader = pagecache.Reader(stream.fileno())
            read_in_turns(reader, size, 1 + (unaligned == 0), unaligned)
            reader.close()
        assert pages.resident(path) == before


def test_what_was_written_through_the_cache_is_read_around_it(workdir: Path) -> None:
    """A guest's page that is not on the disk yet, in a range that is not cached otherwise."""
    path = workdir / "dirty.raw"
    path.write_bytes(bytes(8 * MIB))
    with open(path, "r+b", buffering=0) as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        os.pwrite(stream.fileno(), b"new", 5 * MIB + 5000)
        reader = pagecache.Reader(stream.fileno())
        buffer = np.frombuffer(mmap.mmap(-1, 8 * MIB), np.uint8)
        reader.read_into(0, buffer.data)
        reader.close()
        assert buffer[5 * MIB + 5000 :][:3].tobytes() == b"new"


def test_a_gentle_read_copies_a_little_at_a_time(
    workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the cache, where the kernel copies; around it nothing is copied, and larger is faster."""
    path = workdir / "disk.raw"
    path.write_bytes(content := os.urandom(2 * MIB + 100))
    lengths: list[int] = []
    preadv = os.preadv

    def spy(fd: int, buffers: list[memoryview], start: int) -> int:
        lengths.extend(len(buffer) for buffer in buffers)
        return preadv(fd, buffers, start)

    buffer = np.frombuffer(mmap.mmap(-1, 2 * MIB + 100), np.uint8)
    with contextlib.closing(images.open(str(path))) as image:
        assert isinstance(image, base.CopiedImage)
        monkeypatch.setattr(os, "preadv", spy)
        image.read_gently(100, buffer[: 2 * MIB].data)
        assert buffer[: 2 * MIB].tobytes() == content[100:]
        assert sum(lengths) == 2 * MIB
        assert max(lengths) == 64 << 10
    with open(path, "rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    lengths.clear()
    with contextlib.closing(images.open(str(path))) as image:
        assert isinstance(image, base.CopiedImage)
        image.read_gently(0, buffer[: 2 * MIB].data)
        assert buffer[: 2 * MIB].tobytes() == content[: 2 * MIB]
        assert lengths == [2 * MIB]
