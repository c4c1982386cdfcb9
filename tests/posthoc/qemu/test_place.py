# SPDX-License-Identifier: Apache-2.0
"""The private folder: whose it is, how long it stays, and how a dead session's is told apart."""

import os
import pathlib
import stat

import pytest
import trio

from dirtymap import errors
from posthoc.qemu import place, qmp
from tests.posthoc.qemu import running


async def test_folder_goes_with_its_session() -> None:
    """It is passable for QEMU, its socket's folder is private, and nothing stays."""
    with running.folder() as parent:
        async with place.made(str(parent), None) as made:
            assert made.folder.parent == parent
            assert stat.S_IMODE(made.folder.stat().st_mode) == 0o711
            assert stat.S_IMODE(pathlib.Path(made.socket).parent.stat().st_mode) == 0o700
            made.carrier(0).write_bytes(b"x")
        assert list(parent.iterdir()) == []


async def test_qemu_of_another_user_gets_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Root gives the socket's folder and the maps to QEMU's user, and nothing else."""
    given = []
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(os, "chown", lambda path, *owner, **_: given.append((path.name, *owner)))
    with running.folder() as parent:
        async with place.made(str(parent), qmp.Peer(1, 101, 102)) as made:
            made.give_to_qemu(made.carrier(0))
    assert given == [("nbd", 101, 102), ("0.qcow2", 101, 102)]


async def test_qemu_of_another_user_needs_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who can neither be QEMU's user nor give it anything is told so."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with running.folder() as parent, pytest.raises(errors.UserError, match="runs as user 101"):
        async with place.made(str(parent), qmp.Peer(1, 101, 102)):
            pytest.fail("made")


async def test_living_session_is_not_taken_for_a_dead_one() -> None:
    """As long as it lives that can be told by its token alone, also within this very process."""
    with running.folder() as parent:
        async with place.made(str(parent), None) as made:
            assert place.is_alive(made.token)
            place.remove_dead(str(parent))
            assert made.folder.exists()
        assert not place.is_alive(made.token)


async def test_dead_session_s_folder_is_removed() -> None:
    """What kill -9 leaves goes; other folders are not touched."""
    with running.folder() as parent:
        dead = parent / "posthoc-attach-01234567"
        other = parent / "posthoc-attach-mine"
        for folder in (dead, other):
            folder.mkdir()
        assert not place.is_alive("01234567")
        place.remove_dead(str(parent))
        assert list(parent.iterdir()) == [other]


async def test_folder_with_a_server_in_it_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """While a QEMU listens there the next session has to learn whose server that is."""
    monkeypatch.setattr(place, "_PATIENCE", 0.05)
    with running.folder() as parent, trio.socket.socket(trio.socket.AF_UNIX) as server:
        async with place.made(str(parent), None) as made:
            await server.bind(made.socket)
            server.listen(100)
        place.remove_dead(str(parent))
        assert place.has_socket(made.folder)
        server.close()
        place.remove_dead(str(parent))
        assert list(parent.iterdir()) == []


async def test_folder_that_cannot_be_had(tmp_path: pathlib.Path) -> None:
    """No such folder, or a path too long for a socket, is told in one line."""
    for parent in ("/nowhere/at/all", str(tmp_path / ("x" * 100))):
        with pytest.raises(errors.UserError):
            async with place.made(parent, None):
                pytest.fail("made")
