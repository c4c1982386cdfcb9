# SPDX-License-Identifier: Apache-2.0
"""Writing a map file: the whole new one or what was there before."""

import errno
import os
import pathlib
import subprocess
import sys

import pytest

from dirtymap import bitmap, errors
from dirtymap.images import digest
from dirtymap.qcow2 import atomic, carrier
from tests import qemu
from tests.dirtymap.qcow2 import parts
from tests.scanner import fakes

GIB = 1 << 30


def scattered(size: int = GIB) -> bitmap.Bitmap:
    made = bitmap.Bitmap(size, 512)
    made.data[::97] = 5
    return made


def one_line(path: pathlib.Path | str, made: bitmap.Bitmap | None = None) -> str:
    with pytest.raises(errors.MapError) as caught:
        carrier.write(path, made or bitmap.Bitmap(GIB, 65536))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_file_is_its_owner_s_only_and_nothing_else_stays(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "map.qcow2"
    carrier.write(path, bitmap.Bitmap(GIB, 65536))
    assert path.stat().st_mode & 0o7777 == 0o600
    assert os.listdir(tmp_path) == ["map.qcow2"]


def test_a_map_is_replaced_while_readers_keep_the_old_one(tmp_path: pathlib.Path) -> None:
    """A rename: who has the old file open reads it to its end."""
    path = tmp_path / "map.qcow2"
    carrier.write(path, bitmap.Bitmap(GIB, 65536))
    old = path.read_bytes()
    with path.open("rb") as reader:
        carrier.write(path, scattered())
        assert reader.read() == old
    assert carrier.read(path) == scattered()


def test_a_name_without_a_folder_is_in_this_one(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    carrier.write("map.qcow2", scattered())
    assert carrier.read("map.qcow2") == scattered()


@pytest.mark.parametrize("kind", ["folder", "pipe", "link", "device"])
def test_only_a_regular_file_is_replaced(tmp_path: pathlib.Path, kind: str) -> None:
    path = tmp_path / "x"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path = pathlib.Path("/dev/null")
    else:
        (tmp_path / "target").write_text("kept")
        path.symlink_to(tmp_path / "target")
    before = os.lstat(path)
    assert str(path) in one_line(path)
    assert os.lstat(path).st_ino == before.st_ino
    assert os.lstat(path).st_mode == before.st_mode


def test_a_folder_that_is_missing_is_one_line(tmp_path: pathlib.Path) -> None:
    assert "No such file" in one_line(tmp_path / "none" / "map.qcow2")


def test_a_disk_is_never_replaced_by_a_map(tmp_path: pathlib.Path) -> None:
    """A slip on the command line must not cost a virtual machine's disk."""
    path = tmp_path / "disk.qcow2"
    qemu.create(path, GIB, "qcow2")
    qemu.io(path, "write -P 7 1M 64k", format="qcow2")
    before = path.read_bytes()
    assert "holds a disk's data" in one_line(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("kind", ["metadata", "overlay", "snapshot"])
def test_a_qcow2_that_names_a_disk_s_data_is_never_replaced(
    tmp_path: pathlib.Path, kind: str
) -> None:
    """No data of its own, but the way to them: a data file, a backing file, a snapshot."""
    path, base = tmp_path / "disk.qcow2", tmp_path / "base.qcow2"
    qemu.create(base, GIB, "qcow2")
    options = f"data_file={tmp_path}/data" if kind == "metadata" else None
    backing = (base, "qcow2") if kind == "overlay" else None
    qemu.create(path, GIB, "qcow2", options=options, backing=backing)
    if kind == "snapshot":
        qemu.img("snapshot", "-c", "one", path)
    before = path.read_bytes()
    assert "holds a disk's data" in one_line(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "kind", ["raw", "vmdk", "version-2", "corrupt", "unknown-feature", "no-bitmap", "damaged-map"]
)
def test_what_is_not_surely_a_map_is_never_replaced(tmp_path: pathlib.Path, kind: str) -> None:
    """Whatever cannot be read as a map may be somebody's only copy of a disk."""
    path = tmp_path / "disk"
    format_ = kind if kind in ("raw", "vmdk") else "qcow2"
    qemu.create(path, 16 << 20, format_, options="compat=0.10" if kind == "version-2" else None)
    if kind == "damaged-map":
        parts.change_entry(parts.made(tmp_path / "map"), type=2)
        (tmp_path / "map").rename(path)
    elif kind != "no-bitmap":
        qemu.io(path, "write -P 7 1M 64k", format=format_)
    if kind in ("corrupt", "unknown-feature"):
        parts.change_header(path, incompatible_features=2 if kind == "corrupt" else 1 << 40)
    before = path.read_bytes()
    assert "no map that could be replaced" in one_line(path)
    assert path.read_bytes() == before


def test_an_empty_file_is_replaced(tmp_path: pathlib.Path) -> None:
    """As mktemp leaves it."""
    path = tmp_path / "map.qcow2"
    path.touch()
    carrier.write(path, scattered())
    assert carrier.read(path) == scattered()


def test_what_may_not_be_read_is_not_replaced(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder's owner may rename over a file of another's, and cannot know what it is."""
    path = parts.made(tmp_path / "map.qcow2")
    real = os.open

    def refuse(name: str | pathlib.Path, *words: int, **more: int) -> int:
        if name == path:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), name)
        return real(name, *words, **more)

    monkeypatch.setattr(os, "open", refuse)
    assert "Permission denied" in one_line(path)


def test_a_full_disk_leaves_the_old_map(tmp_path: pathlib.Path) -> None:
    """One line, the old file as it was, nothing beside it."""
    with parts.small_filesystem(tmp_path, 2 << 20) as folder:
        path = folder / "map.qcow2"
        carrier.write(path, bitmap.Bitmap(GIB, 65536))
        before, names = path.read_bytes(), os.listdir(folder)
        assert "No space left" in one_line(path, scattered(16 * GIB))
        assert os.listdir(folder) == names
        assert path.read_bytes() == before


def test_a_write_that_fails_half_way_leaves_nothing(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it is that fails, a Ctrl-C included."""
    calls: list[int] = []

    def interrupted(descriptor: int, start: int, data: memoryview) -> None:
        calls.append(start)
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(atomic, "write_all", interrupted)
    with pytest.raises(KeyboardInterrupt):
        carrier.write(tmp_path / "map.qcow2", scattered())
    assert os.listdir(tmp_path) == []


def test_the_header_is_written_last(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what is written is on disk before the name is: fsync, rename, fsync of the folder."""
    order: list[str] = []

    def write_all(descriptor: int, start: int, data: memoryview) -> None:
        order.append("header" if start == 0 else "part")

    monkeypatch.setattr(atomic, "write_all", write_all)
    for name in ("fsync", "rename"):
        real = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *words, n=name, r=real: (order.append(n), r(*words))[1]
        )
    carrier.write(tmp_path / "map.qcow2", scattered())
    assert order[-4:] == ["header", "fsync", "rename", "fsync"]
    assert set(order[:-4]) == {"part"}


def test_a_folder_that_cannot_be_synced_is_told_with_the_map_in_place(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rename is done by then: nobody may believe that the old map is still there."""

    def fail(folder: str) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(atomic, "sync_folder", fail)
    path, made = tmp_path / "map.qcow2", scattered()
    told = "is in place, but may not survive a power failure: Input/output error"
    assert one_line(path, made) == f"{path}: {told}"
    assert carrier.read(path) == made
    with pytest.raises(errors.MapError) as caught:
        digest.write(f"{path}.digest", fakes.MemoryImage(bytearray(512)), 512)
    assert str(caught.value) == f"{path}.digest: {told}"
    digest.open_digest(f"{path}.digest").close()


def test_short_writes_are_continued(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One pwrite may take less than it was given."""
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, start: real(fd, data[:5000], start))
    carrier.write(tmp_path / "map.qcow2", scattered())
    assert carrier.read(tmp_path / "map.qcow2") == scattered()


def test_writers_of_one_name_never_mix(tmp_path: pathlib.Path) -> None:
    """Each has a temporary of its own: the last rename wins, whole."""
    path = tmp_path / "map.qcow2"
    script = (
        "import sys; from dirtymap import bitmap; from dirtymap.qcow2 import carrier\n"
        "made = bitmap.Bitmap(1 << 30, 512); made.set(int(sys.argv[1]), 1000)\n"
        "for _ in range(20): carrier.write(sys.argv[2], made)\n"
    )
    writers = [
        subprocess.Popen([sys.executable, "-c", script, str(number), str(path)])
        for number in (100, 200)
    ]
    assert [writer.wait(qemu.TIMEOUT) for writer in writers] == [0, 0]
    qemu.check(path)
    assert list(carrier.read(path).runs()) in ([(100, 1000)], [(200, 1000)])
    assert os.listdir(tmp_path) == ["map.qcow2"]
