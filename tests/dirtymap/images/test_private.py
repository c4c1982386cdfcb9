# SPDX-License-Identifier: Apache-2.0
"""Private folders: nobody else's, and none left behind by the dead."""

import os
import pathlib
import subprocess
import sys
import tempfile

import pytest

from dirtymap.images import private


@pytest.fixture(autouse=True)
def temporary(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    monkeypatch.setattr(private, "_LONGEST_PARENT", 1000)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_it_is_ours_alone_until_it_is_removed(temporary: pathlib.Path) -> None:
    folder = private.Folder()
    path = pathlib.Path(folder.path)
    assert path.parent == temporary
    assert path.stat().st_mode & 0o777 == 0o700
    (path / "something").write_text("in it")
    folder.remove()
    assert list(temporary.iterdir()) == []
    folder.remove()


def test_the_living_keep_theirs(temporary: pathlib.Path) -> None:
    """Of this process and of others."""
    program = (
        "import sys, tempfile\n"
        "tempfile.tempdir = sys.argv[1]\n"
        "from dirtymap.images import private\n"
        "private._LONGEST_PARENT = 1000\n"
        "folder = private.Folder()\n"
        "print(folder.path, flush=True)\n"
        "sys.stdin.read()\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", program, str(temporary)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    assert other.stdin is not None
    assert other.stdout is not None
    try:
        theirs = other.stdout.readline().strip()
        first, second = private.Folder(), private.Folder()
        assert {str(path) for path in temporary.iterdir()} == {theirs, first.path, second.path}
        other.kill()
        other.wait()
        # Nobody has removed it: the next one does.
        third = private.Folder()
        left = {str(path) for path in temporary.iterdir()}
        assert left == {first.path, second.path, third.path}
        for folder in (first, second, third):
            folder.remove()
    finally:
        other.kill()
        other.wait()
        other.stdin.close()
        other.stdout.close()


def test_what_only_looks_like_one_is_left_alone(temporary: pathlib.Path) -> None:
    """Without a lock of ours in it, or with a link for it, it is not known to be abandoned."""
    unlocked, linked = temporary / "posthoc-image-mine", temporary / "posthoc-image-linked"
    unlocked.mkdir()
    (unlocked / "precious").write_text("keep me")
    linked.mkdir()
    (linked / "lock").symlink_to(unlocked / "precious")
    private.Folder().remove()
    assert (unlocked / "precious").read_text() == "keep me"
    assert linked.exists()


def test_a_parent_of_a_long_name_is_passed_over(
    temporary: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A socket in it could not be named."""
    monkeypatch.setattr(private, "_LONGEST_PARENT", 5)
    folder = private.Folder()
    assert os.path.dirname(folder.path) == "/tmp"
    folder.remove()
