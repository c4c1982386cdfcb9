# SPDX-License-Identifier: Apache-2.0
"""Proxmox Backup Server's fixed index, written here as its source describes it."""

import hashlib
import pathlib
import random
import struct

import pytest

from dirtymap import errors, images
from dirtymap.extent import Extent
from dirtymap.images import base

CHUNK = 4 << 20
SIZE = 3 * CHUNK + 12345


def content() -> bytes:
    """A chunk of random bytes, one of zeros, random bytes again, and a part of a chunk."""
    chosen = random.Random(8)
    return chosen.randbytes(CHUNK) + bytes(CHUNK) + chosen.randbytes(CHUNK + 12345)


def index(data: bytes, chunk: int = CHUNK) -> bytes:
    digests = b"".join(
        hashlib.sha256(data[at : at + chunk]).digest() for at in range(0, len(data), chunk)
    )
    header = bytes([47, 127, 65, 237, 145, 253, 15, 205]) + bytes(16) + struct.pack("<q", 1)
    header += hashlib.sha256(digests).digest() + struct.pack("<QQ", len(data), chunk)
    return header.ljust(4096, b"\0") + digests


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    made = tmp_path_factory.mktemp("fidx") / "drive-scsi0.img.fidx"
    made.write_bytes(index(content()))
    return made


def test_each_chunk_equals_itself_and_nothing_else(path: pathlib.Path) -> None:
    reference = images.open_reference(str(path))
    assert isinstance(reference, base.HashedImage)
    assert (reference.size, reference.granularity) == (SIZE, CHUNK)
    data = content()
    for number in range(4):
        chunk = bytearray(data[number * CHUNK : (number + 1) * CHUNK])
        assert reference.equal(number, memoryview(chunk))
        chunk[-1] ^= 1
        assert not reference.equal(number, memoryview(chunk))
    reference.close()


def test_a_chunk_of_zeros_is_known_by_its_hash(path: pathlib.Path) -> None:
    reference = images.open_reference(str(path))
    assert list(reference.extents(0, SIZE)) == [
        Extent(0, CHUNK),
        Extent(CHUNK, CHUNK, zero=True, hole=True),
        Extent(2 * CHUNK, SIZE - 2 * CHUNK),
    ]
    reference.close()


def test_an_encrypted_backups_index_finds_everything_different(tmp_path: pathlib.Path) -> None:
    """Its hashes are keyed, which nothing tells: needless reading, never a missed change."""
    path = tmp_path / "x.fidx"
    keyed = b"".join(hashlib.sha256(bytes([at]) + b"key").digest() for at in range(4))
    raw = bytearray(index(content()))
    raw[4096:] = keyed
    raw[32:64] = hashlib.sha256(keyed).digest()
    path.write_bytes(raw)
    reference = images.open_reference(str(path))
    assert isinstance(reference, base.HashedImage)
    data = content()
    for number in range(4):
        chunk = data[number * CHUNK : (number + 1) * CHUNK]
        assert not reference.equal(number, memoryview(chunk))
    reference.close()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        pytest.param(lambda raw: raw[:4200], "cut short", id="cut"),
        pytest.param(lambda raw: raw[:100], "cut short", id="cut-in-the-header"),
        pytest.param(lambda raw: raw + b"\0", "longer", id="longer"),
        pytest.param(lambda raw: b"x" + raw[1:], "no fixed index", id="foreign"),
        pytest.param(lambda raw: raw[:-1] + bytes([raw[-1] ^ 1]), "damaged", id="flipped-bit"),
        pytest.param(
            lambda raw: raw[:72] + struct.pack("<Q", 3) + raw[80:], "chunks of 3", id="odd-chunks"
        ),
        pytest.param(lambda raw: raw[:64] + bytes(8) + raw[72:], "of 0 bytes", id="no-size"),
        pytest.param(lambda raw: raw[:64] + b"\xff" * 8 + raw[72:], "cut short", id="vast-size"),
    ],
)
def test_a_damaged_index_is_refused(
    path: pathlib.Path, tmp_path: pathlib.Path, damage: object, reason: str
) -> None:
    broken = tmp_path / "x.fidx"
    broken.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    with pytest.raises(errors.ImageError, match=reason) as caught:
        images.open_reference(str(broken))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("chunk", [128 << 20, 1 << 62])
def test_chunks_larger_than_anybody_makes_are_refused(tmp_path: pathlib.Path, chunk: int) -> None:
    """A chunk is held in memory by each thread: a header must not choose how much that is."""
    path = tmp_path / "x.fidx"
    path.write_bytes(index(b"x", chunk))
    with pytest.raises(errors.ImageError, match=f"chunks of {chunk}: not possible"):
        images.open_reference(str(path))
