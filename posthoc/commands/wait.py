# SPDX-License-Identifier: Apache-2.0
"""`posthoc wait`: block until a mount's scan is over, and its map written where one was asked for."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import rich.console
import rich.progress

from dirtymap import errors
from posthoc import exits, report
from posthoc.commands import options, status

_REFRESH = 0.25

# How the scan ended -> exit code. A map is valid in every case.
_ENDS = {"complete": exits.DONE, "cancelled": exits.MISTAKE, "failed": exits.READ_ERROR}


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "wait",
        help="block until the scan is over and its map written",
        description=(
            "Wait until the scan of MOUNTPOINT is over, and until its map is written where the mount has an "
            "--output, with a progress bar on a terminal. Exits with 0 when the scan is complete, 3 when parts "
            "could not be read or the scan has failed, 2 when it was cancelled or the map cannot be written."
        ),
    )
    parser.add_argument("mountpoint", metavar="MOUNTPOINT")
    options.json_flag(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Wait, then show the last status (JSON) and return the exit code for how the scan ended."""
    facts = _wait(arguments.mountpoint)
    if arguments.json:
        sys.stdout.write(report.as_json(facts))
    code = _ENDS[facts["state"]]
    if facts["state"] != "complete":
        print(f"posthoc: the scan is {facts['state']}", file=sys.stderr)
    elif facts["errors"]:
        print(
            f"posthoc: {facts['errors']} places could not be read: they count as dirty",
            file=sys.stderr,
        )
        code = exits.READ_ERROR
    if facts["output_failure"]:
        print(f"posthoc: the map is not safely written: {facts['output_failure']}", file=sys.stderr)
        code = exits.MISTAKE
    return code


def _wait(mountpoint: str) -> dict[str, Any]:
    facts = status.read(mountpoint)
    console = rich.console.Console(stderr=True)
    columns = (
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.DownloadColumn(binary_units=True),
        rich.progress.TextColumn("{task.fields[eta]}"),
    )
    with rich.progress.Progress(
        *columns, console=console, disable=not console.is_terminal, auto_refresh=False
    ) as progress:
        task = progress.add_task(facts["state"], total=facts["size"], eta="")
        while facts["state"] not in _ENDS or facts["output_due"]:
            eta = "" if facts["eta"] is None else report.duration(facts["eta"])
            progress.update(
                task, completed=facts["scanned"], description=facts["state"], eta=eta, refresh=True
            )
            time.sleep(_REFRESH)
            facts = _next(mountpoint)
        progress.update(
            task, completed=facts["scanned"], description=facts["state"], eta="", refresh=True
        )
    return facts


def _next(mountpoint: str) -> dict[str, Any]:
    try:
        return status.read(mountpoint)
    except errors.UserError as error:
        raise errors.UserError(f"the mount ended before its scan was over ({error})") from None
