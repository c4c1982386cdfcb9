# SPDX-License-Identifier: Apache-2.0
"""The judges are judged first: an oracle or a helper that sees nothing would pass every test."""

import pathlib

import pytest

from tests import oracle, qemu

KIB = 1024


def write(path: pathlib.Path, content: bytes | bytearray) -> pathlib.Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("live", "reference", "expected"),
    [
        pytest.param(bytes(2048), bytes(2048), set(), id="identical"),
        pytest.param(bytes(511) + b"x" + bytes(1536), bytes(2048), {0}, id="last-byte-of-segment"),
        pytest.param(bytes(512) + b"x" + bytes(1535), bytes(2048), {1}, id="first-byte-of-segment"),
        pytest.param(bytes(1024) + b"x", bytes(1025), {2}, id="last-partial-segment"),
        pytest.param(b"a" * 1536, b"a" * 600, {1, 2}, id="reference-shorter"),
        pytest.param(bytes(1536), b"", set(), id="zeros-beyond-reference"),
        pytest.param(b"a" * 512, b"a" * 512 + b"b" * 512, set(), id="live-shorter"),
    ],
)
def test_oracle_names_the_segments_that_differ(
    tmp_path: pathlib.Path, live: bytes, reference: bytes, expected: set[int]
) -> None:
    """Every byte counts, and what a shorter reference lacks reads as zeros."""
    one = write(tmp_path / "live", live)
    other = write(tmp_path / "reference", reference)
    assert oracle.differing(one, other, 512) == expected
    assert oracle.ModelDisk.of(one, 512).differing(reference) == expected


def test_oracle_counts_on_beyond_its_first_piece(tmp_path: pathlib.Path) -> None:
    """Segment numbers go on where a file is read in several pieces."""
    content = bytearray(3 << 20)
    reference = write(tmp_path / "reference", content)
    content[2 << 20] = 1
    live = write(tmp_path / "live", content)
    assert oracle.differing(live, reference, 64 * KIB) == {32}


def test_model_disk_remembers_the_segments_written() -> None:
    """A write marks what it touches, also where it writes what was there."""
    disk = oracle.ModelDisk(bytearray(4096), 512)
    disk.write(500, b"\0" * 20)
    disk.zero(2048, 0)
    disk.write(4095, b"x")
    assert disk.written == {0, 1, 7}
    assert disk.differing(bytes(4096)) == {7}
    assert disk.read(4094, 2) == b"\0x"


def test_dirty_segments_are_what_qemu_recorded(tmp_path: pathlib.Path) -> None:
    """A bitmap that QEMU itself kept comes back through qemu-nbd and nbdinfo."""
    image = tmp_path / "image.qcow2"
    qemu.create(image, 1 << 20, "qcow2")
    qemu.img("bitmap", "--add", "-g", "64k", image, "b 1")
    qemu.io(image, "write -P 1 100k 100k", "write -P 2 1023k 1k", format="qcow2")
    assert qemu.dirty_segments(image, 64 * KIB, "b 1") == {1, 2, 3, 15}
    assert qemu.dirty_extents(image, "b 1") == [(64 * KIB, 192 * KIB), (960 * KIB, 64 * KIB)]
    assert [b["name"] for b in qemu.bitmaps(image)] == ["b 1"]
    qemu.check(image)


def test_qemu_io_that_fails_is_noticed(tmp_path: pathlib.Path) -> None:
    """qemu-io exits 0 when a pattern is not there; the helper does not."""
    image = tmp_path / "image"
    qemu.create(image, 64 * KIB)
    qemu.io(image, "write -P 1 0 4k", "read -P 1 0 4k")
    with pytest.raises(AssertionError):
        qemu.io(image, "read -P 2 0 4k")
    with pytest.raises(AssertionError):
        qemu.io(image, "read 1M 4k")


def test_compare_tells_identical_from_different(tmp_path: pathlib.Path) -> None:
    """qemu-img compare is asked about contents, whatever the format."""
    raw, converted = tmp_path / "raw", tmp_path / "converted"
    raw.write_bytes(b"a" * 64 * KIB)
    qemu.convert(raw, converted, "qcow2")
    assert qemu.identical(raw, converted, ("raw", "qcow2"))
    qemu.io(converted, "write -P 1 0 512", format="qcow2")
    assert not qemu.identical(raw, converted, ("raw", "qcow2"))


@pytest.mark.parametrize("format", ["luks", "qcow2"])
def test_encrypted_image_is_made(tmp_path: pathlib.Path, format: str) -> None:  # noqa: A002
    """LUKS images are made even where qemu-img cannot time its hashing at first."""
    image = tmp_path / "image"
    qemu.create_encrypted(image, 64 * KIB, "secret", format)
    assert qemu.info(image, format)["encrypted"] is True


def test_a_file_with_a_bad_sector(tmp_path: pathlib.Path) -> None:
    """nbdfuse over nbdkit's error filter gives EIO to a read of the file."""
    image = write(tmp_path / "image", b"a" * 64 * KIB)
    bad = tmp_path / "bad"
    arguments = ["file", str(image), "error-pread-rate=100%", f"error-file={bad}"]
    with (
        qemu.nbdkit(*arguments, filters=["error"]) as address,
        qemu.nbdfuse(address, tmp_path / "fuse") as file,
    ):
        assert file.stat().st_size == 64 * KIB
        bad.touch()
        with pytest.raises(OSError, match="Input/output error"):
            file.read_bytes()


def test_file_system_on_a_loop_device(tmp_path: pathlib.Path) -> None:
    """ext4 is made, mounted, written and found sound on a loop device."""
    image = tmp_path / "image"
    qemu.create(image, 16 << 20)
    with qemu.loop_device(image) as device:
        qemu.mkfs_ext4(device)
        with qemu.mounted(device, tmp_path / "mnt") as folder:
            (folder / "file").write_text("text")
        qemu.fsck_ext4(device)
    assert oracle.size_of(image) == 16 << 20
