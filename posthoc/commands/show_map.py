# SPDX-License-Identifier: Apache-2.0
"""posthoc map: what a dirty map says."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import numpy as np

from dirtymap import bitmap, errors, units
from dirtymap.qcow2 import carrier
from posthoc import exits
from posthoc.commands import options


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = subparsers.add_parser("map", help="show a dirty map: totals, or its extents")
    parser.add_argument(
        "map", metavar="MAP", help="a carrier, or any qcow2 with persistent bitmaps"
    )
    parser.add_argument("--bitmap", metavar="NAME", help="which bitmap, where there are several")
    parser.add_argument(
        "--extents", action="store_true", help="list the dirty extents as JSON, in bytes"
    )
    options.json_flag(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Show the map."""
    info = choose(arguments.map, arguments.bitmap)
    dirty = carrier.read(arguments.map, info.name)
    if arguments.extents:
        _print_extents(dirty)
    elif arguments.json:
        print(json.dumps(totals(arguments.map, info, dirty)))
    else:
        _print_totals(totals(arguments.map, info, dirty))
    return exits.DONE


def choose(path: str, name: str | None) -> carrier.BitmapInfo:
    """The bitmap of a map file that is meant: by its name, or the only one. Raises MapError."""
    found = carrier.names(path)
    matching = [info for info in found if name in (None, info.name)]
    if len(matching) == 1:
        return matching[0]
    listed = ", ".join(repr(info.name) for info in found)
    if not found:
        raise errors.MapError(path, "holds no bitmap")
    if name is None:
        raise errors.MapError(path, f"holds several bitmaps, say which (--bitmap NAME): {listed}")
    raise errors.MapError(path, f"holds no bitmap {name!r}, but {listed}")


def totals(path: str, info: carrier.BitmapInfo, dirty: bitmap.Bitmap) -> dict[str, Any]:
    """What there is to say of a map, sizes in bytes."""
    covered = dirty.dirty_bytes()
    return {
        "map": path,
        "bitmap": info.name,
        "recording": info.recording,
        "size": dirty.size,
        "granularity": dirty.granularity,
        "dirty": covered,
        "percent": round(100 * covered / dirty.size, 3) if dirty.size else 0.0,
        "runs": count_runs(dirty),
    }


def count_runs(dirty: bitmap.Bitmap) -> int:
    """How many runs of dirty segments there are: bits that are set while the one before is not."""
    data = dirty.data
    before = data << 1
    before[1:] |= data[:-1] >> 7
    return int(np.bitwise_count(data & ~before).sum(dtype=np.int64))


def _print_extents(dirty: bitmap.Bitmap) -> None:
    """A JSON list, one extent a line as it is found: there may be millions."""
    separator = "[\n"
    for extent in dirty.extents():
        shown = {"start": extent.start, "length": extent.length, "dirty": True}
        sys.stdout.write(f"{separator}{json.dumps(shown)}")
        separator = ",\n"
    sys.stdout.write("[]\n" if separator == "[\n" else "\n]\n")


def _print_totals(facts: dict[str, Any]) -> None:
    rows = [
        ("map", facts["map"]),
        ("bitmap", facts["bitmap"] + (" (recording)" if facts["recording"] else "")),
        ("size", units.describe(facts["size"])),
        ("granularity", units.describe(facts["granularity"])),
        ("dirty", f"{units.describe(facts['dirty'])}, {facts['percent']:.1f} %"),
        ("runs", str(facts["runs"])),
    ]
    if not sys.stdout.isatty():
        for key, value in rows:
            print(f"{key}: {value}")
        return
    # Imported here: no other verb should wait for it.
    import rich.console
    import rich.table
    import rich.text

    table = rich.table.Table(show_header=False)
    for row in rows:
        table.add_row(*(rich.text.Text(cell) for cell in row))  # a name is no markup
    rich.console.Console().print(table)
