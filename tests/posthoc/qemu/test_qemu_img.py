# SPDX-License-Identifier: Apache-2.0
"""Running qemu-img: what it says in one line, and never killed at work."""

import pathlib
import signal
from concurrent import futures

import pytest

from dirtymap import errors
from posthoc.qemu import qemu_img
from tests import qemu


def stub(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch, script: str) -> pathlib.Path:
    """A qemu-img of our own."""
    tool = folder / "qemu-img"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("POSTHOC_QEMU_IMG", str(tool))
    return tool


@pytest.mark.parametrize("ending", ["exit 0", "exit 1"], ids=["done", "failed"])
def test_an_interrupt_waits_for_it(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    """Killed with an image open for writing, it would leave every bitmap inconsistent."""
    stub(tmp_path, monkeypatch, f'kill -INT $PPID\nsleep 1\n: > "$0.done"\n{ending}')
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        qemu_img.bitmap("disk.qcow2", "b", "--add")
    assert (tmp_path / "qemu-img.done").exists()
    assert signal.getsignal(signal.SIGINT) is handler


def test_it_may_run_in_a_worker_thread(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where signals cannot be set and no interrupt arrives."""
    stub(tmp_path, monkeypatch, ': > "$0.done"')
    with futures.ThreadPoolExecutor(1) as worker:
        worker.submit(qemu_img.bitmap, "disk.qcow2", "b", "--add").result()
    assert (tmp_path / "qemu-img.done").exists()


@pytest.mark.parametrize(
    ("script", "said"),
    [
        pytest.param("echo 'qemu-img: no; good' >&2; exit 1", "no; good", id="a-reason"),
        pytest.param("printf 'qemu-img: a\\n\\n b\\n' >&2; exit 1", "a; b", id="two-lines"),
        pytest.param("exit 3", "exit code 3", id="silent"),
        pytest.param("printf '\\377' >&2; exit 1", "\ufffd", id="no-text"),
    ],
)
def test_what_it_says_is_one_line(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, script: str, said: str
) -> None:
    tool = stub(tmp_path, monkeypatch, script)
    with pytest.raises(errors.ToolError) as caught:
        qemu_img.info("disk.qcow2", "qcow2")
    assert str(caught.value) == f"{tool}: {said}"


def test_its_messages_are_not_translated(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub(tmp_path, monkeypatch, 'echo "$LC_ALL" >&2; exit 1')
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    with pytest.raises(errors.ToolError, match=": C$"):
        qemu_img.info("disk.qcow2", "qcow2")


def test_a_file_that_cannot_be_run_is_one_line(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub(tmp_path, monkeypatch, "").chmod(0o644)
    with pytest.raises(errors.ToolError, match="Permission denied"):
        qemu_img.info("disk.qcow2", "qcow2")


def test_info_of_a_qcow2_and_of_a_raw_disk(tmp_path: pathlib.Path) -> None:
    """A raw disk is read as raw even if its bytes look like a qcow2's."""
    disk = tmp_path / "disk.qcow2"
    qemu.create(disk, 1 << 20, "qcow2", options="cluster_size=4096")
    qemu.img("bitmap", "--add", disk, "one")
    found = qemu_img.info(str(disk), "qcow2")
    assert (found.virtual_size, found.cluster_size) == (1 << 20, 4096)
    assert (found.bitmaps, found.holds_bitmaps) == (["one"], True)
    raw = qemu_img.info(str(disk), "raw")
    assert (raw.virtual_size, raw.bitmaps) == (-(-disk.stat().st_size // 512) * 512, [])


def test_check_counts_corruptions_and_not_leaks(tmp_path: pathlib.Path) -> None:
    disk = tmp_path / "disk.qcow2"
    qemu.create(disk, 1 << 20, "qcow2")
    assert qemu_img.check(str(disk)) == qemu_img.Check(0, qemu.check(disk)["image-end-offset"])
    with disk.open("r+b") as file:  # the refcount of the fourth cluster, which the L1 table is in
        file.seek(2 * 65536 + 2 * 3)
        file.write(b"\0\0")
    assert qemu_img.check(str(disk)).corruptions == 1
    with disk.open("r+b") as file:
        file.seek(2 * 65536 + 2 * 3)
        file.write(b"\0\1\0\1")
    assert qemu_img.check(str(disk)).corruptions == 0
