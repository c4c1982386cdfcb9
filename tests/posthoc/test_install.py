# SPDX-License-Identifier: Apache-2.0
"""posthoc install: a map into a disk's persistent bitmap, and what must stay as it was."""

import contextlib
import hashlib
import json
import os
import pathlib
import signal
import stat
import subprocess
import tempfile
from collections.abc import Sequence

import pytest

from dirtymap import bitmap, errors
from dirtymap.qcow2 import carrier
from posthoc import cli
from posthoc.qemu import handover, qemu_img
from tests import command, qemu, wait
from tests.dirtymap.qcow2 import parts

MIB = 1 << 20
SIZE = 64 * MIB


def dirty(*segments: int, size: int = SIZE, granularity: int = 65536) -> bitmap.Bitmap:
    made = bitmap.Bitmap(size, granularity)
    for segment in segments:
        made.set(segment)
    return made


def map_of(folder: pathlib.Path, made: bitmap.Bitmap) -> str:
    path = folder / "map.qcow2"
    carrier.write(path, made)
    return str(path)


def disk_of(folder: pathlib.Path, options: str | None = None) -> pathlib.Path:
    """A qcow2 disk with some data and a bitmap of its own, `daily`, with its first segment set."""
    path = folder / "disk.qcow2"
    qemu.create(path, SIZE, "qcow2", options=options)
    qemu.img("bitmap", "--add", "-g", "65536", path, "daily")
    qemu.io(path, "write -P 7 0 64k", format="qcow2")
    return path


def install(*words: str) -> int:
    return cli.main(["install", *words])


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line that `posthoc install` says when it exits with 2."""
    capsys.readouterr()
    assert install(*words) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1, printed.err
    assert printed.out == ""
    return printed.err


def snapshot(path: pathlib.Path) -> dict[str, tuple[bool, list[tuple[int, int]]]]:
    """What bitmaps an image has: name -> (recording, runs)."""
    return {
        found.name: (found.recording, list(carrier.read(path, found.name).runs()))
        for found in carrier.names(path)
    }


DAILY = {"daily": (True, [(0, 1)])}


# Into a qcow2


def test_a_qcow2_has_exactly_the_map_and_goes_on_recording(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """QEMU reads the bits of the map; what is written afterwards is added to them."""
    disk = disk_of(tmp_path)
    made = dirty(3, 4, 1023)
    assert install(map_of(tmp_path, made), f"qcow2:{disk}", "--bitmap", "found it") == 0
    assert "'found it' is recording" in capsys.readouterr().out
    assert qemu.dirty_segments(disk, 65536, "found it") == {3, 4, 1023}
    qemu.check(disk)
    qemu.io(disk, "write 1M 64k", format="qcow2")
    assert qemu.dirty_segments(disk, 65536, "found it") == {3, 4, 16, 1023}
    assert qemu.dirty_segments(disk, 65536, "daily") == {0, 16}
    qemu.io(disk, "read -P 7 0 64k", format="qcow2")


@pytest.mark.parametrize("granularity", [512, 4096, 65536, 2 * MIB])
def test_the_bitmap_has_the_map_s_granularity(tmp_path: pathlib.Path, granularity: int) -> None:
    disk = disk_of(tmp_path)
    made = dirty(1, 7, granularity=granularity)
    handover.install(made, str(disk), "b")
    assert carrier.read(disk, "b") == made
    qemu.check(disk)


def test_json_says_what_was_installed(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    disk = disk_of(tmp_path)
    source = map_of(tmp_path, dirty(3))
    assert install("--json", source, f"qcow2:{disk}", "--bitmap", "b") == 0
    assert json.loads(capsys.readouterr().out) == {
        "image": str(disk),
        "bitmap": "b",
        "size": SIZE,
        "granularity": 65536,
        "dirty": 65536,
        "recording": True,
    }


@pytest.mark.parametrize("name", ["-f", "a,b=c", "ü/ ", "x" * 1023], ids=ascii)
def test_any_name_and_any_path_reach_qemu_as_they_are(tmp_path: pathlib.Path, name: str) -> None:
    """No option, no list of options, no protocol."""
    folder = tmp_path / "nbd:a,b"
    folder.mkdir()
    disk = disk_of(folder)
    handover.install(dirty(3), str(disk), name)
    assert carrier.read(disk, name) == dirty(3)


@pytest.mark.parametrize(
    "options",
    ["cluster_size=512", "cluster_size=2M", "extended_l2=on", "lazy_refcounts=on"],
)
def test_every_kind_of_qcow2_takes_it(tmp_path: pathlib.Path, options: str) -> None:
    disk = disk_of(tmp_path, options)
    handover.install(dirty(3, 900), str(disk), "b")
    assert snapshot(disk) == {**DAILY, "b": (True, [(3, 1), (900, 1)])}
    qemu.check(disk)


def test_an_overlay_and_a_data_file_take_it(tmp_path: pathlib.Path) -> None:
    base, disk = tmp_path / "base.qcow2", tmp_path / "disk.qcow2"
    qemu.create(base, SIZE, "qcow2")
    qemu.create(disk, SIZE, "qcow2", options=f"data_file={tmp_path}/data", backing=(base, "qcow2"))
    before = base.read_bytes()
    handover.install(dirty(3), str(disk), "b")
    assert carrier.read(disk) == dirty(3)
    assert base.read_bytes() == before


def test_an_odd_map_fits_a_disk_of_whole_sectors(tmp_path: pathlib.Path) -> None:
    """A map in memory may still have the raw disk's own size."""
    disk = tmp_path / "disk.qcow2"
    qemu.create(disk, 1_000_448, "qcow2")
    handover.install(dirty(1953, size=1_000_001, granularity=512), str(disk), "b")
    assert list(carrier.read(disk).runs()) == [(1953, 1)]


