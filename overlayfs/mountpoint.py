# SPDX-License-Identifier: Apache-2.0
"""The place where the file system is mounted: is it fit, who is mounted there, what takes it away.

What is mounted is read from /proc/self/mountinfo (proc(5)), never by looking into the mount: a stat() of
a file system whose server hangs, hangs too. For the same reason the process that *is* the server lets a
child ask or unmount: a thread of its own, waiting in the kernel for its own answer, could not be killed,
would keep /dev/fuse open, and would so be waited for by itself for ever.
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from dirtymap import errors

# As many as the kernel follows (path_resolution(7)).
_MOST_LINKS = 40

_OWNER = re.compile(r"(?:^|,)user_id=([0-9]+)(?:,|$)")
_ESCAPE = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of mountinfo; `identity` is unique while the mount stands.

    `owner` is the user who has mounted it, where the file system says so, as FUSE does.
    """

    identity: int
    path: str
    kind: str
    source: str
    owner: int | None = None


def mounts() -> list[Mount]:
    """Return what is mounted in this process's namespace, in the order it was."""
    return parse(os.fsdecode(Path("/proc/self/mountinfo").read_bytes()))


def parse(text: str) -> list[Mount]:
    """Return the mounts that a mountinfo (proc(5)) lists."""
    # Not splitlines(): the kernel escapes the newline of a name, but no other end of a line that Unicode knows.
    return [_parse(line) for line in text.split("\n") if line]


def _parse(line: str) -> Mount:
    # 36 35 98:0 / /mnt rw,noatime master:1 - ext3 /dev/root rw: the dash ends the optional fields.
    left, right = line.split(" - ", 1)
    identity, _parent, _device, _root, path = left.split(" ")[:5]
    kind, source, options = right.split(" ")[:3]
    owner = _OWNER.search(options)
    return Mount(
        int(identity), _unescape(path), kind, _unescape(source), int(owner[1]) if owner else None
    )


def _unescape(text: str) -> str:
    """Undo what the kernel writes for a blank, tab, newline and backslash."""
    return _ESCAPE.sub(lambda match: chr(int(match[1], 8)), text)


def find(path: str) -> Mount | None:
    """Return what is mounted on `path` (absolute, without links): the uppermost, or None."""
    found = [mount for mount in mounts() if mount.path == path]
    return found[-1] if found else None


def resolve(path: str | os.PathLike[str]) -> str:
    """Return `path` absolute and without links; what something is mounted on is not looked at."""
    for _ in range(_MOST_LINKS):
        parent, name = os.path.split(os.path.abspath(path))
        parent = os.path.realpath(parent)
        resolved = os.path.join(parent, name)
        if find(resolved) is not None or not os.path.islink(resolved):
            break
        path = os.path.join(parent, os.readlink(resolved))
    return resolved


def check(path: str | os.PathLike[str]) -> str:
    """Return the resolved path of `path` if one can mount there, else raise UserError."""
    resolved = resolve(path)
    mount = find(resolved)
    if mount is not None:
        raise errors.UserError(
            f"{os.fspath(path)}: {mount.kind} is mounted here already: unmount it or choose another"
        )
    try:
        if not stat.S_ISDIR(os.stat(resolved).st_mode):
            raise errors.UserError(f"{os.fspath(path)}: not a directory")
        with os.scandir(resolved) as entries:
            empty = next(entries, None) is None
    except OSError as error:
        reason = "no such directory" if isinstance(error, FileNotFoundError) else error.strerror
        raise errors.UserError(f"{os.fspath(path)}: {reason}") from None
    if not empty:
        raise errors.UserError(f"{os.fspath(path)}: the directory is not empty")
    return resolved


def unmount_command(path: str, *, lazy: bool) -> list[str]:
    """Return the command that unmounts `path`; lazily: now for new openers, later for the open files."""
    if os.geteuid() == 0:
        # --internal-only: no helper of the type's; --no-canonicalize: do not look at the mountpoint.
        umount = os.environ.get("POSTHOC_UMOUNT", "umount")
        return [umount, "--internal-only", "--no-canonicalize", *["--lazy"] * lazy, path]
    fusermount = os.environ.get("POSTHOC_FUSERMOUNT", "fusermount3")
    return [fusermount, "-u", *["-z"] * lazy, "--", path]


def stat_command(path: str) -> list[str]:
    """Return the command that asks the file system on `path` for its size, which only its server knows."""
    return [os.environ.get("POSTHOC_STAT", "stat"), "--file-system", "--format=%b", path]
