# SPDX-License-Identifier: Apache-2.0
"""Manifests: what they hold, that damage is refused, and that they judge like the image itself."""

import errno
import os
import pathlib
import random
import threading
from collections.abc import Iterator

import blake3
import hypothesis
import pytest
from hypothesis import strategies as st

from dirtymap import errors, images
from dirtymap.extent import Extent
from dirtymap.images import base, digest, hashed
from tests.scanner import fakes

MIB = 1 << 20
G = 4096


@pytest.fixture
def disk(tmp_path: pathlib.Path) -> pathlib.Path:
    """Random bytes, a hole, written zeros, random bytes, and an end within a segment."""
    path = tmp_path / "disk.raw"
    content = random.Random(6)
    with open(path, "wb") as stream:
        stream.write(content.randbytes(MIB))
        stream.seek(2 * MIB)
        stream.write(bytes(MIB) + content.randbytes(100_000))
    return path


@pytest.fixture
def manifest(disk: pathlib.Path) -> Iterator[hashed.HashedReference]:
    image = images.open(str(disk))
    digest.write(f"{disk}.digest", image, G)
    image.close()
    reference = digest.open_digest(f"{disk}.digest")
    yield reference
    reference.close()


def segments(path: pathlib.Path, granularity: int = G) -> list[bytes]:
    content = path.read_bytes()
    return [content[at : at + granularity] for at in range(0, len(content), granularity)]


def test_each_segment_equals_itself_and_nothing_else(
    disk: pathlib.Path, manifest: hashed.HashedReference
) -> None:
    assert isinstance(manifest, base.HashedImage)
    assert (manifest.size, manifest.granularity) == (disk.stat().st_size, G)
    for number, content in enumerate(segments(disk)):
        assert manifest.equal(number, memoryview(content))
        changed = bytearray(content)
        changed[number % len(content)] ^= 1
        assert not manifest.equal(number, memoryview(changed))


def test_holes_and_zeros_are_marked_and_have_no_hash(
    disk: pathlib.Path, manifest: hashed.HashedReference
) -> None:
    end = disk.stat().st_size
    assert list(manifest.extents(0, end)) == [
        Extent(0, MIB),
        Extent(MIB, 2 * MIB, zero=True, hole=True),
        Extent(3 * MIB, end - 3 * MIB),
    ]
    assert list(manifest.extents(MIB - 5, 10)) == [
        Extent(MIB - 5, 5),
        Extent(MIB, 5, zero=True, hole=True),
    ]
    assert manifest.entries == sum(any(content) for content in segments(disk))


def test_what_is_told_to_be_zeros_is_not_read(tmp_path: pathlib.Path) -> None:
    image = fakes.MemoryImage(bytearray(b"\1" * G + bytes(8 * G) + b"\2" * 100))
    image.zeros = [(G + 10, 9 * G)]
    summary = digest.write(str(tmp_path / "x.digest"), image, G)
    # Segments 2 to 8 lie whole within what was told.
    assert sorted(image.reads) == [(0, 2 * G), (9 * G, 100)]
    assert (summary.zeros, summary.read) == (8 * G, 2 * G + 100)


