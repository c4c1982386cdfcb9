# SPDX-License-Identifier: Apache-2.0
"""Who works for a mount over the native data path, found and killed.

session     answers for everything but the disk       killed: the keeper starts another
server      serves the disk                           killed: the keeper starts another
keeper      has every descriptor                      killed: the standby is the next one
standby     waits for the keeper's death              killed: the keeper starts another
"""

import collections
import contextlib
import itertools
import os
import pathlib
import signal
from collections.abc import Callable, Iterator

from dirtymap import state
from overlayfs.datapath import keeper, shared
from tests import command, wait

Path = pathlib.Path

# The session costs a start of Python, many times what the others cost.
TURN = ("session", *("server", "keeper", "standby") * 4)
ROLES = set(TURN)


def pid_of(mountpoint: Path) -> int:
    """Return the session that answers."""
    return int(command.status(mountpoint)["pid"])


def natives(mountpoint: Path) -> list[int]:
    """The processes of the mount's data path: keeper, standby and server."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
            if b"keeper" not in words or not words[0].endswith(b"posthoc-datapath"):
                continue
            held = {os.readlink(fd) for fd in (process / "fd").iterdir()}
        except OSError:
            continue
        if str(mountpoint.parent / "live.raw") in held:
            found.append(int(process.name))
    return found


@contextlib.contextmanager
def shared_memory(mountpoint: Path) -> Iterator[shared.Memory]:
    """What the mount's processes share, from one of them."""
    for fd in Path(f"/proc/{natives(mountpoint)[0]}/fd").iterdir():
        if os.readlink(fd).startswith("/memfd:posthoc"):
            memory = shared.Memory(os.open(fd, os.O_RDWR))
            break
    try:
        yield memory
    finally:
        memory.close()


class Turns:
    """Kills the processes of a mount, each role's in its turn, and counts them."""

    def __init__(self, mountpoint: Path, memory: shared.Memory) -> None:
        self._mountpoint = mountpoint
        self._memory = memory
        self._socket = state.Folder(str(mountpoint)).path / "keeper.sock"
        self.killed: collections.Counter[str] = collections.Counter()

    def kill(self, role: str) -> None:
        """Kill -9 who has `role` now, and return when another one has it and nobody is missing."""
        old = self._wait_until_complete()[role]
        os.kill(old, signal.SIGKILL)
        wait.until(lambda: self._wait_until_complete()[role] != old, f"the next {role}")
        if role == "session":
            assert pid_of(self._mountpoint) == self._wait_until_complete()[role]
        self.killed[role] += 1

    def kill_while(self, goes_on: Callable[[], bool]) -> None:
        """Kill one after the other as long as `goes_on()`: that has met the death of each."""
        killed = set()
        for role in itertools.cycle(TURN):
            if not goes_on():
                break
            self.kill(role)
            killed.add(role)
        assert killed == ROLES, killed

    def _wait_until_complete(self) -> dict[str, int]:
        roles = wait.until(self._complete, "keeper, server, standby and session are there")
        assert roles is not None
        return roles

    def _complete(self) -> dict[str, int] | None:
        first, server, session = map(int, keeper.ask(self._socket, "pids").split())
        standby = self._memory.header.standby_pid
        # A standby that has become the keeper stands there until it has one of its own.
        if 0 in (server, session, standby) or standby == first:
            return None
        return {"keeper": first, "server": server, "standby": standby, "session": session}


@contextlib.contextmanager
def turns(mountpoint: Path) -> Iterator[Turns]:
    """Kill what serves a mount."""
    with shared_memory(mountpoint) as memory:
        yield Turns(mountpoint, memory)


def kill_session(mountpoint: Path) -> None:
    """Kill the session and wait until another one answers."""
    replace_session(mountpoint, lambda: None)


def replace_session(mountpoint: Path, change: Callable[[], object]) -> None:
    """Kill the session with `change` done before the next one looks, and wait until that answers."""
    pid = pid_of(mountpoint)
    os.kill(pid, signal.SIGSTOP)
    change()
    os.kill(pid, signal.SIGKILL)
    wait.until(lambda: pid_of(mountpoint) != pid, "the next session answers")
