# SPDX-License-Identifier: Apache-2.0
"""Every format QEMU knows, through a qemu-nbd of ours."""

import contextlib
import os
import pathlib
import random
import shutil
import signal
import tempfile
from collections.abc import Iterator

import pytest

from dirtymap import errors, images
from dirtymap.images import base, export
from tests import qemu

MIB = 1 << 20
SIZE = 4 * MIB


@pytest.fixture(autouse=True)
def temporary(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pathlib.Path]:
    """The folder in which servers have theirs: nothing may be left there."""
    with tempfile.TemporaryDirectory(prefix="posthoc-t-", dir="/tmp") as name:
        monkeypatch.setattr(tempfile, "tempdir", name)
        yield pathlib.Path(name)
        monkeypatch.setattr(tempfile, "tempdir", None)
        assert os.listdir(name) == []


@pytest.fixture
def disk(tmp_path: pathlib.Path) -> pathlib.Path:
    """1 MiB of random bytes, a hole, random bytes at the end."""
    path = tmp_path / "disk.raw"
    content = random.Random(2)
    with open(path, "wb") as stream:
        stream.write(content.randbytes(MIB))
        stream.seek(SIZE - 100_000)
        stream.write(content.randbytes(100_000))
    return path


@contextlib.contextmanager
def opened(spec: str, *secrets: str, writable: bool = False) -> Iterator[export.NbdImage]:
    image = images.open(spec, writable=writable, options=images.Options(secrets=secrets))
    try:
        assert isinstance(image, export.NbdImage)
        yield image
    finally:
        image.close()


def read(image: base.Image, start: int = 0, length: int | None = None) -> bytes:
    buffer = bytearray(image.size - start if length is None else length)
    image.read_into(start, memoryview(buffer))
    return bytes(buffer)


@pytest.mark.parametrize("kind", ["qcow2", "vmdk", "vdi", "vhdx", "vpc"])
def test_each_format_is_read(disk: pathlib.Path, tmp_path: pathlib.Path, kind: str) -> None:
    path = tmp_path / f"disk, of {kind}:x"  # commas and colons mean something to QEMU
    qemu.convert(disk, path, kind)
    with opened(f"{kind}:{path}") as image:
        assert image.name == f"{kind}:{path}"
        assert read(image)[:SIZE] == disk.read_bytes()
        assert not any(read(image)[SIZE:])
        covered = list(image.extents(0, image.size))
        assert sum(found.length for found in covered) == image.size
        zeros = sum(found.length for found in covered if found.zero)
        # vhdx tells of no holes; vpc allocates in blocks of 2 MiB.
        assert zeros >= {"vhdx": 0, "vpc": 0}.get(kind, 2 * MIB)


