# SPDX-License-Identifier: Apache-2.0
"""What a session says of itself: one set of facts, as text for people and as JSON for programs.

The facts have the names and the order of the mount's file `status`. In JSON sizes are bytes, rates bytes a
second, times seconds; null is "not known".
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from dirtymap import units

Facts = Mapping[str, Any]


def as_json(facts: Facts) -> str:
    """Return the facts as indented JSON, with a newline at the end.

    In ASCII: a file's name need not be UTF-8, nor the locale of whoever prints it.
    """
    return json.dumps(facts, indent=1) + "\n"


def as_text(facts: Facts) -> str:
    """Return the facts as "key: value" lines."""
    lines = []
    for key, value in facts.items():
        form = _FORMS.get(key)
        text = value if form is None else form(value, facts)
        if text is not None:
            lines.append(f"{key}: {one_line(str(text))}\n")
    return "".join(lines)


def one_line(text: str) -> str:
    """Return `text` fit for one line of a terminal: the names of files may hold anything."""
    return text.encode("unicode_escape").decode() if not text.isprintable() else text


def percent(part: int, whole: int) -> str:
    """Return 'part of whole' in per cent, never rounded up to 100.0."""
    share = 100.0 if part >= whole else min(99.9, 100 * part / whole)
    return f"{share:.1f} %"


def duration(seconds: float) -> str:
    """Return seconds as people read them: '42 s', '3 min 20 s', '2 h 5 min'."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _size(value: int, _: Facts) -> str:
    return units.describe(value)


def _share(value: int, facts: Facts) -> str:
    return f"{units.describe(value)}, {percent(value, facts['size'])}"


def _dirty(value: int, facts: Facts) -> str:
    bound = "" if facts["state"] == "complete" else ", at most: the scan is not complete"
    return units.describe(value) + bound


def _rate(value: float | None, _: Facts) -> str:
    return "-" if value is None else f"{units.describe(round(value))} per second"


def _eta(value: float | None, _: Facts) -> str:
    return "-" if value is None else duration(value)


def _errors(value: int, facts: Facts) -> str:
    return "; ".join([str(value), *facts.get("error_list", ())])


def _savings(value: Mapping[str, int], _: Facts) -> str | None:
    saved = [f"{reason} {units.describe(size)}" for reason, size in value.items() if size]
    return ", ".join(saved) or None


def _guest(value: Mapping[str, Any], _: Facts) -> str | None:
    parts = []
    for verb, counted in value.items():
        if counted["operations"]:
            part = f"{counted['operations']} {verb}"
            if counted.get("p99_us") is not None:
                part += f" (p99 {counted['p99_us']:.0f} us)"
            if counted["errors"]:
                part += f" ({counted['errors']} failed)"
            parts.append(part)
    return ", ".join(parts) or None


def _pacing(value: float | None, _: Facts) -> str:
    return "off" if value is None else f"on, the scan may use {value:.0%} of its time"


def _hidden(_: object, __: Facts) -> None:
    return None


_FORMS: Mapping[str, Callable[[Any, Facts], object]] = {
    "size": _size,
    "granularity": _size,
    "scanned": _share,
    "skipped": _size,
    "differing": _size,
    "written": _size,
    "dirty": _dirty,
    "rate": _rate,
    "eta": _eta,
    "errors": _errors,
    "error_list": _hidden,
    "output_due": _hidden,
    "output_failure": _hidden,
    "savings": _savings,
    "guest": _guest,
    "pacing": _pacing,
}
