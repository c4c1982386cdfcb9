# SPDX-License-Identifier: Apache-2.0
"""Mounts of posthoc as the kernel lists them, seen from outside of the session that serves them.

Nothing here touches the mount itself, which may be stuck: /proc answers for it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from overlayfs import mountpoint

FSTYPE = "fuse.posthoc"


@dataclass(frozen=True)
class Holder:
    """Who keeps a mount busy: a process, or the kernel (pid 0) for a device."""

    pid: int
    command: str

    def __str__(self) -> str:
        return f"{self.command} (pid {self.pid})" if self.pid else self.command


def is_mounted(where: str) -> bool:
    """Return whether posthoc is mounted on `where`, a resolved path."""
    return find(where) is not None


def find(where: str) -> mountpoint.Mount | None:
    """Return posthoc's mount on `where`, a resolved path; None where there is none."""
    mount = mountpoint.find(where)
    return mount if mount is not None and mount.kind == FSTYPE else None


def holders(where: str) -> list[Holder]:
    """Return the processes that have something beneath `where` open, as far as one may see."""
    found = {holder for holder in _process_holders(where) if holder.pid != os.getpid()}
    return sorted(found | set(_loop_holders(where)), key=lambda holder: holder.pid)


def _process_holders(where: str) -> Iterator[Holder]:
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            links = [process / "cwd", process / "root", *(process / "fd").iterdir()]
            if any(_beneath(link, where) for link in links) or _maps(process, where):
                yield Holder(
                    int(process.name), os.fsdecode((process / "comm").read_bytes()).strip()
                )


def _beneath(link: Path, where: str) -> bool:
    try:
        target = os.readlink(link)
    except OSError:
        return False
    return target == where or target.startswith(where + "/")


def _maps(process: Path, where: str) -> bool:
    return f" {where}/" in (process / "maps").read_text(errors="surrogateescape")


def _loop_holders(where: str) -> Iterator[Holder]:
    """Yield loop devices over a file of the mount: the kernel holds it, no process does."""
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):
            if os.fsdecode(backing.read_bytes()).startswith(where + "/"):
                yield Holder(0, f"/dev/{backing.parent.parent.name}")