def test_a_format_is_never_guessed(disk: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """A guest's raw disk that begins like a qcow2 with a backing file is raw bytes, also as a backing file."""
    secret = tmp_path / "of-the-host"
    secret.write_bytes(b"not for the guest" * 100_000)
    trap = tmp_path / "trap.qcow2"
    qemu.create(trap, SIZE, "qcow2", backing=(secret, "raw"))
    raw = tmp_path / "guest.raw"
    raw.write_bytes(trap.read_bytes().ljust(SIZE, b"\0"))

    image = images.open(str(raw))
    assert read(image) == raw.read_bytes()
    image.close()

    overlay = tmp_path / "overlay.qcow2"
    qemu.create(overlay, SIZE, "qcow2", backing=(raw, "raw"))
    with opened(f"qcow2:{overlay}") as over:
        assert read(over) == raw.read_bytes()

    with qemu.nbd_server(raw) as uri, opened(uri) as exported:
        assert read(exported) == raw.read_bytes()


@pytest.fixture(scope="module")
def encrypted(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Empty images that open with the contents of `right`; making one takes QEMU seconds."""
    folder = tmp_path_factory.mktemp("encrypted")
    (folder / "right").write_text("open sesame")
    (folder / "wrong").write_text("open barley")
    for kind in ("luks", "qcow2"):
        qemu.create_encrypted(folder / kind, SIZE, "open sesame", kind)
    return folder


@pytest.mark.parametrize("kind", ["luks", "qcow2"])
def test_encrypted_images_open_with_the_right_secret(
    disk: pathlib.Path, tmp_path: pathlib.Path, encrypted: pathlib.Path, kind: str
) -> None:
    """Several secret files are tried in order."""
    right, wrong = str(encrypted / "right"), str(encrypted / "wrong")
    path = tmp_path / "encrypted"
    shutil.copy(encrypted / kind, path)
    spec = f"{kind}:{path}"
    with opened(spec, right, writable=True) as image:
        assert isinstance(image, base.WritableImage)
        image.write(0, disk.read_bytes())
        image.flush()
    assert disk.read_bytes()[:4096] not in path.read_bytes()
    with opened(spec, wrong, right) as image:
        assert read(image) == disk.read_bytes()
    with pytest.raises(errors.ImageError, match="--secret"), opened(spec):
        pass
    with pytest.raises(errors.ImageError, match="Invalid password"), opened(spec, wrong):
        pass
    with pytest.raises(errors.ImageError, match="missing"), opened(spec, f"{right}.not"):
        pass


@pytest.mark.parametrize("secrets", [["right"], ["right", "right"]], ids=["one", "one-for-each"])
def test_every_encrypted_layer_of_a_chain_is_opened(
    disk: pathlib.Path, tmp_path: pathlib.Path, encrypted: pathlib.Path, secrets: list[str]
) -> None:
    below, top = tmp_path / "below", tmp_path / "top"
    for path in (below, top):
        shutil.copy(encrypted / "qcow2", path)
    files = [str(encrypted / name) for name in secrets]
    with opened(f"qcow2:{below}", *files[:1], writable=True) as image:
        assert isinstance(image, base.WritableImage)
        image.write(0, disk.read_bytes())
    key = f"secret,id=key,file={files[0]}"
    options = f"driver=qcow2,file.filename={top},encrypt.key-secret=key"
    qemu.img("rebase", "-u", "--object", key, "--image-opts", options, "-b", below, "-F", "qcow2")
    with opened(f"qcow2:{top}", *files) as image:
        assert image.server is not None
        assert [layer.encrypted for layer in image.server.layers] == [True, True]
        assert read(image) == disk.read_bytes()


def test_an_image_in_use_is_refused(disk: pathlib.Path, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "disk.qcow2"
    qemu.convert(disk, path, "qcow2")
    with opened(f"qcow2:{path}", writable=True):
        with pytest.raises(errors.ImageError, match="in use"), opened(f"qcow2:{path}"):
            pass
    with opened(f"qcow2:{path}"), opened(f"qcow2:{path}") as second:
        assert read(second, 0, 10) == disk.read_bytes()[:10]


def test_writes_reach_the_file_and_leave_it_sound(
    disk: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    path = tmp_path / "disk.qcow2"
    qemu.convert(disk, path, "qcow2")
    model = bytearray(disk.read_bytes())
    with opened(f"qcow2:{path}", writable=True) as image:
        assert isinstance(image, export.WritableNbdImage)
        image.write(MIB - 3, b"across the border")
        model[MIB - 3 : MIB + 14] = b"across the border"
        image.zero(1000, 200_000)
        model[1000:201_000] = bytes(200_000)
        image.trim(3 * MIB, MIB // 2)
        image.flush()
    qemu.check(path)
    with opened(f"qcow2:{path}") as image:
        assert read(image) == model


def test_a_killed_server_is_gone_at_once(disk: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """It is ours and does not come back: no tries, no waiting."""
    path = tmp_path / "disk.qcow2"
    qemu.convert(disk, path, "qcow2")
    with opened(f"qcow2:{path}") as image:
        assert image.server is not None
        os.kill(image.server.child.pid, signal.SIGKILL)  # type: ignore[attr-defined]
        with pytest.raises(base.GoneError):
            read(image)


def test_closing_ends_the_server(disk: pathlib.Path, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "disk.qcow2"
    qemu.convert(disk, path, "qcow2")
    image = images.open(f"qcow2:{path}", writable=True)
    assert isinstance(image, export.NbdImage)
    assert image.server is not None
    reader = image.reader()
    assert reader is not image
    assert read(reader) == disk.read_bytes()
    reader.close()
    assert image.server.is_alive()
    image.close()
    assert not image.server.is_alive()
    image.close()


def test_nobody_else_can_reach_the_server(
    disk: pathlib.Path, tmp_path: pathlib.Path, temporary: pathlib.Path
) -> None:
    path = tmp_path / "disk.qcow2"
    qemu.convert(disk, path, "qcow2")
    with opened(f"qcow2:{path}"):
        (folder,) = temporary.iterdir()
        assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("variable", ["POSTHOC_QEMU_NBD", "POSTHOC_QEMU_IMG"])
def test_a_missing_tool_is_named(
    disk: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
) -> None:
    path = tmp_path / "disk.qcow2"
    qemu.convert(disk, path, "qcow2")
    monkeypatch.setenv(variable, "/nonexistent/tool")
    with pytest.raises(errors.ToolError, match="/nonexistent/tool: is not installed"):
        images.open(f"qcow2:{path}")


def test_a_server_that_cannot_start_says_why(
    disk: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, tool = tmp_path / "disk.qcow2", tmp_path / "qemu-nbd"
    qemu.convert(disk, path, "qcow2")
    tool.write_text("#!/bin/sh\necho qemu-nbd: the disk is on fire >&2\nexit 1\n")
    tool.chmod(0o700)
    monkeypatch.setenv("POSTHOC_QEMU_NBD", str(tool))
    with pytest.raises(errors.ImageError) as caught:
        images.open(f"qcow2:{path}")
    assert str(caught.value) == f"qcow2:{path}: the disk is on fire"


@pytest.mark.parametrize("writable", [False, True], ids=["read", "written"])
def test_nobody_writes_the_raw_file_below(tmp_path: pathlib.Path, writable: bool) -> None:
    """QEMU's own locks leave a raw backing file to writers, unlike that of any format."""
    base_path, path = tmp_path / "base.raw", tmp_path / "top.qcow2"
    base_path.write_bytes(bytes(MIB))
    qemu.create(path, MIB, "qcow2", backing=(base_path, "raw"))
    with opened(f"qcow2:{path}", writable=writable):
        with pytest.raises(errors.ImageError, match="in use by another program"):
            images.open(str(base_path), writable=True)
        images.open(str(base_path)).close()
        with pytest.raises(AssertionError, match="lock"):
            qemu.io(base_path, "write 0 512")
        qemu.io(base_path, "read 0 512", options=["-r"])
    qemu.io(base_path, "write 0 512")


def test_a_raw_file_below_that_is_written_is_refused(tmp_path: pathlib.Path) -> None:
    base_path, path = tmp_path / "base.raw", tmp_path / "top.qcow2"
    base_path.write_bytes(bytes(MIB))
    qemu.create(path, MIB, "qcow2", backing=(base_path, "raw"))
    with qemu.nbd_server(base_path, writable=True):
        with pytest.raises(errors.ImageError, match="base.raw: is in use"):
            images.open(f"qcow2:{path}")
    with opened(f"qcow2:{path}") as image:
        assert read(image) == bytes(MIB)


def test_a_format_may_lie_on_a_block_device(disk: pathlib.Path, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "disk.qcow2"
    qemu.convert(disk, path, "qcow2")
    os.truncate(path, -(-path.stat().st_size // 4096) * 4096)
    with qemu.loop_device(path) as device, opened(f"qcow2:{device}") as image:
        assert read(image) == disk.read_bytes()
