# SPDX-License-Identifier: Apache-2.0
"""The command is killed (SIGKILL) while it uses an image of a format: no server stays, the image is sound."""

import contextlib
import os
import pathlib
import signal
import subprocess
from collections.abc import Iterator

import pytest

from dirtymap import images as disk_images
from tests import command, qemu, wait
from tests.posthoc import images
from tests.posthoc.images import MIB

Path = pathlib.Path

SECRET = "open sesame"


def servers(image: Path) -> list[int]:
    """The processes of qemu-nbd that have `image`."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (process / "cmdline").read_bytes().split(b"\0")
            if words[0].endswith(b"qemu-nbd") and os.fsencode(image) in b" ".join(words):
                found.append(int(process.name))
    return found


@contextlib.contextmanager
def running(*arguments: str | Path) -> Iterator["subprocess.Popen[bytes]"]:
    """The command under way; it is dead behind the block."""
    process = subprocess.Popen(
        command.words(*arguments),
        env=command.environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def content(spec: str, *secrets: Path) -> bytes:
    options = disk_images.Options(secrets=tuple(map(str, secrets)))
    image = disk_images.open(spec, options=options)
    try:
        buffer = bytearray(image.size)
        image.read_into(0, memoryview(buffer))
        return bytes(buffer)
    finally:
        image.close()


def test_a_killed_diff_leaves_no_server(tmp_path: Path) -> None:
    live, reference = images.pair(tmp_path)
    image = tmp_path / "reference.qcow2"
    qemu.convert(reference, image, "qcow2")
    output = tmp_path / "map.qcow2"
    with running("diff", "--rate", "1M", "-o", output, live, f"qcow2:{image}") as process:
        wait.until(lambda: servers(image), "its server runs")
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    wait.until(lambda: not servers(image), "the server has ended")
    assert not output.exists()
    qemu.check(image)
    assert content(f"qcow2:{image}") == reference.read_bytes()


@pytest.mark.parametrize("kind", ["qcow2", "luks"])
def test_a_killed_mount_leaves_a_sound_image(tmp_path: Path, mountpoint: Path, kind: str) -> None:
    """What the guest was told is stable is there; nobody holds the image any more."""
    _, reference = images.pair(tmp_path)
    image, secret = tmp_path / "live", tmp_path / "secret"
    secret.write_text(SECRET)
    secrets = (secret,) if kind == "luks" else ()
    if kind == "qcow2":
        qemu.create(image, 4 * MIB, "qcow2")
    else:
        qemu.create_encrypted(image, 4 * MIB, SECRET)
    spec = f"{kind}:{image}"
    options = [word for path in secrets for word in ("--secret", str(path))]
    data = os.urandom(MIB)
    with running("mount", "--foreground", *options, spec, reference, mountpoint) as process:
        wait.until(lambda: command.is_mounted(mountpoint), "it is mounted")
        wait.until((mountpoint / "disk").exists, "it answers")
        with open(mountpoint / "disk", "r+b", buffering=0) as disk:
            os.pwrite(disk.fileno(), data, 2 * MIB + 100)
            os.fsync(disk.fileno())
        assert len(servers(image)) == 1
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert "the map is lost" in command.posthoc("umount", mountpoint, status=2).stderr
    wait.until(lambda: not servers(image), "the server has ended")
    if kind == "qcow2":
        qemu.check(image)
    assert content(spec, *secrets)[2 * MIB + 100 :][:MIB] == data
