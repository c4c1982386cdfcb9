# SPDX-License-Identifier: Apache-2.0
"""What several tests of the command ask for."""

import pathlib
import subprocess
from collections.abc import Iterator

import pytest

Path = pathlib.Path


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB with hardly any room left."""
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "none", str(folder)], check=True)
    (folder / "filler").write_bytes(bytes(120 << 10))
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)
