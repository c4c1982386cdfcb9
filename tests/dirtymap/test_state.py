# SPDX-License-Identifier: Apache-2.0
"""A session's private folder: one session at a time, how it ended, nobody else's."""

import fcntl
import os
import shutil
import stat
from pathlib import Path

import pytest

from dirtymap import errors, state


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> state.Folder:
    monkeypatch.setattr(state, "_root", lambda: tmp_path / "posthoc")
    made = state.Folder("/mnt/vm")
    made.make()
    return made


def test_everything_in_it_is_private(folder: state.Folder) -> None:
    folder.lock()
    folder.write("session.json", {"pid": 1})
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in folder.path.iterdir()} == {0o600}


def test_one_session_at_a_time(folder: state.Folder) -> None:
    folder.lock()
    with pytest.raises(errors.UserError, match="another posthoc session"):
        state.Folder("/mnt/vm").lock()
    other = state.Folder("/mnt/other")
    other.make()
    other.lock()


def test_who_only_looks_is_no_session(
    folder: state.Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`status` and `umount` share the lock for a moment; a mount that comes just then is not refused."""
    looking = os.open(folder.path / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(looking, fcntl.LOCK_SH)
    real = fcntl.flock

    def look_away_once_refused(fd: int, operation: int) -> None:
        try:
            real(fd, operation)
        except BlockingIOError:
            real(looking, fcntl.LOCK_UN)
            raise

    monkeypatch.setattr(fcntl, "flock", look_away_once_refused)
    folder.lock()
    os.close(looking)
    with pytest.raises(errors.UserError, match="another posthoc session"):
        state.Folder("/mnt/vm").lock()


@pytest.mark.parametrize(
    ("call", "before"),
    [
        pytest.param("mkdir", False, id="once-made"),
        pytest.param("open", True, id="before-its-lock-is-made"),
        pytest.param("open", False, id="before-its-lock-is-held"),
    ],
)
def test_a_folder_that_is_discarded_meanwhile_is_made_again(
    folder: state.Folder, monkeypatch: pytest.MonkeyPatch, call: str, before: bool
) -> None:
    """`umount` discards it when its session has ended, at the very moment that the next one begins."""
    real = getattr(os, call)
    left = [folder.path]

    def discard_at(when: bool, path: str | Path) -> None:
        if left and when == before and Path(path).is_relative_to(left[0]):
            shutil.rmtree(left.pop())

    def discarded(path: str | Path, *words: int, **more: int) -> object:
        discard_at(True, path)
        try:
            return real(path, *words, **more)
        finally:
            discard_at(False, path)

    monkeypatch.setattr(os, call, discarded)
    folder.lock()
    assert (folder.path / "lock").exists()


def test_how_it_ended(folder: state.Folder) -> None:
    assert folder.end() is None
    folder.write("end.json", {"exit_code": 3, "message": "two places"})
    assert folder.end() == state.End(3, "two places")
    folder.remove("end.json")
    assert folder.end() is None


def test_it_goes_when_no_session_lives_in_it(folder: state.Folder) -> None:
    folder.lock()
    state.Folder("/mnt/vm").discard()
    assert folder.path.exists()
    folder.discard()
    assert not folder.path.exists()
    state.Folder("/mnt/vm").discard()
    folder.lock()
    assert (folder.path / "lock").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"exit_code": "3", "message": "x"}'])
def test_what_cannot_be_read_says_nothing(folder: state.Folder, text: str) -> None:
    (folder.path / "end.json").write_text(text)
    assert folder.end() is None


def test_waiting_where_no_session_is_returns_at_once(folder: state.Folder) -> None:
    folder.wait_for_end()
    os.close(os.open(folder.path / "lock", os.O_CREAT | os.O_RDWR))
    folder.wait_for_end()


def test_a_folder_of_somebody_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "posthoc"
    monkeypatch.setattr(state, "_root", lambda: root)
    root.mkdir(mode=0o755)
    root.chmod(0o755)
    with pytest.raises(errors.UserError, match="private folder"):
        state.Folder("/mnt/vm").make()
    root.rmdir()
    root.symlink_to(tmp_path)
    with pytest.raises(errors.UserError, match="private folder"):
        state.Folder("/mnt/vm").make()


@pytest.fixture
def roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    found = [tmp_path / "run", tmp_path / "tmp"]
    monkeypatch.setattr(state, "_roots", lambda _: found)
    for root in found:
        state.Folder("/mnt/vm", root).make()
    return found


def test_the_session_that_lives_is_found_wherever_it_keeps_its_folder(roots: list[Path]) -> None:
    """umount took another environment's mount for one whose session had died."""
    living = state.Folder("/mnt/vm", roots[1])
    living.lock()
    found = state.find("/mnt/vm", os.geteuid())
    assert found is not None
    assert found.path == living.path


def test_a_session_that_died_is_found_and_one_that_ended_is_not(roots: list[Path]) -> None:
    state.Folder("/mnt/vm", roots[0]).write("end.json", {"exit_code": 0, "message": ""})
    found = state.find("/mnt/vm", os.geteuid())
    assert found is not None
    assert found.path.parent == roots[1]
    found.write("end.json", {"exit_code": 3, "message": "earlier"})
    assert state.find("/mnt/vm", os.geteuid()) is None
    assert state.find("/mnt/other", os.geteuid()) is None


def test_a_folder_of_somebody_else_says_nothing(roots: list[Path]) -> None:
    assert state.find("/mnt/vm", os.geteuid() + 1) is None
    for root in roots:
        state.Folder("/mnt/vm", root).path.chmod(0o755)
    assert state.find("/mnt/vm", os.geteuid()) is None


def test_where_a_user_s_sessions_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/elsewhere")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert list(map(str, state._roots(1000))) == [
        *("/run/elsewhere/posthoc", "/run/user/1000/posthoc", "/tmp/posthoc-1000"),
    ]
    assert list(map(str, state._roots(7))) == ["/run/user/7/posthoc", "/tmp/posthoc-7"]
    assert list(map(str, state._roots(0))) == ["/run/posthoc"]
