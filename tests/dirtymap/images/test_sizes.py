# SPDX-License-Identifier: Apache-2.0
"""Sizes that a format or a server rounds up."""

import pathlib
import random
from collections.abc import Callable, Iterator

import pytest

from dirtymap import images
from dirtymap.images import base, digest, hashed, sizes
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
        assert isinstance(fitted, base.CopiedImage)
        gently = bytearray(size)
        fitted.read_gently(0, memoryview(gently))
        assert gently == buffer
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


G = 4096


@pytest.fixture
def digest_of(tmp_path: pathlib.Path) -> Iterator[Callable[[bytes], hashed.HashedReference]]:
    """Make the manifest of a disk with these bytes."""
    made = []

    def make(content: bytes) -> hashed.HashedReference:
        path = tmp_path / "disk"
        path.write_bytes(content)
        image = images.open(str(path))
        digest.write(f"{path}.digest", image, G)
        image.close()
        made.append(digest.open_digest(f"{path}.digest"))
        return made[-1]

    yield make
    for reference in made:
        reference.close()


def test_hashes_of_what_was_rounded_up_are_cut(
    digest_of: Callable[[bytes], hashed.HashedReference],
) -> None:
    """A vpc's digest is as long as the vpc: what is cut off are segments known to be zeros."""
    content = random.Random(9).randbytes(4 * G)
    reference = digest_of(content + bytes(2 * G + 512))
    fitted, note = sizes.fit(reference, 4 * G)
    assert isinstance(fitted, base.HashedImage)
    assert (fitted.size, fitted.granularity) == (4 * G, G)
    assert note is not None
    assert "8704 (8.5 KiB) longer than the live disk" in note
    assert fitted.equal(3, memoryview(content[3 * G :]))
    assert not fitted.equal(3, memoryview(bytes(G)))
    assert [(found.start, found.length, found.zero) for found in fitted.extents(0, 4 * G)] == [
        (0, 4 * G, False)
    ]


def test_hashes_are_cut_within_a_segment_only_where_it_is_zeros(
    digest_of: Callable[[bytes], hashed.HashedReference],
) -> None:
    """What else such a segment's hash is of cannot be told: then the size rule decides."""
    content = random.Random(9).randbytes(2 * G)
    zeros = digest_of(content + bytes(2 * G))
    fitted, note = sizes.fit(zeros, 2 * G + 512)
    assert isinstance(fitted, base.HashedImage)
    assert note is not None
    assert fitted.equal(2, memoryview(bytes(512)))
    assert not fitted.equal(2, memoryview(bytes(511) + b"x"))
    assert sizes.fit(zeros, G + 512) == (zeros, None)


def test_hashes_of_what_is_no_zeros_stay(
    digest_of: Callable[[bytes], hashed.HashedReference],
) -> None:
    """One byte behind the live disk's end, or more than any rounding: the size rule decides."""
    reference = digest_of(b"x" * G + bytes(G - 1) + b"x" + bytes(16 * 255 * 512))
    for size in (G, 2 * G - 512, 2 * G):
        assert sizes.fit(reference, size) == (reference, None)
    assert sizes.fit(reference, 3 * G)[0].size == 3 * G


def test_a_file_is_as_long_as_it_is(tmp_path: pathlib.Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(1000))
    image = images.open(str(disk))
    assert sizes.fit(image, 999) == (image, None)
    image.close()
