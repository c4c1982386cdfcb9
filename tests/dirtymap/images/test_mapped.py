# SPDX-License-Identifier: Apache-2.0
"""Reading a format straight from its files gives what QEMU gives."""

import contextlib
import os
import pathlib
import random
from collections.abc import Iterator

import pytest

from dirtymap import images
from dirtymap.images import base, export, mapped
from tests import qemu

MIB = 1 << 20
K = 1 << 10
SIZE = 6 * MIB


@contextlib.contextmanager
def opened(spec: str, *, read_all: bool = False) -> Iterator[mapped.MappedImage]:
    image = images.open(spec, options=images.Options(read_all=read_all))
    try:
        assert isinstance(image, mapped.MappedImage)
        yield image
    finally:
        image.close()


def read(image: base.Image, start: int = 0, length: int | None = None) -> bytes:
    # Filled before: what is not written by the read shows.
    buffer = bytearray(b"\xee") * (image.size - start if length is None else length)
    image.read_into(start, memoryview(buffer))
    return bytes(buffer)


@pytest.fixture(autouse=True)
def worth(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first read of a window maps it, however small the image."""
    monkeypatch.setattr(mapped, "_WORTH", 1)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """What was read through qemu-nbd after all."""
    found: list[tuple[int, int]] = []
    real = export.NbdImage.read_into

    def noted(self: export.NbdImage, start: int, buffer: memoryview) -> None:
        found.append((start, len(buffer)))
        real(self, start, buffer)

    monkeypatch.setattr(export.NbdImage, "read_into", noted)
    return found


def scatter(path: pathlib.Path, seed: int, kind: str = "qcow2") -> None:
    """Write, zero and discard at random places of an image."""
    chosen = random.Random(seed)
    commands = []
    for _ in range(30):
        start = chosen.randrange(SIZE // 512 - 300) * 512
        length = chosen.choice((512, 4096, 65536, 150_016))
        verb = chosen.choice(("write -P 17", "write -P 99", "write -z", "write -z -u", "discard"))
        commands.append(f"{verb} {start} {length}")
    qemu.io(path, *commands, format=kind, options=["-d", "unmap"])


VARIANTS = {
    "plain": None,
    "clusters-of-4-KiB": "cluster_size=4k",
    "clusters-of-2-MiB": "cluster_size=2M",
    "version-2": "compat=0.10",
    "subclusters": "extended_l2=on,cluster_size=64k",
    "preallocated": "preallocation=falloc",
    "lazy-refcounts": "lazy_refcounts=on",
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_every_kind_of_qcow2_reads_as_qemu_reads_it(
    tmp_path: pathlib.Path, options: str | None
) -> None:
    path = tmp_path / "disk.qcow2"
    qemu.create(path, SIZE, "qcow2", options=options)
    scatter(path, 1)
    with opened(f"qcow2:{path}", read_all=True) as judge, opened(f"qcow2:{path}") as image:
        expected = read(judge)
        assert any(expected)
        assert read(image) == expected
        gently = bytearray(b"\xee") * SIZE
        image.read_gently(0, memoryview(gently))
        assert gently == expected
        chosen = random.Random(2)
        for _ in range(100):
            start = chosen.randrange(SIZE - 1)
            length = min(chosen.choice((1, 511, 70_000, MIB)), SIZE - start)
            assert read(image, start, length) == expected[start : start + length]


def test_a_chain_reads_each_piece_from_its_own_file(
    tmp_path: pathlib.Path, served: list[tuple[int, int]]
) -> None:
    """A raw base, a shorter layer, and one on top: nothing of it goes through qemu-nbd."""
    (tmp_path / "base.raw").write_bytes(random.Random(3).randbytes(SIZE - 100 * K))
    qemu.create(tmp_path / "middle", 5 * MIB, "qcow2", backing=("base.raw", "raw"))
    qemu.io(tmp_path / "middle", "write -P 1 1M 300k", "write -z 2M 300k", format="qcow2")
    qemu.create(tmp_path / "top", SIZE, "qcow2", backing=("middle", "qcow2"))
    qemu.io(tmp_path / "top", "write -P 2 1100k 64k", "write -P 3 5632k 4k", format="qcow2")
    spec = f"qcow2:{tmp_path}/top"
    with opened(spec, read_all=True) as judge, opened(spec) as image:
        expected = read(judge)
        served.clear()
        assert read(image) == expected
        assert served == []


@pytest.mark.parametrize("kind", ["vdi", "vpc", "vmdk", "vhdx"])
def test_other_formats_read_as_qemu_reads_them(tmp_path: pathlib.Path, kind: str) -> None:
    path = tmp_path / "disk"
    qemu.create(path, SIZE, kind)
    qemu.io(path, "write -P 5 1M 300k", "write -P 6 4000k 4k", "write -z 1100k 64k", format=kind)
    spec = f"{kind}:{path}"
    with opened(spec, read_all=True) as judge, opened(spec) as image:
        assert read(image) == read(judge)


def test_compressed_clusters_are_left_to_qemu(
    tmp_path: pathlib.Path, served: list[tuple[int, int]]
) -> None:
    raw, path = tmp_path / "raw", tmp_path / "disk"
    raw.write_bytes(b"compress me " * 100_000)
    qemu.img("convert", "-c", "-f", "raw", "-O", "qcow2", raw, path)
    qemu.io(path, "write -P 7 0 64k", format="qcow2")
    with opened(f"qcow2:{path}") as image:
        content = read(image)
        assert content[: 64 * K] == b"\7" * 64 * K
        assert content[64 * K : raw.stat().st_size] == raw.read_bytes()[64 * K :]
        assert min(start for start, _ in served) == 64 * K


def test_an_external_data_file_is_left_to_qemu(
    tmp_path: pathlib.Path, served: list[tuple[int, int]]
) -> None:
    """The map gives offsets in that file, under the depth of the header's."""
    path = tmp_path / "disk"
    qemu.create(path, SIZE, "qcow2", options=f"data_file={tmp_path}/data")
    qemu.io(path, "write -P 7 0 64k", "write -P 8 4M 64k", format="qcow2")
    with opened(f"qcow2:{path}") as image:
        content = read(image)
        assert content[: 64 * K] == b"\7" * 64 * K
        assert content[4 * MIB : 4 * MIB + 64 * K] == b"\x08" * 64 * K
        assert served


def test_an_image_opened_for_writing_is_never_read_past_its_server(
    tmp_path: pathlib.Path,
) -> None:
    qemu.create(tmp_path / "disk", SIZE, "qcow2")
    image = images.open(f"qcow2:{tmp_path}/disk", writable=True)
    assert not isinstance(image, mapped.MappedImage)
    image.close()


@pytest.mark.parametrize("when", ["before-it-is-opened-here", "before-it-is-mapped"])
@pytest.mark.parametrize("name", ["top", "below"])
def test_a_file_put_in_a_layers_place_is_not_read(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, when: str, name: str
) -> None:
    """A name may come to mean another file at any time; neither its bytes nor its map are ours."""
    qemu.create(tmp_path / "below", SIZE, "qcow2")
    qemu.io(tmp_path / "below", "write -P 6 0 1M", format="qcow2")
    qemu.create(tmp_path / "top", SIZE, "qcow2", backing=(tmp_path / "below", "qcow2"))
    qemu.io(tmp_path / "top", "write -P 7 0 64k", format="qcow2")

    def replace() -> None:
        os.rename(tmp_path / name, tmp_path / "away")
        qemu.create(tmp_path / name, SIZE, "qcow2")

    real = mapped.MappedImage.use_map

    def late(self: mapped.MappedImage, layers: object) -> None:
        replace()
        real(self, layers)  # type: ignore[arg-type]

    if when == "before-it-is-opened-here":
        monkeypatch.setattr(mapped.MappedImage, "use_map", late)
    with opened(f"qcow2:{tmp_path}/top") as image:
        if when == "before-it-is-mapped":
            replace()
        assert read(image, 0, MIB) == b"\7" * 64 * K + b"\6" * (MIB - 64 * K)


@pytest.mark.parametrize("script", ["exit 1", "echo nonsense", "kill -9 $$"])
def test_without_a_map_all_goes_through_the_server(
    tmp_path: pathlib.Path,
    served: list[tuple[int, int]],
    monkeypatch: pytest.MonkeyPatch,
    script: str,
) -> None:
    path, tool = tmp_path / "disk", tmp_path / "qemu-img"
    qemu.create(path, SIZE, "qcow2")
    qemu.io(path, "write -P 7 0 64k", format="qcow2")
    with opened(f"qcow2:{path}") as image:
        tool.write_text(f"#!/bin/sh\n{script}\n")
        tool.chmod(0o700)
        monkeypatch.setenv("POSTHOC_QEMU_IMG", str(tool))
        assert read(image, 0, 64 * K) == b"\7" * 64 * K
        assert served == [(0, 64 * K)]


def test_windows_meet_without_a_seam(
    tmp_path: pathlib.Path, served: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mapped, "_LARGEST_WINDOW", 100 * K)
    path = tmp_path / "disk"
    qemu.create(path, SIZE, "qcow2")
    scatter(path, 4)
    with opened(f"qcow2:{path}", read_all=True) as judge, opened(f"qcow2:{path}") as image:
        expected = read(judge)
        served.clear()
        assert read(image) == expected
        assert read(image, 90 * K, 30 * K) == expected[90 * K : 120 * K]
        assert served == []


def test_gaps_in_a_map_are_left_to_qemu() -> None:
    window = mapped._Window([(100, 200, 0, 5), (300, 400, 0, 105)])
    found = [(found.start, found.end, found.depth) for found in window.within(50, 350)]
    assert found == [
        (50, 100, mapped._ELSEWHERE),
        (100, 200, 0),
        (200, 300, mapped._ELSEWHERE),
        (300, 400, 0),
    ]
    assert [found.depth for found in mapped._Window([]).within(0, 10)] == [mapped._ELSEWHERE]


def test_a_sample_is_not_worth_a_map(
    tmp_path: pathlib.Path, served: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asking for the map costs more than a few reads; where much is read, it is asked for once."""
    monkeypatch.setattr(mapped, "_WORTH", 100 * K)
    path = tmp_path / "disk"
    qemu.create(path, SIZE, "qcow2")
    qemu.io(path, "write -P 7 0 1M", format="qcow2")
    with opened(f"qcow2:{path}") as image:
        for _ in range(4):
            assert read(image, 0, 30 * K) == b"\7" * 30 * K
    assert served == [(0, 30 * K)] * 3


def test_memory_holds_a_few_windows_only(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mapped, "_LARGEST_WINDOW", 100 * K)
    path = tmp_path / "disk"
    qemu.create(path, SIZE, "qcow2")
    scatter(path, 5)
    with opened(f"qcow2:{path}", read_all=True) as judge, opened(f"qcow2:{path}") as image:
        assert read(image) == read(judge)
        assert read(image) == read(judge)
        assert image._map is not None
        assert len(image._map._windows) == len(image._map._read) == mapped._KEPT
