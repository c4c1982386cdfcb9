# SPDX-License-Identifier: Apache-2.0
"""posthoc verify: does a dirty map cover every difference between two images?"""

from __future__ import annotations

import argparse
import itertools
import sys
from typing import Any

from dirtymap import bitmap, errors, units
from dirtymap.images import base
from dirtymap.qcow2 import carrier
from posthoc import bar, exits, report
from posthoc.commands import diff, options, reading, show_map
from posthoc.sessions import offline

# Missed extents shown to people; --json has all of them.
_SHOWN = 20


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "verify",
        help="does a map cover every difference between two images?",
        description="Compare LIVE with REFERENCE and say which differences MAP misses, and how much it "
        "names needlessly. Exits with 0 when it misses nothing, 1 when it misses some, 3 when parts "
        "could not be read and nothing else is missed.",
    )
    parser.add_argument(
        "map", metavar="MAP", help="a carrier, or any qcow2 with persistent bitmaps"
    )
    parser.add_argument("live", metavar="LIVE", help="the disk")
    parser.add_argument("reference", metavar="REFERENCE", help="the backup to compare it with")
    parser.add_argument("--bitmap", metavar="NAME", help="which bitmap, where there are several")
    reading.scan(parser)
    reading.access(parser)
    options.json_flag(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Compare the images at the map's granularity and judge the map by that."""
    info = show_map.choose(arguments.map, arguments.bitmap)
    judged = carrier.read(arguments.map, info.name)
    # Other tools make maps coarser than a scan is; the difference is coarsened to fit.
    arguments.granularity = min(judged.granularity, units.LARGEST_GRANULARITY)

    def check(live: base.Image, _: int) -> None:
        # A carrier's size is whole sectors: a raw disk's may be less.
        if judged.size != -(-live.size // 512) * 512:
            raise errors.MapError(
                arguments.map,
                f"is of a disk of {units.describe(judged.size)}, "
                f"{live.name} has {units.describe(live.size)}",
            )

    with bar.shown() as watch:
        result = offline.compare(diff.request(arguments), watch=watch, check=check)
    facts = _facts(arguments, judged, result)
    sys.stdout.write(report.as_json(facts) if arguments.json else _text(facts))
    trouble = diff.tell(result.statistics, result.notes)
    return exits.DIFFERS if facts["missed"] else trouble


def _facts(
    arguments: argparse.Namespace, judged: bitmap.Bitmap, result: offline.Result
) -> dict[str, Any]:
    differing = result.dirty.coarsened(judged.granularity)
    # The same segments, but for a tail of less than a sector.
    marked = bitmap.Bitmap(differing.size, differing.granularity, judged.data)
    missed, needless = _without(differing, marked), _without(marked, differing)
    return {
        "map": arguments.map,
        "live": arguments.live,
        "reference": arguments.reference,
        "size": differing.size,
        "granularity": differing.granularity,
        "differing": differing.dirty_bytes(),
        "dirty": marked.dirty_bytes(),
        "missed": missed.dirty_bytes(),
        "missed_segments": missed.count(),
        "needless": needless.dirty_bytes(),
        "needless_segments": needless.count(),
        "errors": result.statistics.error_count,
        "error_list": offline.error_texts(result.statistics),
        "missed_extents": _extents(missed),
        "needless_extents": _extents(needless),
    }


def _extents(bits: bitmap.Bitmap) -> list[dict[str, int]]:
    return [{"start": extent.start, "length": extent.length} for extent in bits.extents()]


def _without(one: bitmap.Bitmap, other: bitmap.Bitmap) -> bitmap.Bitmap:
    """Return what is set in `one` and not in `other`, of the same geometry."""
    left = one.copy()
    left.data &= ~other.data
    return left


def _text(facts: dict[str, Any]) -> str:
    lines = [f"{key}: {facts[key]}" for key in ("map", "live", "reference")]
    lines += [
        f"{key}: {units.describe(facts[key])}"
        for key in ("size", "granularity", "differing", "dirty")
    ]
    lines += [
        f"{key}: {units.describe(facts[key])}, {facts[f'{key}_segments']} segments"
        for key in ("missed", "needless")
    ]
    lines += [f"errors: {'; '.join([str(facts['errors']), *facts['error_list']])}"]
    for key in ("missed", "needless"):
        extents = facts[f"{key}_extents"]
        lines += [
            f"{key} at {extent['start']}: {extent['length']}"
            for extent in itertools.islice(extents, _SHOWN)
        ]
        if len(extents) > _SHOWN:
            lines.append(f"and {len(extents) - _SHOWN} more extents {key} (--json lists all)")
    return "\n".join(lines) + "\n"
