# SPDX-License-Identifier: Apache-2.0
"""A mount over the native data path in other processes, as a test holds it."""

import contextlib
import dataclasses
import json
import os
import pathlib
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from overlayfs.datapath import keeper
from tests import builds, wait

ROOT = pathlib.Path(__file__).resolve().parents[3]
SEGMENT = 65536
# For one answer of a server that may have to be started first.
ANSWER = 30.0


@dataclasses.dataclass
class Native:
    """The first session's process and the folder with all there is: live, mnt, keeper, log, map."""

    process: subprocess.Popen[bytes]
    folder: pathlib.Path

    @property
    def live(self) -> pathlib.Path:
        return self.folder / "live"

    @property
    def mountpoint(self) -> pathlib.Path:
        return self.folder / "mnt"

    @property
    def disk(self) -> pathlib.Path:
        return self.mountpoint / "disk"

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    def ask(self, word: str) -> str:
        """Ask the keeper."""
        return keeper.ask(self.folder / "keeper", word)

    def pid(self, role: str) -> int:
        """Return the process that is "keeper", "server" or "session" now; waits until there is one."""

        def found() -> int:
            return int(self.ask("pids").split()[["keeper", "server", "session"].index(role)])

        return wait.until(found, f"there is a {role}")

    def kill(self, role: str) -> int:
        """Kill -9 what is `role` now, and return the pid of the one after it."""
        old = self.pid(role)
        os.kill(old, signal.SIGKILL)
        if role == "session" and old == self.process.pid:
            self.process.wait()

        def replaced() -> int:
            now = self.pid(role)
            return now if now != old else 0

        return wait.until(replaced, f"the next {role} is there")

    def facts(self) -> dict[str, Any]:
        """Return the mount's status.json, which only a session can answer."""
        facts: dict[str, Any] = json.loads((self.mountpoint / "status.json").read_bytes())
        return facts

    def written(self) -> set[int]:
        return spread(self.facts()["written"])

    def command(self, line: str) -> None:
        descriptor = os.open(self.mountpoint / "control", os.O_WRONLY)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)

    def is_mounted(self) -> bool:
        return f" {self.mountpoint} " in pathlib.Path("/proc/self/mountinfo").read_text()

    def end(self) -> set[int]:
        """End the session of this moment as a user would; return the segments of the map it leaves."""
        (self.folder / "map").unlink(missing_ok=True)
        os.kill(self.pid("session"), signal.SIGTERM)
        wait.until((self.folder / "map").exists, "the session has ended")
        wait.until(lambda: not self.is_mounted(), "the mount is gone")
        wait.until(lambda: not self.processes(), "no process is left")
        return spread(json.loads((self.folder / "map").read_text()))

    def processes(self) -> list[int]:
        """Return the living processes of this mount: all have its socket's path in their command line."""
        wanted = os.fsencode(self.folder / "keeper")
        found = []
        for entry in pathlib.Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    if wanted in (entry / "cmdline").read_bytes():
                        found.append(int(entry.name))
        return found

    def die(self) -> None:
        """Kill the session that this test has started."""
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def close(self) -> None:
        """End everything, whatever has become of it."""
        if self.is_mounted():
            subprocess.run(["umount", "--lazy", self.mountpoint], check=False)
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        wait.until(lambda: not self.processes(), "no process is left")


def spread(runs: list[list[int]]) -> set[int]:
    return {first + i for first, count in runs for i in range(count)}


def spawn(
    folder: pathlib.Path,
    program: pathlib.Path,
    *,
    faults: str = "",
    restart: bool = True,
    user: int | None = None,
    live: pathlib.Path | None = None,
    **options: Any,
) -> Native:
    """Start a session; its first line has not been read."""
    config = {
        "live": str(live or folder / "live"),
        "mountpoint": str(folder / "mnt"),
        "socket": str(folder / "keeper"),
        "map": str(folder / "map"),
        "restart": restart,
        "options": options,
    }
    (folder / "mnt").mkdir(exist_ok=True)
    environment = {"POSTHOC_DATAPATH": str(program), "POSTHOC_FAULTS": faults}
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.overlayfs.datapath.serve", json.dumps(config)],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            env={**os.environ, **environment, "PYTHONPATH": str(ROOT)},
            user=user,
        )
    return Native(process, folder)


def first_line(native: Native) -> str:
    """Return what the session says first."""
    assert native.process.stdout is not None
    ready, _, _ = select.select([native.process.stdout], [], [], wait.DEADLINE)
    assert ready, f"the session says nothing: {native.log}"
    return native.process.stdout.readline().decode().strip()


@contextlib.contextmanager
def serving(folder: pathlib.Path, program: pathlib.Path, **config: Any) -> Iterator[Native]:
    """Mount `folder`/live; at the end of the block nothing of it is left, and no sanitizer complained."""
    native = spawn(folder, program, **config)
    try:
        assert first_line(native) == f"mounted {native.mountpoint}", native.log
        yield native
    finally:
        native.close()
    builds.check(native.log)
    assert "Traceback" not in native.log, native.log


def spawn_adopting(folder: pathlib.Path) -> subprocess.Popen[bytes]:
    """Start a session that adopts the mount of `folder`; its first line has not been read."""
    config = json.dumps({"adopted": True, "socket": str(folder / "keeper")})
    with (folder / "log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.overlayfs.datapath.serve", config],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )


def read_map(folder: pathlib.Path) -> list[list[int]]:
    """Return the runs of the map that a session has left at its end."""
    runs: list[list[int]] = json.loads((folder / "map").read_text())
    return runs
