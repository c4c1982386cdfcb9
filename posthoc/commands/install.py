# SPDX-License-Identifier: Apache-2.0
"""posthoc install: a dirty map into a disk's persistent bitmap, where QEMU goes on recording."""

from __future__ import annotations

import argparse
import json

from dirtymap import bitmap, errors, images, units
from dirtymap.qcow2 import carrier
from posthoc import exits
from posthoc.commands import options, show_map
from posthoc.qemu import handover


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "install",
        help="put a map into a qcow2 disk's persistent bitmap",
        description="Put a map into a qcow2 disk's persistent bitmap, which a VM then goes on with. "
        "For a raw disk a metadata file is made that holds the bitmap: start the VM on that. "
        "The disk must not be in use.",
    )
    parser.add_argument("map", metavar="MAP", help="a carrier, or any qcow2 with one bitmap")
    parser.add_argument(
        "image", metavar="IMAGE", help="qcow2:PATH; or a raw disk's PATH, with --metadata"
    )
    parser.add_argument(
        "--bitmap", metavar="NAME", required=True, help="the bitmap's name in IMAGE"
    )
    parser.add_argument(
        "--metadata", metavar="META.qcow2", help="the file to make for a raw disk; must be new"
    )
    parser.add_argument(
        "--replace", action="store_true", help="replace the bitmap where IMAGE has one of that name"
    )
    options.json_flag(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Install the map."""
    path = _qcow2_path(arguments.image)
    dirty = _read(arguments.map, arguments.bitmap)
    if path is not None and arguments.metadata is None:
        handover.install(dirty, path, arguments.bitmap, replace=arguments.replace)
        target = path
    elif path is None and arguments.metadata is not None:
        target = arguments.metadata
        handover.install_metadata(dirty, _raw_path(arguments.image), target, arguments.bitmap)
    elif path is None:
        raise errors.ImageError(
            arguments.image,
            "a raw disk holds no bitmap: name a qcow2 as qcow2:PATH, or add --metadata META.qcow2",
        )
    else:
        raise errors.ImageError(
            arguments.image, "a qcow2 holds its bitmaps itself: leave --metadata away"
        )
    _report(arguments, dirty, target)
    return exits.DONE


def _qcow2_path(spec: str) -> str | None:
    """The path of qcow2:PATH, else None."""
    return spec.removeprefix("qcow2:") if spec.startswith("qcow2:") else None


def _raw_path(spec: str) -> str:
    scheme, path = images.split(spec)
    if scheme != "raw":
        raise errors.ImageError(spec, "--metadata is for raw disks, files or block devices")
    return path


def _read(path: str, name: str) -> bitmap.Bitmap:
    """The map to install: the only bitmap, or among several the one called as it will be."""
    found = carrier.names(path)
    info = found[0] if len(found) == 1 else show_map.choose(path, name)
    return carrier.read(path, info.name)


def _report(arguments: argparse.Namespace, dirty: bitmap.Bitmap, target: str) -> None:
    facts = {
        "image": target,
        "bitmap": arguments.bitmap,
        "size": dirty.size,
        "granularity": dirty.granularity,
        "dirty": dirty.dirty_bytes(),
        "recording": True,
    }
    if arguments.json:
        print(json.dumps(facts))
    else:
        print(
            f"{target}: bitmap {arguments.bitmap!r} is recording, "
            f"{units.describe(dirty.dirty_bytes())} dirty"
        )
