# SPDX-License-Identifier: Apache-2.0
"""The guest's harness: a script that fails is a failure, and the archive is what cpio reads."""

import pathlib
import subprocess

import pytest

from tests.vm import guest, initramfs


def test_script_that_fails_is_noticed_and_its_console_shown(workdir: pathlib.Path) -> None:
    """A guest that ends with another status than 0 raises, and says what it printed."""
    disk = workdir / "disk"
    disk.write_bytes(b"first sector".ljust(1 << 20, b"\0"))
    script = "head -c 12 /dev/vda; echo; echo last | dd of=/dev/vda seek=1; exit 3"
    with (
        pytest.raises(guest.GuestFailedError, match="first sector") as caught,
        guest.boot(disk, script) as running,
    ):
        running.wait()
    assert "script ended with 3" in str(caught.value)
    assert disk.read_bytes()[512:517] == b"last\n"


def test_archive_is_one_that_cpio_reads(tmp_path: pathlib.Path) -> None:
    """Folders come before what is in them, names and contents of any length are padded."""
    archive = initramfs.Archive()
    archive.file("a/b/file", b"12345")
    archive.link("a/link", "b/file")
    archive.file("empty", b"")
    command = ["cpio", "--extract", "--quiet", "--no-absolute-filenames"]
    subprocess.run(command, input=archive.finish(), cwd=tmp_path, check=True)
    assert (tmp_path / "a" / "link").read_bytes() == b"12345"
    assert (tmp_path / "empty").read_bytes() == b""


def test_dependencies_are_read_from_the_module_itself() -> None:
    """`depends=` names modules with dashes or underscores, or none."""
    assert initramfs.depends(b"x\0depends=virtio,virtio-ring\0name=y\0") == [
        "virtio",
        "virtio_ring",
    ]
    assert initramfs.depends(b"x\0depends=\0name=y\0") == []
    assert initramfs.depends(b"no section") == []
