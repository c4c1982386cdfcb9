# SPDX-License-Identifier: Apache-2.0
"""What a mounted session was asked for: a value that can be stored and read again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from dirtymap import images, units


@dataclass(frozen=True)
class Parameters:
    """`posthoc mount`'s arguments. Paths are absolute; sizes and rates are bytes (a second)."""

    live: str
    reference: str
    mountpoint: str
    granularity: int = units.DEFAULT_GRANULARITY
    bitmap: str = "posthoc"
    output: str | None = None
    rate: int | None = None
    workers: int = 2
    threads: int | None = None
    cache: str = "writeback"
    paused: bool = False
    pacing: bool = True
    allow_other: bool = False
    read_only: bool = False
    allow_shrunk: bool = False
    without: tuple[str, ...] = ()
    datapath: str | None = None
    options: images.Options = field(default_factory=images.Options)

    def stored(self) -> dict[str, Any]:
        """Return the values as JSON has them."""
        return asdict(self)

    @classmethod
    def restored(cls, facts: Mapping[str, Any]) -> Parameters:
        """Return what `stored` gave; TypeError where it is something else."""
        options = dict(facts["options"])
        options["secrets"] = tuple(options["secrets"])
        without = tuple(facts["without"])
        return cls(**{**facts, "options": images.Options(**options), "without": without})
