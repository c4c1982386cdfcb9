# SPDX-License-Identifier: Apache-2.0
"""A guest's discards and zeroes of a disk that is no file: they reach the image, and every one is in the map."""

import contextlib
import ctypes
import errno
import os
import pathlib
import random
import signal
import subprocess
from collections.abc import Iterator

import pytest

from tests import command, nbdkit, oracle, qemu, wait
from tests.posthoc import images
from tests.posthoc.images import MIB, SEGMENT

Path = pathlib.Path
SIZE = 16 * MIB
KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 1, 2, 16


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    """The raw disk that the live one began as: noise."""
    return images.pair(tmp_path, SIZE)[1]


@pytest.fixture
def qcow2(tmp_path: Path, reference: Path) -> Path:
    """The live disk as a qcow2, at a short path."""
    path = tmp_path / "live.qcow2"
    qemu.convert(reference, path, "qcow2")
    return path


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Where nbdkit writes what it was asked for."""
    return tmp_path / "requests"


@pytest.fixture
def export(tmp_path: Path, log: Path, reference: Path) -> Iterator[str]:
    """The live disk as a raw file behind nbdkit: its URI."""
    live = tmp_path / "live.raw"
    live.write_bytes(reference.read_bytes())
    with qemu.nbdkit("file", live, f"logfile={log}", filters=["log"]) as uri:
        yield uri


def allocated(path: Path) -> int:
    return path.stat().st_blocks * 512


def fallocate(path: Path, mode: int, start: int, length: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    descriptor = os.open(path, os.O_RDWR)
    try:
        if libc.fallocate(descriptor, mode, start, length):
            raise OSError(ctypes.get_errno(), "fallocate")
    finally:
        os.close(descriptor)


def test_fallocate_of_a_qcow2(
    tmp_path: Path, mountpoint: Path, qcow2: Path, reference: Path
) -> None:
    """Holes and zeroes at any offset, beside writes: the model's bytes, all of them in the map, less space taken."""
    model = oracle.ModelDisk.of(reference, SEGMENT)
    numbers, dirty = random.Random(5), tmp_path / "map.qcow2"
    before = allocated(qcow2)
    with command.mounted(f"qcow2:{qcow2}", reference, mountpoint, "--output", dirty) as mount:
        status = command.until_state(mount, "complete")
        assert status["datapath"] == "python, 4 threads, behind the native server"
        disk = mount / "disk"
        for number in range(40):
            start = numbers.randrange(SIZE // 2)
            length = min(numbers.choice([1, 512, SEGMENT, 300_000]), SIZE - start)
            if number % 3 == 2:
                data = numbers.randbytes(length)
                images.overwrite(disk, start, data)
                model.write(start, data)
            else:
                mode = (PUNCH_HOLE, ZERO_RANGE)[number % 3]
                fallocate(disk, mode | KEEP_SIZE, start, length)
                model.write(start, bytes(length))
        fallocate(disk, PUNCH_HOLE | KEEP_SIZE, SIZE // 2, SIZE // 2)
        model.write(SIZE // 2, bytes(SIZE // 2))
        assert disk.read_bytes() == model.content
        guest = command.status(mount)["guest"]
        assert (guest["discards"]["operations"], guest["discards"]["errors"]) == (28, 0)
    after = tmp_path / "after.raw"
    qemu.convert(qcow2, after, "raw", source_format="qcow2")
    assert after.read_bytes() == model.content
    assert qemu.dirty_segments(dirty, SEGMENT) == model.written
    qemu.check(qcow2)
    assert allocated(qcow2) < before - SIZE // 3


def test_qemus_discards_and_zeroes(mountpoint: Path, qcow2: Path, reference: Path) -> None:
    """QEMU's block layer on top: patterns verify, and none of the zeros is sent as bytes."""
    steps = ["write -P 7 1M 64k", "write -z 2M 1M", "write -z -u 4M 1M", "discard 6M 1M", "flush"]
    steps += ["read -P 7 1M 64k", "read -P 0 2M 1M", "read -P 0 4M 1M", "read -P 0 6M 1M"]
    with command.mounted(f"qcow2:{qcow2}", reference, mountpoint) as mount:
        command.until_state(mount, "complete")
        options = f"driver=raw,discard=unmap,file.driver=file,file.filename={mount / 'disk'}"
        words = [word for step in steps for word in ("-c", step)]
        printed = qemu.run("qemu-io", "--image-opts", options, *words)
        assert "failed" not in printed, printed
        status = command.status(mount)
        assert status["guest"]["writes"]["bytes"] == SEGMENT
        assert status["written"] == SEGMENT + 3 * MIB
        expected = {16, *range(32, 48), *range(64, 80), *range(96, 112)}
        assert qemu.dirty_segments(mount / "dirty.qcow2", SEGMENT) == expected


def test_an_nbd_server_is_asked_for_holes_and_for_zeros(
    tmp_path: Path, mountpoint: Path, export: str, log: Path, reference: Path
) -> None:
    """A punched hole may be one there, a zero range may not; either reads as zeros, which a trim would not promise."""
    with command.mounted(export, reference, mountpoint) as mount:
        command.until_state(mount, "complete")
        fallocate(mount / "disk", PUNCH_HOLE | KEEP_SIZE, MIB, 2 * MIB)
        fallocate(mount / "disk", ZERO_RANGE | KEEP_SIZE, 8 * MIB, MIB)
        assert qemu.dirty_segments(mount / "dirty.qcow2", SEGMENT) == {
            *range(16, 48),
            *range(128, 144),
        }
    assert nbdkit.requests(log, "Zero", "Trim", "Write") == [
        nbdkit.Request("Zero", MIB, 2 * MIB, True),
        nbdkit.Request("Zero", 8 * MIB, MIB, False),
    ]
    live = tmp_path / "live.raw"
    content = bytearray(reference.read_bytes())
    content[MIB : 3 * MIB] = bytes(2 * MIB)
    content[8 * MIB : 9 * MIB] = bytes(MIB)
    assert live.read_bytes() == content
    assert SIZE - 2 * MIB <= allocated(live) < SIZE - MIB


@pytest.mark.parametrize("kind", ["qcow2", "export"])
def test_a_file_system_is_trimmed(
    tmp_path: Path, mountpoint: Path, kind: str, request: pytest.FixtureRequest, reference: Path
) -> None:
    """blkdiscard of a loop device, ext4, and fstrim after files were removed: the image shrinks each time."""
    spec = request.getfixturevalue(kind)
    image = spec if kind == "qcow2" else tmp_path / "live.raw"
    live = f"qcow2:{spec}" if kind == "qcow2" else spec
    with command.mounted(live, reference, mountpoint) as mount:
        command.until_state(mount, "complete")
        with qemu.loop_device(mount / "disk", direct=True) as device:
            qemu.run("blkdiscard", device)
            assert qemu.dirty_segments(mount / "dirty.qcow2", SEGMENT) == set(range(256))
            assert allocated(image) < MIB
            qemu.mkfs_ext4(device)
            with qemu.mounted(device, tmp_path / "inside") as inside:
                (inside / "file").write_bytes(random.Random(1).randbytes(4 * MIB))
                os.sync()
                full = allocated(image)
                assert full > 4 * MIB
                (inside / "file").unlink()
                os.sync()
                qemu.run("fstrim", inside)
                assert allocated(image) < full - 3 * MIB
            qemu.fsck_ext4(device)


def test_a_killed_session_leaves_an_error_and_no_mount(
    mountpoint: Path, qcow2: Path, reference: Path
) -> None:
    """The record dies with it, so nobody may write on; the image is sound, and can be mounted again."""
    live = f"qcow2:{qcow2}"
    command.posthoc("mount", live, reference, mountpoint)
    disk = os.open(mountpoint / "disk", os.O_RDWR | os.O_DIRECT)
    os.kill(int(command.status(mountpoint)["pid"]), signal.SIGKILL)
    wait.until(lambda: not command.is_mounted(mountpoint), "nothing is mounted")
    with pytest.raises(OSError) as error:
        os.fsync(disk)
    assert error.value.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    with contextlib.suppress(OSError):
        os.close(disk)  # may tell of the end again
    wait.until(lambda: _is_free(qcow2), "its qemu-nbd has ended")
    qemu.check(qcow2)
    with command.mounted(live, reference, mountpoint) as mount:
        assert command.until_state(mount, "complete")["dirty"] == 0


def _is_free(image: Path) -> bool:
    command = ["qemu-img", "info", "-f", "qcow2", str(image)]
    return subprocess.run(command, capture_output=True).returncode == 0


def test_without_the_program_discards_are_refused_and_the_status_says_so(
    mountpoint: Path, qcow2: Path, reference: Path
) -> None:
    """Plain python serves then; the disk is whole, and named native is refused."""
    nothing = {"POSTHOC_DATAPATH": "/nonexistent"}
    with command.mounted(f"qcow2:{qcow2}", reference, mountpoint, env=nothing) as mount:
        status = command.status(mount)
        wanted = "python, 4 threads (native: /nonexistent was not built; no discards)"
        assert status["datapath"] == wanted
        with pytest.raises(OSError) as error:
            fallocate(mount / "disk", PUNCH_HOLE | KEEP_SIZE, 0, SEGMENT)
        assert error.value.errno == errno.EOPNOTSUPP
        assert command.until_state(mount, "complete")["dirty"] == 0


def test_python_by_name_is_python_alone(mountpoint: Path, qcow2: Path, reference: Path) -> None:
    """`--datapath python` asks for nothing else; `native` cannot serve what is no file."""
    live = f"qcow2:{qcow2}"
    with command.mounted(live, reference, mountpoint, "--datapath", "python") as mount:
        assert command.status(mount)["datapath"] == "python, 4 threads"
    refused = command.posthoc(
        "mount", "--datapath", "native", live, reference, mountpoint, status=2
    )
    assert "is not a raw file or block device" in refused.stderr
