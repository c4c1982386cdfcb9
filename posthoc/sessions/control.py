# SPDX-License-Identifier: Apache-2.0
"""The file `control`: one command a line.

pause   resume   cancel   rescan   rate 100M | rate none   workers 2   pacing on | off
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Protocol

from dirtymap import errors, units

MOST_WORKERS = 64

# Characters of a wrong command that its log line has.
_SHOWN = 60


class Scan(Protocol):
    """What can be told to a scan."""

    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def cancel(self) -> None: ...
    def rescan(self) -> None: ...
    def set_rate(self, rate: int | None) -> None: ...
    def set_workers(self, workers: int) -> None: ...
    def set_pacing(self, on: bool) -> None: ...


def obey(scan: Scan, text: str) -> None:
    """Carry out every line of `text`, or none: UserError where one of them is no command."""
    lines = [words for line in text.splitlines() if (words := line.split())]
    for act in [_parse(scan, verb, arguments) for verb, *arguments in lines]:
        act()


def _parse(scan: Scan, verb: str, arguments: list[str]) -> Callable[[], None]:
    """Return what carries out one command; UserError where it is none."""
    plain = {
        "pause": scan.pause,
        "resume": scan.resume,
        "cancel": scan.cancel,
        "rescan": scan.rescan,
    }
    match verb, arguments:
        case _, [] if verb in plain:
            return plain[verb]
        case "rate", ["none"]:
            return functools.partial(scan.set_rate, None)
        case "rate", [amount]:
            return functools.partial(scan.set_rate, positive_rate(amount))
        case "workers", [number]:
            return functools.partial(scan.set_workers, worker_count(number))
        case "pacing", ["on" | "off" as word]:
            return functools.partial(scan.set_pacing, word == "on")
        case _:
            text = " ".join([verb, *arguments])
            shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
            raise errors.UserError(f"{shown!r} is no command of control")


def positive_rate(text: str) -> int:
    """Return the bytes a second that `text` names; UserError where it is none or 0."""
    rate = units.parse_size(text.removesuffix("/s"))
    if rate <= 0:
        raise errors.UserError("a rate of 0 would never end: use pause")
    return rate


def worker_count(text: str) -> int:
    """Return how many workers `text` names, from 1 to 64; UserError otherwise."""
    return count(text, "workers", MOST_WORKERS)


def count(text: str, what: str, most: int) -> int:
    """Return how many `what` the `text` names, from 1 to `most`; UserError otherwise."""
    if not (text.isascii() and text.isdigit() and len(text) < 4 and 1 <= int(text) <= most):
        raise errors.UserError(f"{text!r} {what}: a number from 1 to {most}")
    return int(text)
