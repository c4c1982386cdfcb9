# SPDX-License-Identifier: Apache-2.0
"""The map on disk where it cannot be written: rather none than one that says too little."""

import os
import pathlib
import subprocess
from collections.abc import Iterator

import pytest

from dirtymap import bitmap
from dirtymap.qcow2 import carrier
from posthoc.sessions import output

SEGMENT = 65536


@pytest.fixture
def path(tmp_path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Where the map goes: a file system of 1 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)], check=True)
    yield folder / "map.qcow2"
    subprocess.run(["umount", str(folder)], check=True)


def fill(path: pathlib.Path) -> None:
    """Leave no room beside `path`."""
    found = os.statvfs(path.parent)
    (path.parent / "filler").write_bytes(bytes(found.f_bfree * found.f_bsize))


def dirty(*segments: int) -> bitmap.Bitmap:
    made = bitmap.Bitmap(64 * SEGMENT, SEGMENT)
    for segment in segments:
        made.set(segment)
    return made


def test_an_older_map_is_removed(path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    carrier.write(path, dirty(1))
    fill(path)
    made = output.Output(str(path), "posthoc")
    made.begin(dirty(1, 2))
    assert not path.exists()
    assert made.state == f"failed: {path}: cannot be written: No space left on device"
    assert "says too little" in caplog.text


def test_an_outgrown_map_is_removed_and_written_when_there_is_room(
    path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = output.Output(str(path), "posthoc")
    made.write(dirty(1))
    fill(path)
    made.check(lambda: dirty(1))
    assert path.exists()
    made.check(lambda: dirty(1, 2))
    assert not path.exists()
    made.write(dirty(1, 2))
    assert carrier.read(path) == dirty(1, 2)
    assert made.failure is None
    assert "No space left" in caplog.text


def test_the_last_map_takes_the_place_of_the_first_or_there_is_none(
    path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One that says everything still may stay, though another could not be written."""
    made = output.Output(str(path), "posthoc")
    made.write(dirty(1))
    fill(path)
    made.write(dirty(1))
    assert carrier.read(path) == dirty(1)
    made.write(dirty(2))
    assert not path.exists()
    assert made.failure is not None
    assert "No space left" in caplog.text
