# SPDX-License-Identifier: Apache-2.0
"""Programs that people run on a disk, run on the mounted one: fio, qemu-io, ext4's own tools.

Each writes while the scan goes on, reads back what it wrote, and afterwards the dirty map has every
segment that an independent comparison finds.
"""

import contextlib
import mmap
import os
import pathlib
import random
from collections.abc import Iterator

import pytest

from tests import command, oracle, qemu, wait

KIB = 1024
MIB = 1 << 20
GRANULARITY = 64 * KIB
SIZE = 24 * MIB


@pytest.fixture
def images(workdir: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """A reference full of data and a live disk that already differs from it in three places."""
    reference, live = workdir / "reference", workdir / "live"
    reference.write_bytes(random.Random(1).randbytes(SIZE))
    live.write_bytes(reference.read_bytes())
    with live.open("r+b") as file:
        for start in (0, 5 * MIB + 17, SIZE - 1):
            file.seek(start)
            before = file.read(1)
            file.seek(start)
            file.write(bytes([before[0] ^ 1]))
    return live, reference


@contextlib.contextmanager
def scanned_meanwhile(
    images: tuple[pathlib.Path, pathlib.Path], mountpoint: pathlib.Path, datapath: str
) -> Iterator[pathlib.Path]:
    """Yield the mounted disk when a third of it has been scanned; after the block judge the map.

    From there on the scan is slow, so that writes come before, at and behind its place. Where it
    is further than that already, all of them are behind, and only the write bitmap has them.
    """
    live, reference = images
    carrier = live.parent / "map.qcow2"
    options: list[command.Path] = ["--datapath", datapath, "--rate", "16M", "--output", carrier]
    with command.mounted(live, reference, mountpoint, *options):
        wait.until(lambda: command.status(mountpoint)["scanned"] >= SIZE // 3, "a third is scanned")
        command.control(mountpoint, "rate 512K")
        yield mountpoint / "disk"
        command.control(mountpoint, "rate 1G")
        status = command.until_state(mountpoint, "complete", "failed", "cancelled")
        assert status["datapath"].startswith(datapath)
        assert status["state"] == "complete"
        assert not status["errors"]
    judge(carrier, live, reference, status["written"])


def judge(carrier: pathlib.Path, live: pathlib.Path, reference: pathlib.Path, written: int) -> None:
    """Nothing is missing in the map, and what it has too much was written."""
    qemu.check(carrier)
    dirty = qemu.dirty_segments(carrier, GRANULARITY)
    differing = oracle.differing(live, reference, GRANULARITY)
    assert differing <= dirty, f"missed: {sorted(differing - dirty)}"
    assert len(dirty - differing) * GRANULARITY <= written


def fio(disk: pathlib.Path, engine: str, *options: str) -> None:
    """Write blocks at random offsets, each with its checksum, and read all of them back."""
    qemu.run(
        *("fio", "--name=job", f"--filename={disk}", f"--ioengine={engine}", "--thread"),
        *("--rw=randwrite", "--allow_file_create=0", "--fallocate=none", "--randseed=7"),
        *("--verify=crc32c", "--verify_fatal=1", "--do_verify=1", "--verify_state_save=0"),
        *("--end_fsync=1", *options),
    )


@pytest.mark.parametrize(
    ("engine", "options"),
    [
        pytest.param("libaio", ["--direct=1", "--iodepth=16", "--bs=4k"], id="libaio-direct"),
        pytest.param("io_uring", ["--iodepth=16", "--bsrange=4k-256k"], id="io_uring-mixed-sizes"),
        pytest.param("psync", ["--bs=512", "--io_size=2M"], id="psync-sectors"),
        pytest.param("psync", ["--bs=4k", "--rw=randrw"], id="psync-read-and-write"),
        pytest.param("mmap", ["--bs=4k"], id="mmap"),
    ],
)
def test_fio_reads_back_what_it_wrote(
    images: tuple[pathlib.Path, pathlib.Path],
    mountpoint: pathlib.Path,
    datapath: str,
    engine: str,
    options: list[str],
) -> None:
    """Every block has the checksum it was written with, and every block that changed is dirty."""
    with scanned_meanwhile(images, mountpoint, datapath) as disk:
        fio(disk, engine, "--size=8M", "--offset=7M", *options)


def test_memory_map_of_a_loop_device(
    images: tuple[pathlib.Path, pathlib.Path], mountpoint: pathlib.Path, datapath: str
) -> None:
    """Pages written through a shared map of a block device above the disk are recorded.

    Not by fio: its mmap engine (3.33) fails its own verification on any loop device.
    """
    live, _ = images
    places = [position * 4096 + position for position in range(0, SIZE // 4096, 61)]
    with (
        scanned_meanwhile(images, mountpoint, datapath) as disk,
        qemu.loop_device(disk) as device,
        device.open("r+b") as file,
        mmap.mmap(file.fileno(), SIZE) as pages,
    ):
        for place in places:
            pages[place : place + 8] = place.to_bytes(8, "little")
        pages.flush()
        os.fsync(file.fileno())
    content = live.read_bytes()
    assert all(content[place : place + 8] == place.to_bytes(8, "little") for place in places)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(["-t", "none", "-i", "native"], id="direct-native-aio"),
        pytest.param(["-t", "none", "-i", "io_uring"], id="direct-io_uring"),
        pytest.param(["-t", "writeback"], id="cached"),
    ],
)
def test_qemu_io_patterns(
    images: tuple[pathlib.Path, pathlib.Path],
    mountpoint: pathlib.Path,
    datapath: str,
    options: list[str],
) -> None:
    """Patterns at segment borders, zeros and flushes, as QEMU's block layer sends them."""
    with scanned_meanwhile(images, mountpoint, datapath) as disk:
        qemu.io(
            disk,
            "write -P 0x11 65024 1024",
            "write -P 0x22 3M 2M",
            "write -z 10M 192k",
            "writev -P 0x33 20M 4k 8k 512",
            "aio_write -P 0x44 15M 64k",
            "aio_write -P 0x55 16M 64k",
            "aio_flush",
            "flush",
            "read -P 0x11 65024 1024",
            "read -P 0x22 3M 2M",
            "read -P 0 10M 192k",
            "read -P 0x33 20M 12800",
            "read -P 0x44 15M 64k",
            "read -P 0x55 16M 64k",
            options=options,
        )


def test_file_system_on_a_loop_device(
    images: tuple[pathlib.Path, pathlib.Path], mountpoint: pathlib.Path, datapath: str
) -> None:
    """ext4 made and written through a loop device above the disk is sound, there and beneath."""
    live, _ = images
    content = random.Random(2).randbytes(3 * MIB)
    folder = live.parent / "ext4"
    with (
        scanned_meanwhile(images, mountpoint, datapath) as disk,
        qemu.loop_device(disk) as device,
    ):
        qemu.mkfs_ext4(device)
        with qemu.mounted(device, folder):
            for number in range(20):
                (folder / f"small {number}").write_bytes(content[number : number + 5000])
            (folder / "large").write_bytes(content)
            (folder / "small 3").unlink()
        qemu.fsck_ext4(device)
        with qemu.mounted(device, folder, "ro"):
            assert (folder / "large").read_bytes() == content
    qemu.fsck_ext4(live)
