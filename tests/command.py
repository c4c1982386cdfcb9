# SPDX-License-Identifier: Apache-2.0
"""The command as a user runs it: `python -m posthoc VERB ...` of this tree."""

import contextlib
import itertools
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from tests import wait

Path = str | os.PathLike[str]
ROOT = pathlib.Path(__file__).resolve().parent.parent
TIMEOUT = 300.0


def words(*arguments: Path) -> list[str]:
    """Return the command line of `posthoc ARGUMENTS`, for Popen."""
    return [sys.executable, "-m", "posthoc", *(os.fspath(word) for word in arguments)]


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return an environment in which this tree's packages are found from any folder."""
    return {**os.environ, "PYTHONPATH": str(ROOT), **(extra or {})}


def posthoc(
    *arguments: Path,
    status: int | None = 0,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run the command to its end; AssertionError unless it exits with `status` (None: any)."""
    result = subprocess.run(
        words(*arguments),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        env=environment(env),
        cwd=cwd,
    )
    assert status is None or result.returncode == status, (
        f"posthoc {' '.join(map(str, arguments))}\nstatus {result.returncode}, not {status}\n"
        f"{result.stdout}{result.stderr}"
    )
    return result


def children(pid: int) -> list[int]:
    """Return the children of all of a process's threads: each stands with the thread that made it."""
    lists = pathlib.Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for file in lists for child in file.read_text().split()]


def is_mounted(folder: Path) -> bool:
    """Return whether something is mounted exactly there; a dead mount counts too."""
    wanted = os.path.realpath(folder)
    lines = pathlib.Path("/proc/self/mountinfo").read_text().splitlines()
    return any(line.split()[4] == wanted for line in lines)


@contextlib.contextmanager
def mounted(
    live: Path,
    reference: Path,
    mountpoint: pathlib.Path,
    *options: Path,
    env: Mapping[str, str] | None = None,
) -> Iterator[pathlib.Path]:
    """Mount in the background and yield MOUNTPOINT; unmount, however the block ends."""
    posthoc("mount", *options, live, reference, mountpoint, env=env)
    try:
        yield mountpoint
    except BaseException:
        # What the block raised is the news; whatever holds a file there must not hide it.
        subprocess.run(["umount", "--lazy", str(mountpoint)], check=False, capture_output=True)
        raise
    if is_mounted(mountpoint):
        posthoc("umount", mountpoint)


@contextlib.contextmanager
def in_foreground(
    live: Path, reference: Path, mountpoint: Path, *options: Path
) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """Run `mount --foreground --json` and yield it with what it told when the disk was there.

    Only then a signal means the end of a mount: before, it means that nothing came of it. Killed in the end.
    """
    session = subprocess.Popen(
        words("mount", "--foreground", "--json", *options, live, reference, mountpoint),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert session.stdout is not None
        lines = itertools.takewhile(
            lambda line: line not in ("}\n", ""), iter(session.stdout.readline, None)
        )
        yield session, json.loads("".join(lines) + "}")
    finally:
        session.kill()
        session.communicate()


def status(mountpoint: pathlib.Path) -> dict[str, Any]:
    """Return status.json of a mount."""
    result: dict[str, Any] = json.loads((mountpoint / "status.json").read_text())
    return result


def until_state(mountpoint: pathlib.Path, *states: str) -> dict[str, Any]:
    """Wait until the scan is in one of `states` and return the status then."""
    wait.until(lambda: status(mountpoint)["state"] in states, f"the scan is {' or '.join(states)}")
    return status(mountpoint)


def control(mountpoint: pathlib.Path, line: str) -> None:
    """Write one command to the control file; OSError if it is refused."""
    descriptor = os.open(mountpoint / "control", os.O_WRONLY)
    try:
        os.write(descriptor, line.encode() + b"\n")
    finally:
        os.close(descriptor)
