# SPDX-License-Identifier: Apache-2.0
"""posthoc digest: a manifest of hashes that stands as a reference when the image itself is out of reach."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from dirtymap import errors, images, units
from dirtymap.images import base, digest
from posthoc import bar, exits, report
from posthoc.commands import diff, options, reading
from posthoc.sessions import control, offline, pair
from scanner import plan, scan


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "digest",
        help="write the hashes of a reference, to compare with instead of it",
        description="Write a manifest of IMAGE, one hash for each segment (-o), which then stands "
        "wherever a REFERENCE does; or check an image against one (--verify: exits with 1 when it "
        "differs). Nobody may write IMAGE meanwhile.",
    )
    parser.add_argument("image", metavar="IMAGE", help="the reference")
    verb = parser.add_mutually_exclusive_group(required=True)
    verb.add_argument(
        "-o", "--output", metavar="MANIFEST", help="write it here; the name ends in .digest"
    )
    verb.add_argument(
        "--verify", metavar="MANIFEST", help="check IMAGE against this (.digest or .fidx)"
    )
    options.granularity(parser)
    parser.add_argument(
        "--workers",
        type=options.checked(control.worker_count, "workers"),
        default=scan.WORKERS,
        metavar="N",
        help=f"threads that read and hash ({scan.WORKERS})",
    )
    parser.add_argument(
        "--read-all", action="store_true", help="read everything: trust no extent map"
    )
    reading.access(parser)
    options.json_flag(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Write the manifest, or check against one."""
    return _write(arguments) if arguments.verify is None else _verify(arguments)


def _write(arguments: argparse.Namespace) -> int:
    if not arguments.output.endswith(digest.SUFFIX):
        raise errors.MapError(
            arguments.output, f"a manifest is known by its name: let it end in {digest.SUFFIX}"
        )
    pair.check_output(arguments.output, arguments.image)
    granularity = arguments.granularity or units.DEFAULT_GRANULARITY
    image = images.open(arguments.image, options=reading.image_options(arguments))
    try:
        summary = digest.write(
            arguments.output,
            image,
            granularity,
            workers=arguments.workers,
            read_all=arguments.read_all,
        )
    except base.GoneError as error:
        raise errors.ImageError(arguments.image, errors.reason(error)) from None
    finally:
        image.close()
    facts: dict[str, Any] = {
        "manifest": arguments.output,
        "image": arguments.image,
        "size": summary.size,
        "granularity": summary.granularity,
        "read": summary.read,
        "zeros": summary.zeros,
        "unreadable": summary.unreadable,
        "length": summary.length,
    }
    _print(arguments, facts)
    if summary.unreadable:
        print(
            f"posthoc: {units.describe(summary.unreadable)} could not be read: they will count as "
            "differing",
            file=sys.stderr,
        )
        return exits.READ_ERROR
    return exits.DONE


def _verify(arguments: argparse.Namespace) -> int:
    if not arguments.verify.endswith(tuple(images.HASHES)):
        endings = " or ".join(images.HASHES)
        raise errors.ImageError(arguments.verify, f"is no manifest: its name ends in {endings}")
    if arguments.granularity is not None:
        raise errors.UserError(
            "--verify goes by the manifest's granularity: leave --granularity out"
        )
    request = offline.Request(
        live=arguments.image,
        reference=arguments.verify,
        workers=arguments.workers,
        without=plan.REASONS if arguments.read_all else (),
        allow_shrunk=True,
        options=reading.image_options(arguments),
    )
    manifest = images.open_reference(arguments.verify)
    manifest.close()
    with bar.shown() as watch:
        result = offline.compare(request, watch=watch)
    now = result.statistics
    facts: dict[str, Any] = {
        "manifest": arguments.verify,
        "image": arguments.image,
        "size": now.size,
        "granularity": now.granularity,
        "differing": result.dirty.dirty_bytes(),
        "missing": max(0, manifest.size - now.size),
        "beyond": max(0, now.size - manifest.size),
        "errors": now.error_count,
        "error_list": offline.error_texts(now),
    }
    _print(arguments, facts)
    trouble = diff.tell(now, result.notes)
    differs = facts["differing"] or facts["missing"] or facts["beyond"]
    return trouble or (exits.DIFFERS if differs else exits.DONE)


def _print(arguments: argparse.Namespace, facts: dict[str, Any]) -> None:
    if arguments.json:
        sys.stdout.write(report.as_json(facts))
        return
    sizes = ("size", "granularity", "read", "zeros", "unreadable", "differing", "missing", "beyond")
    for key, value in facts.items():
        if key == "error_list":
            continue
        text = units.describe(value) if key in (*sizes, "length") else value
        print(f"{key}: {text}")
