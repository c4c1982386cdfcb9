# SPDX-License-Identifier: Apache-2.0
"""posthoc estimate: is a diff worth it, or is a new full backup the better choice?"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from dirtymap import errors, units
from posthoc import exits, report
from posthoc.commands import options, reading
from posthoc.sessions import offline, pair
from scanner import estimate

INCREMENTAL, FULL, EITHER = "incremental", "full", "either"

_ADVICE = {
    INCREMENTAL: "scan, then an incremental backup",
    FULL: "a full backup",
    EITHER: "either: too close to tell",
    None: "unknown: too little was read to measure how fast",
}


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "estimate",
        help="tell in seconds how much differs, and whether a scan is worth it",
        description="Read the extent maps and a random sample of LIVE and REFERENCE, and tell how much "
        "differs (with its 95 % interval), how long a scan, the incremental and a full backup would "
        "take, and which is the better choice. Nobody may write LIVE meanwhile.",
    )
    parser.add_argument("live", metavar="LIVE", help="the disk")
    parser.add_argument("reference", metavar="REFERENCE", help="the backup to compare it with")
    options.granularity(parser)
    parser.add_argument(
        "--samples",
        type=options.checked(_positive, "number"),
        default=estimate.SAMPLES,
        metavar="N",
        help=f"segments to draw at most ({estimate.SAMPLES})",
    )
    parser.add_argument(
        "--seconds",
        type=options.checked(_positive, "number"),
        default=round(estimate.SECONDS),
        metavar="N",
        help=f"time to take, about ({estimate.SECONDS:.0f})",
    )
    parser.add_argument(
        "--backup-rate",
        type=options.size,
        metavar="SIZE",
        help="what the backup's storage takes a second (as much as LIVE gives)",
    )
    reading.shortcuts(parser)
    parser.add_argument(
        "--allow-shrunk",
        action="store_true",
        help="compare a live disk that is shorter than the reference",
    )
    reading.access(parser)
    options.json_flag(parser)
    parser.set_defaults(run=run)


def _positive(text: str) -> int:
    number = units.parse_size(text)
    if number == 0:
        raise errors.UserError("it must be more than 0")
    return number


def run(arguments: argparse.Namespace) -> int:
    """Estimate, and show it."""
    with pair.open_pair(
        arguments.live,
        arguments.reference,
        options=reading.image_options(arguments),
        allow_shrunk=arguments.allow_shrunk,
    ) as opened:
        granularity = arguments.granularity or offline.natural_granularity(opened.reference)
        found = estimate.estimate(
            opened.reader,
            opened.reference,
            granularity,
            samples=arguments.samples,
            seconds=arguments.seconds,
            without=reading.without(arguments),
        )
    facts = _facts(arguments, found)
    if arguments.json:
        sys.stdout.write(report.as_json(facts))
    else:
        _show(facts)
    for note in opened.notes:
        print(f"posthoc: {note}", file=sys.stderr)
    if found.unreadable:
        print("posthoc: parts could not be read: they count as differing", file=sys.stderr)
        return exits.READ_ERROR
    return exits.DONE


def _facts(arguments: argparse.Namespace, found: estimate.Estimate) -> dict[str, Any]:
    rate = found.read_rate
    if rate is not None and arguments.backup_rate:
        rate = min(rate, arguments.backup_rate)
    low, about, high = found.differing()
    scan = found.scan_seconds

    def seconds(size: int) -> float | None:
        return round(size / rate, 3) if rate else None

    return {
        "live": arguments.live,
        "reference": arguments.reference,
        "size": found.size,
        "granularity": found.granularity,
        "known": found.known,
        "to_read": found.to_read,
        "sampled": found.drawn,
        "sampled_differing": found.drawn_differing,
        "share": {"low": found.low, "about": found.share, "high": found.high},
        "differing": {"low": low, "about": about, "high": high},
        "confidence": estimate.CONFIDENCE,
        "scan_seconds": None if scan is None else round(scan, 3),
        "incremental_seconds": {
            "low": seconds(low),
            "about": seconds(about),
            "high": seconds(high),
        },
        "full": found.data,
        "full_seconds": seconds(found.data),
        "scan_rate": found.scan_rate,
        "read_rate": found.read_rate,
        "break_even_rate": round((found.data - about) / scan)
        if scan and about < found.data
        else None,
        "choice": _choice(scan, seconds(low), seconds(high), seconds(found.data)),
        "took": round(found.took, 3),
    }


def _choice(
    scan: float | None, low: float | None, high: float | None, full: float | None
) -> str | None:
    """Return what surely takes less time, within the interval."""
    if scan is None or low is None or high is None or full is None:
        return None
    if scan + high < full:
        return INCREMENTAL
    return FULL if scan + low > full else EITHER


def _show(facts: dict[str, Any]) -> None:
    # Imported here: whoever asks for JSON need not wait for it.
    import rich.box
    import rich.console
    import rich.table

    console = rich.console.Console(highlight=False)
    share, differing = facts["share"], facts["differing"]
    console.print(
        f"{_percent(share['about'])} of {units.human(facts['size'])} differs "
        f"({_percent(share['low'])} to {_percent(share['high'])}, {facts['confidence']:.0%} sure): "
        f"{facts['sampled_differing']} of {facts['sampled']} segments of "
        f"{units.human(facts['granularity'])} drawn",
        soft_wrap=True,
    )
    table = rich.table.Table(box=rich.box.SIMPLE)
    table.add_column("")
    for title in ("bytes", "seconds"):
        table.add_column(title, justify="right")
    times = facts["incremental_seconds"]
    table.add_row(
        "scan: reads of each", units.human(facts["to_read"]), _time(facts["scan_seconds"])
    )
    table.add_row("incremental: about", units.human(differing["about"]), _time(times["about"]))
    table.add_row("incremental: at most", units.human(differing["high"]), _time(times["high"]))
    table.add_row("full backup: at most", units.human(facts["full"]), _time(facts["full_seconds"]))
    console.print(table)
    console.print(f"quicker: {_ADVICE[facts['choice']]}", soft_wrap=True)
    if facts["break_even_rate"] is not None:
        console.print(
            "the incremental is quicker wherever the backup's storage takes less than "
            f"{units.human(facts['break_even_rate'])} a second",
            soft_wrap=True,
        )


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _time(seconds: float | None) -> str:
    return (
        "-" if seconds is None else report.duration(seconds) if seconds >= 1 else f"{seconds:.2f} s"
    )
