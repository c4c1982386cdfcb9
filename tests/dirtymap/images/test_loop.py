# SPDX-License-Identifier: Apache-2.0
"""Loop devices: one disk of several names, of which each would let somebody else in."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from dirtymap import errors, images
from dirtymap.images import file, loop
from tests import qemu

MIB = 1 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(b"\x01" * (4 * MIB))
    return path


@pytest.fixture
def device(disk: Path) -> Iterator[str]:
    with qemu.loop_device(disk) as made:
        yield str(made)


@pytest.fixture
def device_over_device(device: str) -> Iterator[str]:
    with qemu.loop_device(device) as made:
        yield str(made)


def open_twice(first: str, second: str, *, writable: bool) -> None:
    """Open both for one moment; raises where the second is refused."""
    image = file.open_file(first, writable=True)
    try:
        file.open_file(second, writable=writable).close()
    finally:
        image.close()


def test_what_is_behind_a_device(device_over_device: str, device: str, disk: Path) -> None:
    for name, under in ((device_over_device, device), (device, str(disk))):
        with open(name, "rb") as stream:
            behind = loop.behind(stream.fileno())
            assert behind is not None
            assert behind.path == under
            assert behind.is_at(os.stat(under))
            assert not behind.is_at(os.stat(__file__))
    with open(disk, "rb") as stream:
        assert loop.behind(stream.fileno()) is None


def test_a_loop_over_a_loop_is_the_same_disk(
    device_over_device: str, device: str, disk: Path
) -> None:
    for one, other in ((device_over_device, device), (device_over_device, str(disk))):
        assert images.same_file(one, other)
        assert images.same_file(other, one)
    assert not images.same_file(device_over_device, __file__)


def test_a_file_that_a_loop_device_may_write_is_refused(disk: Path, device: str) -> None:
    with pytest.raises(errors.ImageError, match=f"can be written through {device}: detach"):
        file.open_file(str(disk), writable=True)
    file.open_file(str(disk)).close()


def test_the_device_under_another_is_refused(device: str, device_over_device: str) -> None:
    with pytest.raises(errors.ImageError, match=f"through {device_over_device}:"):
        file.open_file(device, writable=True)


def test_a_second_device_over_the_same_file_is_refused(disk: Path, device: str) -> None:
    with qemu.loop_device(disk) as other:
        with pytest.raises(errors.ImageError, match=f"{disk}.*through {device}:"):
            file.open_file(str(other), writable=True)


def test_a_device_that_may_not_write_disturbs_nobody(disk: Path) -> None:
    with qemu.loop_device(disk, read_only=True):
        file.open_file(str(disk), writable=True).close()


def test_a_device_is_an_image_down_to_the_last_file(device_over_device: str) -> None:
    image = file.open_file(device_over_device, writable=True)
    image.write(0, b"new")
    image.close()
    file.open_file(device_over_device, writable=True).close()


@pytest.mark.parametrize("writable", [True, False], ids=["writing", "reading"])
def test_the_file_behind_a_device_is_locked(
    disk: Path, device: str, device_over_device: str, writable: bool
) -> None:
    with pytest.raises(errors.ImageError, match="in use by another program"):
        open_twice(device_over_device, str(disk), writable=False)
    with pytest.raises(errors.ImageError, match="in use|can be written"):
        open_twice(device_over_device, device, writable=writable)


def test_a_file_that_qemu_writes_is_refused_through_its_device(disk: Path) -> None:
    with qemu.loop_device(disk, read_only=True) as device:
        with qemu.nbd_server(disk, "raw", writable=True):
            with pytest.raises(errors.ImageError, match=f"{device} .{disk}.: is in use"):
                file.open_file(str(device))


def test_a_file_in_use_below_a_device_is_refused_whoever_came_first(disk: Path) -> None:
    image = file.open_file(str(disk), writable=True)
    with qemu.loop_device(disk) as device:
        with pytest.raises(errors.ImageError, match="in use by another program"):
            file.open_file(str(device), writable=True)
        with qemu.loop_device(device) as above:
            with pytest.raises(errors.ImageError, match="in use by another program"):
                file.open_file(str(above), writable=True)
    image.close()


def test_a_mounted_device_below_another_is_refused(disk: Path, tmp_path: Path) -> None:
    qemu.mkfs_ext4(disk)
    with qemu.loop_device(disk) as device, qemu.loop_device(device) as above:
        with qemu.mounted(device, tmp_path / "inside"):
            with pytest.raises(errors.ImageError, match="mounted or otherwise in use"):
                file.open_file(str(above), writable=True)


def test_a_deleted_file_behind_a_device_keeps_nobody_out(disk: Path, device: str) -> None:
    disk.unlink()
    disk.write_bytes(b"another")
    file.open_file(device, writable=True).close()


def test_a_read_only_device_is_not_written(disk: Path) -> None:
    """It can be opened for writing; the guest's first write would be refused."""
    with qemu.loop_device(disk, read_only=True) as device:
        with pytest.raises(errors.ImageError, match="is a read-only device: .*--read-only"):
            file.open_file(str(device), writable=True)
        file.open_file(str(device)).close()
