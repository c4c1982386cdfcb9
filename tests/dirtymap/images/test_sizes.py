# SPDX-License-Identifier: Apache-2.0
"""Sizes that a format or a server rounds up."""

import pathlib
import random

import pytest

from dirtymap import images
from dirtymap.images import sizes
from tests import qemu

MIB = 1 << 20


@pytest.mark.parametrize("size", [10 * MIB, 10 * MIB + 512], ids=["even", "odd-sector"])
def test_a_vpc_is_cut_to_the_live_disks_size(tmp_path: pathlib.Path, size: int) -> None:
    disk, path = tmp_path / "disk", tmp_path / "disk.vpc"
    disk.write_bytes(random.Random(9).randbytes(size))
    qemu.convert(disk, path, "vpc")
    image = images.open(f"vpc:{path}")
    try:
        assert image.size > size
        fitted, note = sizes.fit(image, size)
        assert fitted.size == size
        assert note is not None
        assert "longer than the live disk" in note
        buffer = bytearray(size)
        fitted.read_into(0, memoryview(buffer))
        assert buffer == disk.read_bytes()
        assert sum(found.length for found in fitted.extents(0, size)) == size
        fitted.close()
        image.read_into(0, memoryview(buffer))
    finally:
        image.close()


def test_a_vpc_that_really_is_longer_stays_so(tmp_path: pathlib.Path) -> None:
    """Bytes behind the live disk's end, or more than rounding: the size rule decides."""
    disk, path = tmp_path / "disk", tmp_path / "disk.vpc"
    disk.write_bytes(b"\xff" * (10 * MIB))
    qemu.convert(disk, path, "vpc")
    image = images.open(f"vpc:{path}")
    try:
        assert sizes.fit(image, 10 * MIB - 512) == (image, None)
        assert sizes.fit(image, 5 * MIB) == (image, None)
        assert sizes.fit(image, image.size) == (image, None)
        assert sizes.fit(image, image.size + 1) == (image, None)
    finally:
        image.close()


def test_a_sector_rounded_up_by_qemu_is_cut(tmp_path: pathlib.Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(b"\xff" * (MIB + 77))
    with qemu.nbd_server(disk) as uri:
        image = images.open(uri)
        try:
            assert image.size == MIB + 512
            fitted, note = sizes.fit(image, MIB + 77)
            assert (fitted.size, note is None) == (MIB + 77, False)
            assert sizes.fit(image, MIB) == (image, None)
        finally:
            image.close()


def test_a_file_is_as_long_as_it_is(tmp_path: pathlib.Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(1000))
    image = images.open(str(disk))
    assert sizes.fit(image, 999) == (image, None)
    image.close()
