# SPDX-License-Identifier: Apache-2.0
"""posthoc merge: the OR of several dirty maps of one disk."""

from __future__ import annotations

import argparse
import json

from dirtymap import bitmap, errors, units
from dirtymap.qcow2 import carrier
from posthoc import exits
from posthoc.commands import options, show_map
from posthoc.sessions import pair


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "merge",
        help="write a map of what is dirty in any of several maps",
        description="Write a map of what is dirty in any of several maps of one disk. The result "
        "has the coarsest of their granularities.",
    )
    parser.add_argument("maps", metavar="MAP", nargs="+", help="maps of disks of one size")
    parser.add_argument("-o", "--output", metavar="MAP", required=True, help="the map to write")
    parser.add_argument(
        "--bitmap",
        metavar="NAME",
        help="the result's name (posthoc), and which one to read from a MAP that holds several",
    )
    options.json_flag(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Merge the maps."""
    pair.check_map(arguments.output)
    merged = merge(arguments.maps, arguments.bitmap)
    name = arguments.bitmap or carrier.DEFAULT_NAME
    carrier.write(arguments.output, merged, name)
    facts = {
        "map": arguments.output,
        "bitmap": name,
        "size": merged.size,
        "granularity": merged.granularity,
        "dirty": merged.dirty_bytes(),
    }
    if arguments.json:
        print(json.dumps(facts))
    else:
        print(f"{arguments.output}: {units.describe(facts['dirty'])} dirty")
    return exits.DONE


def merge(paths: list[str], name: str | None) -> bitmap.Bitmap:
    """The OR of the maps at `paths`; one of them at a time is in memory. Raises UserError."""
    chosen = [(path, _choose(path, name)) for path in paths]
    first_path, first = chosen[0]
    for path, info in chosen:
        if info.size != first.size:
            raise errors.MapError(
                path,
                f"is of a disk of {units.describe(info.size)}, "
                f"{first_path} of one of {units.describe(first.size)}",
            )
    merged = bitmap.Bitmap(first.size, max(info.granularity for _, info in chosen))
    for path, info in chosen:
        merged.update(carrier.read(path, info.name).coarsened(merged.granularity))
    return merged


def _choose(path: str, name: str | None) -> carrier.BitmapInfo:
    """The only bitmap whatever its name, or the one called `name` among several."""
    found = carrier.names(path)
    return found[0] if len(found) == 1 else show_map.choose(path, name)
