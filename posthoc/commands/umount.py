# SPDX-License-Identifier: Apache-2.0
"""`posthoc umount`: end a mount and its session, and tell how it ended."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time

from dirtymap import errors, state
from overlayfs import mountpoint
from posthoc import exits, mounts, report
from posthoc.commands import options

# Somebody may have the status open for a moment (a `posthoc wait`, a file manager).
_PATIENCE = 0.5
_BETWEEN = 0.05


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "umount",
        help="end a mount; its map is written if it has an --output",
        description="Unmount MOUNTPOINT and wait until its session has written its map and ended.",
    )
    parser.add_argument("mountpoint", metavar="MOUNTPOINT")
    parser.add_argument(
        "--lazy",
        action="store_true",
        help="take the mount away now, though files are open; it ends when they are closed",
    )
    options.json_flag(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Unmount, wait for the session, and return its exit code."""
    where = mountpoint.resolve(arguments.mountpoint)
    mount = mounts.find(where)
    if mount is None:
        raise errors.UserError(f"{arguments.mountpoint}: {_why_none(where)}")
    owner = os.geteuid() if mount.owner is None else mount.owner
    folder = state.find(where, owner)
    _unmount(where, lazy=arguments.lazy)
    if arguments.lazy:
        end = state.End(exits.DONE, "")
    elif folder is None:
        end = state.End(exits.MISTAKE, _UNKNOWN.format(where=where, owner=owner))
    else:
        end = _end(folder)
    _tell(end, where, as_json=arguments.json)
    return end.exit_code


_LOST = "the disk has what was written, the map is lost"
_UNKNOWN = (
    "{where} is unmounted; the session, of user {owner}, keeps its files where they are not found from here: "
    "whether it has ended, and written its map, is not known"
)


def _end(folder: state.Folder) -> state.End:
    """Wait for the session and return how it ended."""
    folder.wait_for_end()
    end = folder.end() or state.End(exits.MISTAKE, f"its session had died before: {_LOST}")
    if end.exit_code == exits.DONE:
        folder.discard()
    return end


def _why_none(where: str) -> str:
    folder = state.find(where, os.geteuid())
    if folder is not None and folder.is_served():
        return "is unmounted already, and its session ends when the files that are open are closed"
    if folder is not None and folder.log.exists() and folder.end() is None:
        # Where the session serves the disk, the keeper takes the mount away after it.
        return f"is not mounted any more, its session has died: {_LOST}"
    return "no posthoc is mounted here"


def _tell(end: state.End, where: str, *, as_json: bool) -> None:
    if as_json:
        facts = {"mountpoint": where, "exit_code": end.exit_code, "message": end.message}
        sys.stdout.write(report.as_json(facts))
    elif end.message:
        print(f"posthoc: {end.message}", file=sys.stderr)


def _unmount(where: str, *, lazy: bool) -> None:
    deadline = time.monotonic() + _PATIENCE
    while True:
        done = subprocess.run(
            mountpoint.unmount_command(where, lazy=lazy),
            capture_output=True,
            check=False,
        )
        if done.returncode == 0 or not mounts.is_mounted(where):
            return
        holders = mounts.holders(where)
        if time.monotonic() >= deadline:
            break
        time.sleep(_BETWEEN)
    if holders:
        who = ", ".join(map(str, holders))
        raise errors.UserError(f"{where}: is in use by {who}: close it first, or use --lazy")
    raise errors.UserError(f"{where}: cannot be unmounted: {os.fsdecode(done.stderr).strip()}")
