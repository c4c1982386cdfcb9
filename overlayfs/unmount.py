# SPDX-License-Identifier: Apache-2.0
"""Take the mount away, by a child: mountpoint.py says why."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable

import trio

from dirtymap import errors
from overlayfs import mountpoint


async def unmount(path: str, is_ours: Callable[[mountpoint.Mount], bool]) -> str | None:
    """Unmount `path` while what `is_ours` says is ours is mounted there; lazily if it is busy.

    Returns None when it is gone, else what the last command said.
    """
    said: str | None = None
    for lazy in (False, True):
        mount = mountpoint.find(path)
        if mount is None or not is_ours(mount):
            return None
        said = await _run(mountpoint.unmount_command(path, lazy=lazy))
    mount = mountpoint.find(path)
    return said if mount is not None and is_ours(mount) else None


async def _run(command: list[str]) -> str | None:
    """Run `command` in a child; return None if it succeeded, else what it said."""
    try:
        done = await trio.run_process(
            command, check=False, stdout=subprocess.DEVNULL, capture_stderr=True
        )
    except OSError as error:
        return f"{command[0]}: {errors.reason(error)}"
    if done.returncode == 0:
        return None
    said = os.fsdecode(done.stderr).strip()
    return said or f"{command[0]} ended with status {done.returncode}"
