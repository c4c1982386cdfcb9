# SPDX-License-Identifier: Apache-2.0
"""Options of the verbs that read images: how they are reached, and how they are compared."""

from __future__ import annotations

import argparse
import os

from dirtymap import images
from posthoc.commands import options
from posthoc.sessions import control
from scanner import plan


def scan(parser: argparse.ArgumentParser) -> None:
    """Add how a scan works: --rate, --workers, `shortcuts`, --allow-shrunk."""
    parser.add_argument(
        "--rate",
        type=options.checked(control.positive_rate, "rate"),
        metavar="SIZE",
        help="read at most this much a second of each image",
    )
    parser.add_argument(
        "--workers",
        type=options.checked(control.worker_count, "workers"),
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
        type=options.checked(_connections, "connections"),
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


def _connections(text: str) -> int:
    return control.worker_count(text)