def test_the_hashes_are_blake3_as_documented(
    disk: pathlib.Path, manifest: hashed.HashedReference
) -> None:
    """The format's description, read by hand: header, bits, then a hash for each clear bit."""
    raw = pathlib.Path(f"{disk}.digest").read_bytes()
    pieces = segments(disk)
    assert raw[:8] == b"PHDIGEST"
    assert int.from_bytes(raw[20:24], "little") == 12
    assert int.from_bytes(raw[24:32], "little") == disk.stat().st_size
    assert raw[224:256] == blake3.blake3(raw[:224]).digest()
    bits = raw[256 : 256 + -(-len(pieces) // 64) * 8]
    zeros = [bool(bits[at >> 3] >> (at & 7) & 1) for at in range(len(pieces))]
    assert zeros == [not any(content) for content in pieces]
    table = raw[256 + len(bits) :]
    expected = [blake3.blake3(content).digest() for content in pieces if any(content)]
    assert table == b"".join(expected)


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("granularity", [512, 65536, 2 * MIB])
def test_threads_and_granularities_agree(
    disk: pathlib.Path, granularity: int, workers: int
) -> None:
    image = images.open(str(disk))
    path = f"{disk}.digest"
    seen: list[int] = []
    digest.write(path, image, granularity, workers=workers, progress=seen.append)
    image.close()
    assert seen == sorted(seen)
    assert seen[-1] == disk.stat().st_size
    reference = digest.open_digest(path)
    assert all(
        reference.equal(number, memoryview(content))
        for number, content in enumerate(segments(disk, granularity))
    )
    reference.close()


def test_threads_ask_at_the_same_time(disk: pathlib.Path, manifest: hashed.HashedReference) -> None:
    pieces = segments(disk)
    wrong: list[int] = []

    def check(seed: int) -> None:
        for number in random.Random(seed).sample(range(len(pieces)), len(pieces)):
            if not manifest.equal(number, memoryview(pieces[number])):
                wrong.append(number)  # noqa: PERF401 (a thread's only word)

    threads = [threading.Thread(target=check, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_large_sparse_disk_takes_little(tmp_path: pathlib.Path) -> None:
    """More segments than one block of the table: 1 GiB with a byte at each end."""
    path = tmp_path / "disk.raw"
    with open(path, "wb") as stream:
        stream.write(b"a")
        stream.seek((1 << 30) - 1)
        stream.write(b"z")
    image = images.open(str(path))
    summary = digest.write(f"{path}.digest", image, 65536)
    image.close()
    assert summary.length < 5000
    reference = digest.open_digest(f"{path}.digest")
    assert reference.equal(0, memoryview(b"a".ljust(65536, b"\0")))
    assert reference.equal(16383, memoryview(b"z".rjust(65536, b"\0")))
    assert not reference.equal(16382, memoryview(b"z".rjust(65536, b"\0")))
    reference.close()


def test_an_unreadable_segment_equals_nothing(tmp_path: pathlib.Path) -> None:
    """Not even what it may have held: the manifest stays usable, and says how much that is."""
    image = fakes.MemoryImage(bytearray(b"\3" * (10 * G)))
    image.faults = [(4 * G + 5, 4 * G + 6, OSError(errno.EIO, "bad sector"))]
    path = str(tmp_path / "x.digest")
    summary = digest.write(path, image, G)
    assert summary.unreadable == G
    reference = digest.open_digest(path)
    content = memoryview(b"\3" * G)
    assert [reference.equal(number, content) for number in range(10)] == [
        number != 4 for number in range(10)
    ]
    assert not reference.equal(4, memoryview(bytes(G)))
    reference.close()


def test_an_image_that_goes_away_leaves_no_manifest(tmp_path: pathlib.Path) -> None:
    image = fakes.MemoryImage(bytearray(b"\3" * (10 * MIB)))
    image.faults = [(5 * MIB, 6 * MIB, base.GoneError("it is gone"))]
    with pytest.raises(base.GoneError):
        digest.write(str(tmp_path / "x.digest"), image, G)
    assert os.listdir(tmp_path) == []


def test_a_manifest_replaces_the_one_before_at_once(
    disk: pathlib.Path, manifest: hashed.HashedReference
) -> None:
    """Whoever has the old one open keeps it; on failure it stays."""
    path = f"{disk}.digest"
    before = pathlib.Path(path).read_bytes()
    broken = fakes.MemoryImage(bytearray(b"\3" * (10 * G)))
    broken.faults = [(0, 1, base.GoneError("it is gone"))]
    with pytest.raises(base.GoneError):
        digest.write(path, broken, G)
    assert pathlib.Path(path).read_bytes() == before
    digest.write(path, fakes.MemoryImage(bytearray(b"\3" * (10 * G))), G)
    assert manifest.equal(0, memoryview(segments(disk)[0]))


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: pathlib.Path) -> None:
    image = fakes.MemoryImage(bytearray(G))
    with pytest.raises(errors.MapError, match="cannot be written: No such file"):
        digest.write(str(tmp_path / "missing" / "x.digest"), image, G)


def test_what_the_image_has_lost_meanwhile_equals_nothing(disk: pathlib.Path) -> None:
    """Taken for zeros, it would be compared with zeros and called equal."""
    image = images.open(str(disk))
    os.truncate(disk, MIB + G)
    summary = digest.write(f"{disk}.digest", image, G)
    image.close()
    assert summary.unreadable == summary.size - (MIB + G)
    reference = digest.open_digest(f"{disk}.digest")
    assert not reference.equal(2 * MIB // G, memoryview(bytes(G)))
    reference.close()


def test_short_reads_are_continued(
    disk: pathlib.Path, manifest: hashed.HashedReference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One read gives 2 GiB at most: the zeros of 2^34 segments are longer."""
    digest.write(f"{disk}.digest", fakes.MemoryImage(bytearray(disk.read_bytes())), 512)
    real, real_into = os.pread, os.preadv
    monkeypatch.setattr(os, "pread", lambda fd, length, at: real(fd, min(length, 256), at))
    monkeypatch.setattr(os, "preadv", lambda fd, into, at: real_into(fd, [into[0][:256]], at))
    again = digest.open_digest(f"{disk}.digest")
    assert list(again.extents(0, again.size)) == list(manifest.extents(0, manifest.size))
    again.close()


def test_a_cut_manifest_is_refused(disk: pathlib.Path, manifest: hashed.HashedReference) -> None:
    raw = pathlib.Path(f"{disk}.digest").read_bytes()
    path = disk.with_suffix(".digest")
    for length in (0, 7, 8, 200, 255, 256, 300, len(raw) // 2, len(raw) - 1, len(raw) + 1):
        path.write_bytes(raw[:length].ljust(length, b"\0"))
        with pytest.raises(errors.ImageError) as caught:
            images.open_reference(str(path))
        assert str(caught.value).startswith(f"{path}: is ")
        assert "\n" not in str(caught.value)


def test_any_flipped_bit_is_found(disk: pathlib.Path, manifest: hashed.HashedReference) -> None:
    raw = bytearray(pathlib.Path(f"{disk}.digest").read_bytes())
    path = disk.with_suffix(".digest")
    chosen = random.Random(7)
    places = [
        *range(0, 256, 5),
        *(chosen.randrange(256, len(raw)) for _ in range(50)),
        len(raw) - 1,
    ]
    for place in places:
        raw[place] ^= 1 << chosen.randrange(8)
        path.write_bytes(raw)
        with pytest.raises(errors.ImageError):
            images.open_reference(str(path))
        raw = bytearray(pathlib.Path(f"{disk}.digest").read_bytes())


@pytest.mark.parametrize("name", ["x.digest", "x.fidx"])
@pytest.mark.parametrize("make", ["nothing", "text", "directory", "fifo"])
def test_what_is_no_manifest_is_one_line(tmp_path: pathlib.Path, name: str, make: str) -> None:
    path = tmp_path / name
    if make == "text":
        path.write_text("hello\n" * 10_000)
    elif make == "directory":
        path.mkdir()
    elif make == "fifo":
        os.mkfifo(path)
    with pytest.raises(errors.ImageError) as caught:
        images.open_reference(str(path))
    assert "\n" not in str(caught.value)


def test_a_raw_disk_may_be_named_like_a_manifest(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "disk.digest"
    path.write_bytes(b"x" * 1000)
    image = images.open_reference(f"raw:{path}")
    assert image.size == 1000
    image.close()


def test_reading_a_manifest_as_a_disk_is_an_error(manifest: hashed.HashedReference) -> None:
    with pytest.raises(OSError, match="hashes only"):
        manifest.read_into(0, memoryview(bytearray(10)))
    with pytest.raises(ValueError, match="100 bytes for segment 0"):
        manifest.equal(0, memoryview(bytes(100)))


@hypothesis.settings(max_examples=50)
@hypothesis.given(
    st.lists(st.sampled_from([b"\0", b"a", b"b"]), min_size=1, max_size=60),
    st.integers(1, 512),
    st.data(),
)
def test_a_manifest_judges_like_the_image(
    tmp_path_factory: pytest.TempPathFactory, kinds: list[bytes], last: int, data: st.DataObject
) -> None:
    """Random contents and a random later state: equal says exactly where they agree."""
    path = str(tmp_path_factory.getbasetemp() / "property.digest")
    content = b"".join(kind * 512 for kind in kinds)[: len(kinds) * 512 - 512 + last]
    digest.write(path, fakes.MemoryImage(bytearray(content)), 512)
    later = data.draw(st.lists(st.sampled_from(kinds), min_size=len(kinds), max_size=len(kinds)))
    reference = digest.open_digest(path)
    for number, (before, now) in enumerate(zip(kinds, later, strict=True)):
        length = min(512, len(content) - number * 512)
        assert reference.equal(number, memoryview(now * length)) == (before == now)
    covered = {
        at for e in reference.extents(0, len(content)) if e.zero for at in range(e.start, e.end)
    }
    assert covered == {at for at, byte in enumerate(content) if byte == 0}
    reference.close()
