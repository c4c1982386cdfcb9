# SPDX-License-Identifier: Apache-2.0
"""Options that several verbs share, defined once."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TypeVar

from dirtymap import errors, units

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