# Refused, and nothing has changed


def test_a_bitmap_of_that_name_is_not_touched(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    disk = disk_of(tmp_path)
    before = disk.read_bytes()
    said = refused(capsys, map_of(tmp_path, dirty(3)), f"qcow2:{disk}", "--bitmap", "daily")
    assert "--replace" in said
    assert disk.read_bytes() == before


def test_a_disk_of_another_size_is_refused(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    disk = disk_of(tmp_path)
    before = disk.read_bytes()
    source = map_of(tmp_path, dirty(3, size=SIZE + 512))
    said = refused(capsys, source, f"qcow2:{disk}", "--bitmap", "b")
    assert f"{SIZE} (64.0 MiB)" in said
    assert f"{SIZE + 512}" in said
    assert disk.read_bytes() == before


def test_a_disk_in_use_is_refused(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """QEMU's lock is found before anything else is done."""
    disk = disk_of(tmp_path)
    source = map_of(tmp_path, dirty(3))
    with qemu.nbd_server(disk, "qcow2", writable=True):
        said = refused(capsys, source, f"qcow2:{disk}", "--bitmap", "b")
    assert "the image is in use" in said
    assert snapshot(disk) == DAILY


def test_version_2_is_refused(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    disk = tmp_path / "disk.qcow2"
    qemu.create(disk, SIZE, "qcow2", options="compat=0.10")
    before = disk.read_bytes()
    said = refused(capsys, map_of(tmp_path, dirty(3)), f"qcow2:{disk}", "--bitmap", "b")
    assert "version 2" in said
    assert disk.read_bytes() == before


def test_a_damaged_disk_is_refused(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where refcounts are wrong, QEMU would store a bitmap over somebody else's cluster."""
    disk = disk_of(tmp_path)
    parts.put(disk, 2 * 65536 + 2 * 3, b"\0\0")
    before = disk.read_bytes()
    said = refused(capsys, map_of(tmp_path, dirty(3)), f"qcow2:{disk}", "--bitmap", "b")
    assert "damaged" in said
    assert disk.read_bytes() == before


@pytest.mark.parametrize(
    ("image", "extra", "said"),
    [
        pytest.param("disk.qcow2", [], "holds no bitmap", id="raw-without-metadata"),
        pytest.param("qcow2:disk.qcow2", ["--metadata", "m"], "leave --metadata", id="qcow2-with"),
        pytest.param("qcow2:none.qcow2", [], "No such file", id="missing"),
        pytest.param("qcow2:map.raw", [], "not in qcow2 format", id="no-qcow2"),
        pytest.param("nbd://localhost", ["--metadata", "m"], "raw disks", id="nbd"),
        pytest.param("none.raw", ["--metadata", "m"], "No such file", id="missing-raw"),
        pytest.param(".", ["--metadata", "m"], "neither a file nor", id="folder"),
        pytest.param("map.raw", ["--metadata", "m"], "4096", id="raw-of-another-size"),
        pytest.param("map.raw", ["--metadata", "map.raw"], "exists already", id="metadata-exists"),
        pytest.param("size.raw", ["--metadata", "no/m"], "No such file", id="no-folder"),
    ],
)
def test_what_cannot_be_is_one_line(
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    image: str,
    extra: Sequence[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    disk_of(tmp_path)
    (tmp_path / "map.raw").write_bytes(bytes(4096))
    qemu.create(tmp_path / "size.raw", SIZE)
    source = map_of(tmp_path, dirty(3))
    before = sorted(os.listdir(tmp_path))
    assert said in refused(capsys, source, image, "--bitmap", "b", *extra)
    assert sorted(os.listdir(tmp_path)) == before
    assert snapshot(tmp_path / "disk.qcow2") == DAILY


def test_a_missing_qemu_img_is_one_line(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = disk_of(tmp_path)
    monkeypatch.setenv("POSTHOC_QEMU_IMG", "/nonexistent/qemu-img")
    said = refused(capsys, map_of(tmp_path, dirty(3)), f"qcow2:{disk}", "--bitmap", "b")
    assert "/nonexistent/qemu-img: is not installed" in said


# Replacing


@pytest.mark.parametrize("granularity", [65536, 4096])
def test_a_bitmap_is_replaced_and_the_others_stay(tmp_path: pathlib.Path, granularity: int) -> None:
    """Nothing of the old one is in the new one, whatever its granularity was."""
    disk = disk_of(tmp_path)
    handover.install(dirty(3, 9), str(disk), "b")
    qemu.img("bitmap", "--disable", disk, "b")
    made = dirty(5, granularity=granularity)
    handover.install(made, str(disk), "b", replace=True)
    assert carrier.read(disk, "b") == made
    assert snapshot(disk) == {**DAILY, "b": (True, [(5, 1)])}
    qemu.check(disk)


def test_replacing_what_is_not_there_is_adding(tmp_path: pathlib.Path) -> None:
    disk = disk_of(tmp_path)
    handover.install(dirty(3), str(disk), "b", replace=True)
    assert snapshot(disk) == {**DAILY, "b": (True, [(3, 1)])}


def kill_while_open(disk: pathlib.Path) -> None:
    """What kill -9 of a QEMU leaves: every bitmap inconsistent."""
    with subprocess.Popen(
        ["qemu-io", "-f", "qcow2", str(disk)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(b"write 0 64k\n")
            process.stdin.flush()
            while b"wrote" not in process.stdout.readline():
                assert process.poll() is None
        finally:
            process.kill()


def test_an_inconsistent_bitmap_is_replaced(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The case posthoc is for: the VM was killed, its bitmap is worthless, the map is found anew."""
    disk = disk_of(tmp_path)
    handover.install(dirty(3), str(disk), "b")
    kill_while_open(disk)
    assert [found.inconsistent for found in carrier.names(disk)] == [True, True]
    source = map_of(tmp_path, dirty(8))
    assert "--replace" in refused(capsys, source, f"qcow2:{disk}", "--bitmap", "b")
    assert install(source, f"qcow2:{disk}", "--bitmap", "b", "--replace") == 0
    assert carrier.read(disk, "b") == dirty(8)
    there = {found.name: found.inconsistent for found in carrier.names(disk)}
    assert there == {"daily": True, "b": False}
    qemu.check(disk)


def test_a_map_is_added_beside_an_inconsistent_one(tmp_path: pathlib.Path) -> None:
    disk = disk_of(tmp_path)
    kill_while_open(disk)
    handover.install(dirty(8), str(disk), "b")
    assert carrier.read(disk, "b") == dirty(8)


# When QEMU fails


def test_too_little_room_is_one_line_and_leaves_the_image(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = map_of(tmp_path, dirty(3))
    with parts.small_filesystem(tmp_path, 4 * MIB) as folder:
        disk = disk_of(folder)
        before = disk.read_bytes()
        said = refused(capsys, source, f"qcow2:{disk}", "--bitmap", "b")
        assert "not enough room" in said
        assert disk.read_bytes() == before
        qemu.check(disk)


def fill(folder: pathlib.Path) -> None:
    """Leave not a block free in a file system."""
    with (folder / "filler").open("wb", buffering=0) as file:
        length = 0
        for step in (MIB, 65536, 1024):
            with contextlib.suppress(OSError):
                while True:
                    os.posix_fallocate(file.fileno(), length, step)
                    length += step


@pytest.mark.parametrize("replace", [False, True], ids=["add", "replace"])
def test_when_qemu_cannot_save_every_old_bitmap_is_put_back(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, replace: bool
) -> None:
    """QEMU 7.2 loses every bitmap when the file system gets full, and exits with 0.

    Here somebody else fills it after the check for room. The image is sound afterwards and has the
    bitmaps it had, recording or not as they were.
    """
    real = qemu_img.bitmap
    calls: list[str] = []

    with parts.small_filesystem(tmp_path, 32 * MIB) as folder:
        disk = disk_of(folder)
        if replace:
            handover.install(dirty(1, 2), str(disk), "b")
        qemu.img("bitmap", "--add", "--disable", disk, "frozen")
        before = snapshot(disk)

        def crowded(path: str, name: str, *actions: str) -> None:
            if not calls:
                fill(folder)
            calls.append(name)
            real(path, name, *actions)

        monkeypatch.setattr(qemu_img, "bitmap", crowded)
        every_other = bitmap.Bitmap(SIZE, 512)
        every_other.data[:] = 0x55
        with pytest.raises(errors.UserError) as caught:
            handover.install(every_other, str(disk), "b", replace=replace)
        assert "put back" not in str(caught.value)
        assert snapshot(disk) == before
        assert len(calls) > 1
        qemu.check(disk)


def test_what_cannot_be_put_back_is_kept_and_told(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When qemu-img fails from there on, the old bitmaps are still in a folder of their own."""
    disk = disk_of(tmp_path)
    real = qemu_img.bitmap
    calls: list[str] = []

    def broken(path: str, name: str, *actions: str) -> None:
        calls.append(name)
        if len(calls) > 1:
            raise errors.ToolError(["qemu-img"], "is out of order")
        real(path, "daily", "--remove")

    monkeypatch.setattr(qemu_img, "bitmap", broken)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(errors.ImageError, match="could not be put back") as caught:
        handover.install(dirty(3), str(disk), "b")
    folder = str(caught.value).rpartition("are in ")[2]
    (kept,) = pathlib.Path(folder).glob("0.qcow2")
    assert list(carrier.read(kept, "daily").runs()) == [(0, 1)]


def test_what_qemu_stored_is_compared_with_the_map(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bitmap with one bit less is found out and removed again."""
    disk = disk_of(tmp_path)
    real = carrier.write

    def one_less(path: str, made: bitmap.Bitmap, name: str) -> None:
        worse = made.copy()
        if name == "b":
            worse.clear(3)
        real(path, worse, name)

    monkeypatch.setattr(carrier, "write", one_less)
    with pytest.raises(errors.ImageError, match="another bitmap 'b' than the map"):
        handover.install(dirty(3, 4), str(disk), "b")
    assert snapshot(disk) == DAILY
    qemu.check(disk)


def test_an_interrupt_leaves_the_image_as_it_was(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = disk_of(tmp_path)
    handover.install(dirty(1), str(disk), "b")
    before = snapshot(disk)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(handover, "_verify", interrupted)
    with pytest.raises(KeyboardInterrupt):
        handover.install(dirty(5), str(disk), "b", replace=True)
    assert snapshot(disk) == before
    qemu.check(disk)


SLOW_QEMU_IMG = """#!/bin/sh
if [ "$1" = bitmap ]; then
    : > "$0.begun"
    while [ ! -e "$0.go" ]; do sleep 0.05; done
fi
qemu-img "$@" || exit
: > "$0.$1-done"
"""


def test_ctrl_c_does_not_kill_qemu_img_at_work(tmp_path: pathlib.Path) -> None:
    """Killed with the image open it would leave every bitmap inconsistent: it is waited for.

    The terminal sends SIGINT to the whole group; the new bitmap is then taken out again.
    """
    disk = disk_of(tmp_path)
    tool = tmp_path / "qemu-img"
    tool.write_text(SLOW_QEMU_IMG)
    tool.chmod(0o755)
    words = command.words("install", map_of(tmp_path, dirty(3)), f"qcow2:{disk}", "--bitmap", "b")
    process = subprocess.Popen(
        words,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=command.environment({"POSTHOC_QEMU_IMG": str(tool)}),
        process_group=0,
    )
    with process:
        try:
            wait.until((tmp_path / "qemu-img.begun").exists, "qemu-img works")
            os.killpg(process.pid, signal.SIGINT)
            wait.until(lambda: interrupts_are_over(process.pid), "the interrupt has arrived")
            assert process.poll() is None
        finally:
            (tmp_path / "qemu-img.go").touch()
        output = process.communicate(timeout=wait.DEADLINE)[0]
    assert process.returncode == 130, output
    assert (tmp_path / "qemu-img.bitmap-done").exists(), "it was killed"
    assert snapshot(disk) == DAILY
    qemu.check(disk)


def interrupts_are_over(pid: int) -> bool:
    """Whether no signal is pending for the process any more."""
    lines = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
    pending = [line.split()[1] for line in lines if line.startswith(("SigPnd", "ShdPnd"))]
    return all(int(mask, 16) == 0 for mask in pending)


# A raw disk with a metadata file


@pytest.mark.parametrize("size", [SIZE, 1_000_001, 513])
def test_a_raw_disk_gets_a_metadata_file_and_keeps_every_byte(
    tmp_path: pathlib.Path, size: int
) -> None:
    """Its length too, where that is no multiple of a sector."""
    disk, metadata = tmp_path / "disk,1.raw", tmp_path / "meta,1.qcow2"
    disk.write_bytes(os.urandom(min(size, 1_000_001)))
    os.truncate(disk, size)
    before = hashlib.sha256(disk.read_bytes()).hexdigest(), disk.stat().st_mtime_ns
    made = dirty(0, (size - 1) // 512, size=size, granularity=512)
    source = map_of(tmp_path, made)
    names = [*os.listdir(tmp_path), metadata.name]
    words = [source, str(disk), "--bitmap", "b", "--metadata", str(metadata)]
    assert install(*words) == 0
    assert (hashlib.sha256(disk.read_bytes()).hexdigest(), disk.stat().st_mtime_ns) == before
    assert qemu.dirty_segments(metadata, 512, "b") == {0, (size - 1) // 512}
    assert sorted(os.listdir(tmp_path)) == sorted(names)
    qemu.check(metadata)
    details = qemu.info(metadata, "qcow2")["format-specific"]["data"]
    assert (details["data-file"], details["data-file-raw"]) == (str(disk), True)


def test_a_vm_on_the_metadata_file_writes_the_raw_disk_and_records(tmp_path: pathlib.Path) -> None:
    disk, metadata = tmp_path / "disk.raw", tmp_path / "meta.qcow2"
    qemu.create(disk, SIZE)
    handover.install_metadata(dirty(3), str(disk), str(metadata), "b")
    qemu.io(metadata, "write -P 9 1M 64k", format="qcow2")
    qemu.io(disk, "read -P 9 1M 64k")
    assert qemu.dirty_segments(metadata, 65536, "b") == {3, 16}


def test_a_second_map_goes_into_the_metadata_file_itself(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    disk, metadata = tmp_path / "disk.raw", tmp_path / "meta.qcow2"
    qemu.create(disk, SIZE)
    source = map_of(tmp_path, dirty(3))
    words = [source, str(disk), "--metadata", str(metadata), "--bitmap"]
    assert install(*words, "one") == 0
    assert f"qcow2:{metadata}" in refused(capsys, *words, "two")
    assert install(source, f"qcow2:{metadata}", "--bitmap", "two") == 0
    assert set(snapshot(metadata)) == {"one", "two"}


def test_a_block_device_gets_a_metadata_file(tmp_path: pathlib.Path) -> None:
    disk, metadata = tmp_path / "disk.raw", tmp_path / "meta.qcow2"
    qemu.create(disk, SIZE)
    with qemu.loop_device(disk) as device:
        handover.install_metadata(dirty(3), str(device), str(metadata), "b")
        assert stat.S_ISBLK(device.stat().st_mode)
        assert qemu.dirty_segments(metadata, 65536, "b") == {3}


def test_a_raw_disk_in_use_is_refused(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    disk, metadata = tmp_path / "disk.raw", tmp_path / "meta.qcow2"
    qemu.create(disk, SIZE)
    source = map_of(tmp_path, dirty(3))
    with qemu.nbd_server(disk, writable=True):
        words = [source, str(disk), "--bitmap", "b", "--metadata", str(metadata)]
        assert "in use" in refused(capsys, *words)
    assert sorted(os.listdir(tmp_path)) == ["disk.raw", "map.qcow2"]


def test_a_metadata_file_that_fails_half_way_is_not_there(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, metadata = tmp_path / "disk.raw", tmp_path / "meta.qcow2"
    qemu.create(disk, SIZE)

    def failing(*_: object, **__: object) -> None:
        raise errors.UserError("no")

    for step in ("_make_metadata", "_merge", "_verify", "_publish"):
        with monkeypatch.context() as patch:
            patch.setattr(handover, step, failing)
            with pytest.raises(errors.UserError, match="no"):
                handover.install_metadata(dirty(3), str(disk), str(metadata), "b")
        assert os.listdir(tmp_path) == ["disk.raw"]


def test_a_full_disk_leaves_no_metadata_file(tmp_path: pathlib.Path) -> None:
    disk = tmp_path / "disk.raw"
    qemu.create(disk, 16 << 30)
    made = bitmap.Bitmap(16 << 30, 512)
    made.data[::2] = 1
    with parts.small_filesystem(tmp_path, 4 * MIB) as folder:
        before = os.listdir(folder)
        with pytest.raises(errors.UserError) as caught:
            handover.install_metadata(made, str(disk), str(folder / "meta.qcow2"), "b")
        assert "\n" not in str(caught.value)
        assert os.listdir(folder) == before
