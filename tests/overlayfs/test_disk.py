# SPDX-License-Identifier: Apache-2.0
"""The file `disk` through a real kernel mount: a block device in manners, the live image in bytes."""

import errno
import mmap
import os
import pathlib
import random
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest

from tests import oracle, wait
from tests.overlayfs import conftest, mounted
from tests.overlayfs.conftest import gated

Serve = Callable[..., AbstractContextManager[mounted.Mounted]]
PAGE = 4096


@contextmanager
def opened(path: pathlib.Path, flags: int = os.O_RDWR) -> Iterator[int]:
    descriptor = os.open(path, flags)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def refused(call: Callable[..., object], *arguments: object) -> int | None:
    """Return the errno that `call` fails with."""
    with pytest.raises(OSError) as error:
        call(*arguments)
    return error.value.errno


# Any offset, any length


@pytest.mark.parametrize("extra", [0, os.O_DIRECT], ids=["buffered", "direct"])
def test_random_reads_and_writes_equal_a_model(mount: mounted.Mounted, extra: int) -> None:
    """Whatever is written at whatever offset reads back, lands in the image, and is in the bitmap."""
    model = oracle.ModelDisk.of(mount.live, mount.granularity)
    numbers = random.Random(7)
    with opened(mount.disk, os.O_RDWR | extra) as disk:
        for _ in range(400):
            length = numbers.choice([1, 512, 4096, 65536, numbers.randrange(200_000)])
            start = numbers.randrange(conftest.SIZE - length)
            if extra:
                # The page cache of the image's own file system is not what is tested here.
                start, length = start // PAGE * PAGE, max(length // PAGE * PAGE, PAGE)
            if numbers.random() < 0.5:
                data = numbers.randbytes(length)
                model.write(start, data)
                assert os.pwritev(disk, [conftest.aligned(data)], start) == length
            else:
                buffer = conftest.aligned(bytes(length))
                assert os.preadv(disk, [buffer], start) == length
                assert buffer[:] == model.read(start, length)
    assert mount.live.read_bytes() == model.content
    assert mount.written() == model.written


def test_read_at_the_end_is_short_and_beyond_is_empty(shared: mounted.Mounted) -> None:
    """The size is the image's to the byte, no multiple of anything."""
    with opened(shared.disk, os.O_RDONLY) as disk:
        assert os.fstat(disk).st_size == conftest.SIZE
        assert os.lseek(disk, 0, os.SEEK_END) == conftest.SIZE
        assert os.pread(disk, PAGE, conftest.SIZE - 10) == shared.live.read_bytes()[-10:]
        assert os.pread(disk, PAGE, conftest.SIZE) == b""
        assert os.pread(disk, PAGE, 1 << 50) == b""


def test_write_of_nothing_marks_nothing(mount: mounted.Mounted) -> None:
    """A write of zero bytes succeeds, anywhere within the disk."""
    with opened(mount.disk) as disk:
        assert os.pwrite(disk, b"", 70_000) == 0
    assert mount.written() == set()


def test_large_requests(mount: mounted.Mounted) -> None:
    """One call may be larger than any FUSE request."""
    data = random.Random(3).randbytes(conftest.SIZE)
    with opened(mount.disk) as disk:
        assert os.pwrite(disk, data, 0) == len(data)
        assert os.pread(disk, len(data), 0) == data
    assert mount.live.read_bytes() == data


# The size is fixed


