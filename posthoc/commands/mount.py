# SPDX-License-Identifier: Apache-2.0
"""`posthoc mount`: serve the live disk as a file, record its writes, compare it with the reference."""

from __future__ import annotations

import argparse
import os
import re
import sys

from dirtymap import errors, images, units
from dirtymap.images import nbd
from overlayfs import mountpoint
from overlayfs.datapath import shared
from posthoc import background, report
from posthoc.commands import options, reading
from posthoc.sessions import control, mounted
from posthoc.sessions.parameters import Parameters


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "mount",
        help="serve a live disk as a file while it is compared with the reference",
        description=(
            "Serve LIVE as MOUNTPOINT/disk: run the VM from that file. Every write is recorded while LIVE is "
            "compared with REFERENCE in the background; MOUNTPOINT/status shows how far it is, and "
            "MOUNTPOINT/dirty.qcow2 is the dirty map. The command returns when the disk can be used."
        ),
    )
    parser.add_argument("live", metavar="LIVE", nargs="?", help="the disk that the VM uses")
    parser.add_argument(
        "reference", metavar="REFERENCE", nargs="?", help="the backup to compare it with"
    )
    parser.add_argument("mountpoint", metavar="MOUNTPOINT", nargs="?", help="an empty folder")
    parser.add_argument(
        "--adopt",
        metavar="MOUNTPOINT",
        help="instead of all else: be the session of a mount whose session has died",
    )
    options.granularity(parser)
    options.bitmap(parser)
    parser.add_argument(
        "--output",
        metavar="MAP",
        help=(
            "write the map here when the scan is complete, and at the end; what stands here is replaced as "
            "soon as the disk is mounted. While the file lacks anything its bitmap is in use, and refused"
        ),
    )
    reading.scan(parser)
    parser.add_argument("--paused", action="store_true", help="begin with the scan paused")
    parser.add_argument(
        "--no-pacing",
        dest="pacing",
        action="store_false",
        help="do not let the scan give way when the guest's requests take longer",
    )
    parser.add_argument(
        "--allow-other",
        action="store_true",
        help="let other users reach the mount, as its modes say",
    )
    parser.add_argument("--read-only", action="store_true", help="serve the disk for reading only")
    parser.add_argument(
        "--threads",
        type=options.checked(_threads, "threads"),
        metavar="N",
        help=f"threads that serve the disk, 1 to {shared.MOST_THREADS}",
    )
    parser.add_argument(
        "--datapath",
        choices=["native", "python"],
        help="what serves the disk (native where it works, else python)",
    )
    parser.add_argument(
        "--cache",
        choices=["writeback", "none"],
        default="writeback",
        help="the native data path goes through the page cache (writeback) or around it (none: no other will do)",
    )
    reading.access(parser)
    parser.add_argument(
        "--foreground", action="store_true", help="stay; Ctrl-C unmounts and ends the session"
    )
    parser.add_argument(background.READY_OPTION, dest="ready_fd", type=int, help=argparse.SUPPRESS)
    options.json_flag(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Serve here (--foreground, or as the process in the background), or start the one that does."""
    here = arguments.foreground or arguments.ready_fd is not None
    if arguments.adopt is not None:
        if arguments.live is not None:
            raise errors.UserError("--adopt takes everything from the mount: no LIVE, no REFERENCE")
        if here:
            where = mountpoint.resolve(arguments.adopt)
            return mounted.adopt(where, ready_fd=arguments.ready_fd, announce=_announce(arguments))
    elif arguments.mountpoint is None or "" in (
        *(arguments.live, arguments.reference, arguments.mountpoint, arguments.output),
    ):
        raise errors.UserError("mount needs LIVE, REFERENCE and MOUNTPOINT, or --adopt MOUNTPOINT")
    elif here:
        return mounted.run(
            _parameters(arguments), ready_fd=arguments.ready_fd, announce=_announce(arguments)
        )
    return background.start(sys.argv[1:])


def _announce(arguments: argparse.Namespace) -> mounted.Ready | None:
    """Return what shows that the session is ready; until then one in the background has the terminal."""
    if not arguments.json:
        return None
    where = mountpoint.resolve(arguments.adopt or arguments.mountpoint)
    return lambda facts: _print(where, facts)


def _print(where: str, facts: report.Facts) -> None:
    """Show where everything is, and the first status."""
    places = {name: os.path.join(where, name) for name in ("disk", "control")}
    places["map"] = os.path.join(where, "dirty.qcow2")
    sys.stdout.write(report.as_json({"mountpoint": where, **places, **facts}))
    sys.stdout.flush()


def _threads(text: str) -> int:
    return control.count(text, "threads", shared.MOST_THREADS)


def _parameters(arguments: argparse.Namespace) -> Parameters:
    if not arguments.bitmap or len(os.fsencode(arguments.bitmap)) > _LONGEST_NAME:
        raise errors.UserError(f"--bitmap: a name has 1 to {_LONGEST_NAME} bytes")
    if arguments.datapath == "python" and arguments.cache == "none":
        raise errors.UserError("--cache none is the native data path's: python cannot do it")
    return Parameters(
        live=absolute(arguments.live),
        reference=absolute(arguments.reference),
        mountpoint=mountpoint.resolve(arguments.mountpoint),
        granularity=arguments.granularity or units.DEFAULT_GRANULARITY,
        bitmap=arguments.bitmap,
        output=arguments.output and os.path.abspath(arguments.output),
        rate=arguments.rate,
        workers=arguments.workers,
        threads=arguments.threads,
        datapath=arguments.datapath,
        cache=arguments.cache,
        paused=arguments.paused,
        pacing=arguments.pacing,
        allow_other=arguments.allow_other,
        read_only=arguments.read_only,
        allow_shrunk=arguments.allow_shrunk,
        without=reading.without(arguments),
        options=reading.image_options(arguments),
    )


# qcow2's limit for a bitmap's name (specification, "Bitmap directory").
_LONGEST_NAME = 1023


def absolute(spec: str) -> str:
    """Return an image's name with its paths made absolute: the session works from /."""
    scheme, rest = images.split(spec)
    if scheme.startswith("nbd"):
        return nbd.absolute(spec)
    where = os.path.abspath(rest)
    return where if not re.match(r"[a-z0-9+]+:", spec) else f"{scheme}:{where}"
