# SPDX-License-Identifier: Apache-2.0
"""`posthoc status`: what `cat MOUNTPOINT/status` shows, once or again and again."""

from __future__ import annotations

import argparse
import errno
import json
import os
import sys
import time
from typing import Any

import rich.console
import rich.live
import rich.text

from dirtymap import errors
from overlayfs import mountpoint
from posthoc import exits, mounts, report
from posthoc.commands import options

_REFRESH = 1.0


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "status", help="show how far a mount is", description="Show the status of MOUNTPOINT."
    )
    parser.add_argument("mountpoint", metavar="MOUNTPOINT")
    parser.add_argument("--watch", action="store_true", help="show it every second until Ctrl-C")
    options.json_flag(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Show it; with --watch until the mount ends or Ctrl-C."""
    if arguments.watch:
        return _watch(arguments.mountpoint, as_json=arguments.json)
    sys.stdout.write(_shown(read(arguments.mountpoint), as_json=arguments.json))
    return exits.DONE


def read(where: str) -> dict[str, Any]:
    """Return the facts of the mount at `where`; UserError where there is none that answers."""
    resolved = mountpoint.resolve(where)
    if not mounts.is_mounted(resolved):
        raise errors.UserError(f"{where}: no posthoc is mounted here")
    try:
        with open(os.path.join(resolved, "status.json"), "rb") as stream:
            facts: dict[str, Any] = json.load(stream)
            return facts
    except OSError as error:
        reason = errors.reason(error)
        if error.errno == errno.ENOTCONN:
            reason = "its session has died: take the mount away with posthoc umount"
        raise errors.UserError(f"{where}: {reason}") from None


def _shown(facts: report.Facts, *, as_json: bool) -> str:
    return report.as_json(facts) if as_json else report.as_text(facts)


def _watch(where: str, *, as_json: bool) -> int:
    facts = read(where)
    console = rich.console.Console()
    try:
        if as_json or not console.is_terminal:
            while True:
                sys.stdout.write(_shown(facts, as_json=as_json))
                sys.stdout.flush()
                time.sleep(_REFRESH)
                facts = read(where)
        with rich.live.Live(console=console, auto_refresh=False) as live:
            while True:
                live.update(rich.text.Text(report.as_text(facts).rstrip()), refresh=True)
                time.sleep(_REFRESH)
                facts = read(where)
    except KeyboardInterrupt:
        return exits.DONE
    except errors.UserError:
        if mounts.is_mounted(mountpoint.resolve(where)):
            raise
        print(f"posthoc: {where}: the mount has ended", file=sys.stderr)
        return exits.DONE