def test_write_across_the_end_is_cut_and_beyond_is_refused(mount: mounted.Mounted) -> None:
    """Like a block device: a short write at the border, then ENOSPC; the image never grows."""
    end = conftest.SIZE
    with opened(mount.disk) as disk:
        assert os.pwrite(disk, b"x" * 100, end - 10) == 10
        assert refused(os.pwrite, disk, b"x", end) == errno.ENOSPC
        assert refused(os.pwrite, disk, b"x", 1 << 40) == errno.ENOSPC
        assert os.pread(disk, 100, end - 10) == b"x" * 10
        assert os.fstat(disk).st_size == end
    assert mount.live.stat().st_size == end
    assert mount.written() == {(end - 10) // mount.granularity}


def test_direct_write_beyond_the_end_is_refused(mount: mounted.Mounted) -> None:
    """With O_DIRECT too, and the kernel's clean-up after it (truncation to the size) does no harm."""
    with opened(mount.disk, os.O_RDWR | os.O_DIRECT) as disk:
        start = -(-conftest.SIZE // PAGE) * PAGE
        assert refused(os.pwritev, disk, [conftest.aligned(b"x" * PAGE)], start) == errno.ENOSPC
        assert os.fstat(disk).st_size == conftest.SIZE
    assert mount.live.stat().st_size == conftest.SIZE
    assert mount.written() == set()


def test_append_is_refused(shared: mounted.Mounted) -> None:
    """O_APPEND writes at the end, where there is no room."""
    with opened(shared.disk, os.O_WRONLY | os.O_APPEND) as disk:
        assert refused(os.write, disk, b"more") == errno.ENOSPC


@pytest.mark.parametrize("size", [0, 5, conftest.SIZE - 1, conftest.SIZE + 1, 1 << 40])
def test_truncate_is_refused(shared: mounted.Mounted, size: int) -> None:
    """The disk neither shrinks nor grows, by name or by descriptor."""
    assert refused(os.truncate, shared.disk, size) == errno.EPERM
    with opened(shared.disk) as disk:
        assert refused(os.ftruncate, disk, size) == errno.EPERM
        assert os.fstat(disk).st_size == conftest.SIZE
    assert shared.live.stat().st_size == conftest.SIZE


def test_truncate_to_its_own_size_is_accepted(shared: mounted.Mounted) -> None:
    """Nothing would change; tools that preallocate do this."""
    os.truncate(shared.disk, conftest.SIZE)


def test_opening_with_truncation_is_refused(shared: mounted.Mounted) -> None:
    """O_TRUNC must not make the kernel think the size is 0 while others read."""
    assert refused(os.open, shared.disk, os.O_RDWR | os.O_TRUNC) == errno.EPERM
    assert shared.disk.stat().st_size == conftest.SIZE


def test_dd_writes_into_it(mount: mounted.Mounted, tmp_path: pathlib.Path) -> None:
    """What people use on a disk works: dd conv=notrunc with direct I/O and fsync."""
    source = conftest.fill(tmp_path / "source", 1 << 20)
    command = ["dd", f"if={source}", f"of={mount.disk}", "bs=256K", "seek=2", "oflag=direct"]
    subprocess.run([*command, "conv=notrunc,fsync", "status=none"], check=True)
    assert mount.live.read_bytes()[512 << 10 :][: 1 << 20] == source.read_bytes()
    assert mount.written() == set(range(8, 24))


# Several openers, mappings


def test_openers_see_each_others_writes(mount: mounted.Mounted) -> None:
    """Buffered, direct and mapped openers agree after each write, whoever made it."""
    with (
        opened(mount.disk) as first,
        opened(mount.disk, os.O_RDWR | os.O_DIRECT) as direct,
        opened(mount.disk, os.O_RDONLY) as reader,
        mmap.mmap(reader, 1 << 20, mmap.MAP_SHARED, mmap.PROT_READ) as mapping,
    ):
        for step in range(1, 60):
            data = bytes([step]) * PAGE
            writer = (first, direct)[step % 2]
            start = step * PAGE
            os.pwritev(writer, [conftest.aligned(data)], start)
            buffer = conftest.aligned(bytes(PAGE))
            os.preadv(direct, [buffer], start)
            assert buffer[:] == data
            assert os.pread(first, PAGE, start) == data
            assert os.pread(reader, PAGE, start) == data
            assert mapping[start : start + PAGE] == data


@pytest.mark.parametrize("flags", [mmap.MAP_SHARED, mmap.MAP_PRIVATE], ids=["shared", "private"])
def test_mmap_for_reading(shared: mounted.Mounted, flags: int) -> None:
    """A reader may map the whole disk, its partial last page too."""
    with opened(shared.disk, os.O_RDONLY) as disk:
        with mmap.mmap(disk, 0, flags, mmap.PROT_READ) as mapping:
            assert len(mapping) == conftest.SIZE
            assert mapping[:] == shared.live.read_bytes()


def test_writes_through_a_mapping_are_marked_before_they_reach_the_image(
    mount: mounted.Mounted,
) -> None:
    """Pages of a writable mapping become writes when they are cleaned, recorded like any other."""
    with opened(mount.disk) as disk:
        with mmap.mmap(disk, 0) as mapping:
            for segment in (0, 5, 100):
                mapping[segment * 65536 + 9] ^= 0xFF
            mapping[conftest.SIZE - 1] ^= 0xFF
            mapping.flush()
            assert mount.live.read_bytes() == mapping[:]
    assert mount.written() == {0, 5, 100, (conftest.SIZE - 1) // 65536}


# Durability


@gated
def test_fsync_reaches_the_image(mount: mounted.Mounted) -> None:
    """fsync and fdatasync of the mount are those of the image; close alone is neither."""
    with opened(mount.disk) as disk:
        os.pwrite(disk, b"x", 0)
    assert mount.facts()["syncs"] == []
    with opened(mount.disk) as disk:
        os.fsync(disk)
        os.fdatasync(disk)
    assert mount.facts()["syncs"] == [False, True]


@gated
def test_o_sync_writes_are_synced(mount: mounted.Mounted, datapath: str) -> None:
    """An opener with O_SYNC gets its answer after the image's sync, which may be fdatasync: the size is fixed."""
    with opened(mount.disk, os.O_WRONLY | os.O_SYNC) as disk:
        os.pwrite(disk, b"x", 0)
    assert mount.facts()["syncs"] == [datapath == "stacked"]


@gated
def test_failed_fsync_is_reported(mount: mounted.Mounted) -> None:
    """The errno of the image's sync is the caller's, and the next one may succeed."""
    with opened(mount.disk) as disk:
        mount.ask("break", "flush", 0, errno.EDQUOT)
        assert refused(os.fsync, disk) == errno.EDQUOT
        mount.ask("mend")
        os.fsync(disk)


# Errors


@gated
def test_read_error_reaches_only_its_request(mount: mounted.Mounted) -> None:
    """EIO where the image has it, good data around it."""
    mount.ask("break", "read", 1 << 20, errno.EIO)
    with opened(mount.disk, os.O_RDONLY | os.O_DIRECT) as disk:
        assert refused(os.preadv, disk, [conftest.aligned(bytes(PAGE))], 1 << 20) == errno.EIO
        buffer = conftest.aligned(bytes(PAGE))
        assert os.preadv(disk, [buffer], (1 << 20) + PAGE) == PAGE
        assert buffer[:] == mount.live.read_bytes()[(1 << 20) + PAGE :][:PAGE]
    assert mount.facts()["guest"]["read"][2] == 1


@gated
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT], ids=os.strerror)
def test_failed_write_leaves_its_bits_set(mount: mounted.Mounted, number: int) -> None:
    """Any part of it may have reached the disk: every segment it named stays marked, no other is."""
    mount.ask("break", "write", 3 * 65536 + 5000, number)
    data = b"x" * (2 * 65536)
    with opened(mount.disk, os.O_RDWR | os.O_DIRECT) as disk:
        assert refused(os.pwritev, disk, [conftest.aligned(data)], 2 * 65536) == number
        assert os.pwritev(disk, [conftest.aligned(data)], 8 * 65536) == len(data)
    assert mount.written() == {2, 3, 8, 9}
    # A part of it has indeed reached the image.
    assert mount.live.read_bytes()[2 * 65536 :][:65536] == b"x" * 65536
    assert mount.facts()["guest"]["write"][2] == 1


# Attributes, and what there is not


def test_times_stay_and_setting_them_is_harmless(shared: mounted.Mounted) -> None:
    """A changing mtime would make the kernel drop its cache; `touch` just succeeds."""
    before = shared.disk.stat().st_mtime_ns
    os.utime(shared.disk, (1, 1))
    assert shared.disk.stat().st_mtime_ns == before


def test_mode_and_owner_are_fixed(shared: mounted.Mounted) -> None:
    """Setting what is already so is accepted, a change is EPERM."""
    shared.disk.chmod(0o600)
    os.chown(shared.disk, os.getuid(), os.getgid())
    assert refused(os.chmod, shared.disk, 0o666) == errno.EPERM
    assert refused(os.chown, shared.disk, 12345, -1) == errno.EPERM
    assert refused(os.chown, shared.disk, -1, 12345) == errno.EPERM


@pytest.mark.parametrize("shared", ["python"], indirect=True)
def test_holes_are_not_told_and_cannot_be_made(shared: mounted.Mounted) -> None:
    """pyfuse3 has neither lseek nor fallocate: all is data, and discards are refused without harm."""
    with opened(shared.disk) as disk:
        assert os.lseek(disk, 0, os.SEEK_DATA) == 0
        assert os.lseek(disk, 0, os.SEEK_HOLE) == conftest.SIZE
    punch = ["fallocate", "--punch-hole", "--offset=0", "--length=64K", str(shared.disk)]
    done = subprocess.run(punch, capture_output=True, text=True)
    assert done.returncode != 0
    assert "support" in done.stderr
    assert shared.disk.read_bytes() == shared.live.read_bytes()


# Read-only


def test_read_only_disk(serve: Serve) -> None:
    """It reads; opening for writing, truncating and O_TRUNC are EROFS, to root too; control works."""
    with serve(read_only=True) as mount:
        assert mount.disk.stat().st_mode & 0o777 == 0o400
        assert mount.disk.read_bytes() == mount.live.read_bytes()
        assert refused(os.open, mount.disk, os.O_RDWR) == errno.EROFS
        assert refused(os.open, mount.disk, os.O_WRONLY) == errno.EROFS
        assert refused(os.open, mount.disk, os.O_RDONLY | os.O_TRUNC) == errno.EROFS
        assert refused(os.truncate, mount.disk, 0) == errno.EROFS
        with opened(mount.disk, os.O_RDONLY) as disk:
            os.fsync(disk)
        (mount.mountpoint / "control").write_text("pause\n")
        assert mount.facts()["control"] == ["pause"]


# Real users of a disk


def test_loop_device_with_a_file_system(tmp_path: pathlib.Path, mountpoint: pathlib.Path) -> None:
    """ext4 on a loop device over the mounted disk: made, filled, checked; every change is recorded."""
    live = tmp_path / "live"
    with live.open("wb") as file:
        file.truncate(32 << 20)
    reference = tmp_path / "reference"
    reference.write_bytes(live.read_bytes())
    inside = tmp_path / "inside"
    inside.mkdir()
    with mounted.serving(tmp_path, live, mountpoint, granularity=4096) as mount:
        attach = ["losetup", "--find", "--show", "--direct-io=on", str(mount.disk)]
        loop = subprocess.run(attach, check=True, capture_output=True, text=True).stdout.strip()
        try:
            subprocess.run(["mkfs.ext4", "-q", loop], check=True)
            subprocess.run(["mount", loop, inside], check=True)
            try:
                for number in range(20):
                    (inside / str(number)).write_bytes(random.Random(number).randbytes(50_000))
            finally:
                subprocess.run(["umount", inside], check=True)
            subprocess.run(["fsck.ext4", "-fn", loop], check=True, capture_output=True)
        finally:
            subprocess.run(["losetup", "--detach", loop], check=True)
        # A detached loop device lets go of its file a moment later.
        wait.until(lambda: not _backing(mount.disk), "the loop device lets go")
        differing = oracle.differing(live, reference, 4096)
        assert differing
        assert differing <= mount.written()


def _backing(path: pathlib.Path) -> str:
    command = ["losetup", "--noheadings", "--associated", str(path)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_qemu_io_verifies_its_patterns(tmp_path: pathlib.Path, mountpoint: pathlib.Path) -> None:
    """QEMU's own block layer, without a cache, writes and verifies."""
    live = conftest.fill(tmp_path / "live", 4 << 20)
    commands = ["write -P 7 0 64k", "aio_write -P 9 1M 1M", "aio_flush", "flush"]
    commands += ["read -P 7 0 64k", "read -P 9 1M 1M"]
    arguments = [word for command in commands for word in ("-c", command)]
    with mounted.serving(tmp_path, live, mountpoint) as mount:
        command = ["qemu-io", "-f", "raw", "-t", "none", *arguments, str(mount.disk)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "verification failed" not in done.stdout
        assert mount.written() == {0, *range(16, 32)}
