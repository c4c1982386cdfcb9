# SPDX-License-Identifier: Apache-2.0
"""posthoc diff: where two images differ, offline; exits like cmp."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from dirtymap.images import base
from dirtymap.qcow2 import carrier
from posthoc import bar, exits, report
from posthoc.commands import options, reading
from posthoc.sessions import offline, pair
from scanner import progress


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "diff",
        help="compare two images that nobody writes",
        description="Compare LIVE with REFERENCE, which nobody may write meanwhile, and say how much "
        "differs; -o writes the dirty map. Exits with 0 when they are identical, 1 when they differ, "
        "3 when parts could not be read: these count as differing.",
    )
    parser.add_argument("live", metavar="LIVE", help="the disk")
    parser.add_argument("reference", metavar="REFERENCE", help="the backup to compare it with")
    parser.add_argument("-o", "--output", metavar="MAP", help="write the dirty map here")
    options.granularity(parser)
    options.bitmap(parser)
    reading.scan(parser)
    reading.access(parser)
    options.json_flag(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Compare, show what was found, and write the map."""
    if arguments.output is not None:
        pair.check_map(arguments.output, arguments.live, arguments.reference)

    def check(live: base.Image, granularity: int) -> None:
        if arguments.output is not None:
            # A map that no carrier can hold is told before the work, not after.
            carrier.layout(live.size, granularity, arguments.bitmap)

    with bar.shown() as watch:
        result = offline.compare(request(arguments), watch=watch, check=check)
    facts = _facts(arguments, result)
    sys.stdout.write(report.as_json(facts) if arguments.json else report.as_text(facts))
    sys.stdout.flush()
    met_errors = tell(result.statistics, result.notes)
    if arguments.output is not None:
        # After the totals: hours of reading are worth something also where the map finds no room.
        carrier.write(arguments.output, result.dirty, arguments.bitmap)
    return met_errors or (exits.DIFFERS if facts["dirty"] else exits.DONE)


def request(arguments: argparse.Namespace) -> offline.Request:
    """Return what was asked for, for diff and verify."""
    return offline.Request(
        live=arguments.live,
        reference=arguments.reference,
        granularity=arguments.granularity,
        rate=arguments.rate,
        workers=arguments.workers,
        without=reading.without(arguments),
        allow_shrunk=arguments.allow_shrunk,
        options=reading.image_options(arguments),
    )


def tell(statistics: progress.ScanStatistics, notes: tuple[str, ...]) -> int:
    """Tell on stderr what is to be known of a comparison; return exit code 3 if it met errors, else 0."""
    for note in notes:
        print(f"posthoc: {note}", file=sys.stderr)
    if statistics.state == progress.FAILED:
        print(f"posthoc: {statistics.failure}: what is left counts as dirty", file=sys.stderr)
        return exits.READ_ERROR
    if statistics.error_count:
        print(
            f"posthoc: {statistics.error_count} places could not be read: they count as dirty",
            file=sys.stderr,
        )
        return exits.READ_ERROR
    return 0


def _facts(arguments: argparse.Namespace, result: offline.Result) -> dict[str, Any]:
    now = result.statistics
    facts = {
        "state": now.state,
        "live": arguments.live,
        "reference": arguments.reference,
        "size": now.size,
        "granularity": now.granularity,
        "scanned": now.scanned,
        "skipped": now.skipped,
        "differing": now.differing,
        "dirty": result.dirty.dirty_bytes(),
        "errors": now.error_count,
        "error_list": offline.error_texts(now),
        "savings": now.savings,
    }
    if arguments.output is not None:
        facts["map"] = arguments.output
    return facts
