# SPDX-License-Identifier: Apache-2.0
"""Options that several verbs share, defined once."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import TypeVar

from dirtymap import errors, images, units
from posthoc.sessions import control
from scanner import plan

T = TypeVar("T")


def checked(convert: Callable[[str], T], what: str) -> Callable[[str], T]:
    """Return `convert` for argparse: a UserError becomes the option's own message."""

    def converted(text: str) -> T:
        try:
            return convert(text)
        except errors.UserError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    converted.__name__ = what
    return converted


def _granularity(text: str) -> int:
    return units.check_granularity(units.parse_size(text))


def _connections(text: str) -> int:
    return control.worker_count(text)


size = checked(units.parse_size, "size")


def json_flag(parser: argparse.ArgumentParser) -> None:
    """Add --json."""
    parser.add_argument("--json", action="store_true", help="results as JSON")


def granularity(parser: argparse.ArgumentParser) -> None:
    """Add --granularity, None where it is not said."""
    parser.add_argument(
        "--granularity",
        type=checked(_granularity, "granularity"),
        metavar="SIZE",
        help="bytes per bit of the map: a power of two, 512 to 2M (64K if not said)",
    )


def bitmap(parser: argparse.ArgumentParser) -> None:
    """Add --bitmap, the name that the map has inside its file."""
    parser.add_argument(
        "--bitmap", default="posthoc", metavar="NAME", help="the bitmap's name (posthoc)"
    )


def scan(parser: argparse.ArgumentParser) -> None:
    """Add how a scan works: --rate, --workers, `shortcuts`, --allow-shrunk."""
    parser.add_argument(
        "--rate",
        type=checked(control.positive_rate, "rate"),
        metavar="SIZE",
        help="read at most this much a second of each image",
    )
    parser.add_argument(
        "--workers",
        type=checked(control.worker_count, "workers"),
        default=2,
        metavar="N",
        help="threads that read and compare (2)",
    )
    shortcuts(parser)
    parser.add_argument(
        "--allow-shrunk",
        action="store_true",
        help="compare a live disk that is shorter than the reference",
    )


def shortcuts(parser: argparse.ArgumentParser) -> None:
    """Add which ways of not reading are left out: --read-all, --without."""
    parser.add_argument(
        "--read-all",
        action="store_true",
        help="read and compare everything: trust no extent map, leave nothing out",
    )
    parser.add_argument(
        "--without",
        action="append",
        default=[],
        choices=plan.REASONS,
        metavar="SHORTCUT",
        help=f"read what this one would save: {', '.join(plan.REASONS)} (may be repeated)",
    )


def without(arguments: argparse.Namespace) -> tuple[str, ...]:
    """Return the names of the shortcuts that `shortcuts` has parsed."""
    return plan.REASONS if arguments.read_all else tuple(arguments.without)


def access(parser: argparse.ArgumentParser) -> None:
    """Add how images are reached: secrets, TLS, connections."""
    parser.add_argument(
        "--secret",
        action="append",
        default=[],
        metavar="FILE",
        help="file with the passphrase of an encrypted image (may be repeated: tried in order)",
    )
    parser.add_argument("--tls-certificates", metavar="FOLDER", help="for nbds://: certificates")
    parser.add_argument("--tls-psk", metavar="FILE", help="for nbds://: pre-shared keys")
    parser.add_argument("--tls-user", metavar="NAME", help="for nbds://: the key's user name")
    parser.add_argument(
        "--connections",
        type=checked(_connections, "connections"),
        metavar="N",
        help="connections to an NBD server (as many as it serves well)",
    )


def image_options(arguments: argparse.Namespace) -> images.Options:
    """Return what `access` and `scan` have parsed as images need it: for a session that works from / too."""
    return images.Options(
        secrets=tuple(map(os.path.abspath, arguments.secret)),
        connections=arguments.connections,
        read_all=getattr(arguments, "read_all", False),
        tls_certificates=_absolute(arguments.tls_certificates),
        tls_psk=_absolute(arguments.tls_psk),
        tls_user=arguments.tls_user,
    )


def _absolute(path: str | None) -> str | None:
    return None if path is None else os.path.abspath(path)
