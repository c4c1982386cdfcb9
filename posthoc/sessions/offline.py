# SPDX-License-Identifier: Apache-2.0
"""An offline session: two images that nobody writes are compared once, start to end."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import trio

from dirtymap import bitmap, images, units
from dirtymap.images import base
from posthoc.sessions import pair
from scanner import progress, scan

Watch = Callable[[progress.ScanStatistics], None]
Check = Callable[[base.Image, int], None]

# Seconds between two looks at a running scan.
_REFRESH = 0.25


@dataclass(frozen=True)
class Request:
    """What to compare, and how. `granularity` None: 64 KiB, or what a reference of hashes knows."""

    live: str
    reference: str
    granularity: int | None = None
    rate: int | None = None
    workers: int = scan.WORKERS
    without: tuple[str, ...] = ()
    allow_shrunk: bool = False
    options: images.Options = images.DEFAULTS


@dataclass(frozen=True)
class Result:
    """The dirty map and how it came about; `notes` are for the user."""

    dirty: bitmap.Bitmap
    statistics: progress.ScanStatistics
    notes: tuple[str, ...]


def compare(request: Request, *, watch: Watch | None = None, check: Check | None = None) -> Result:
    """Open both images, compare them and return the map of where they differ.

    `check` is called with the live image and the granularity before anything is read and may raise;
    `watch` is called with the statistics now and then, and at the end. A segment that cannot be read is
    dirty; an image that goes away leaves a valid map and a `failed` state. Raises UserError.
    """
    with pair.open_pair(
        request.live,
        request.reference,
        options=request.options,
        allow_shrunk=request.allow_shrunk,
    ) as opened:
        granularity = request.granularity or natural_granularity(opened.reference)
        if check is not None:
            check(opened.live, granularity)
        decisions = scan.Decisions(opened.live.size, granularity)
        scanned = scan.Scan(
            opened.reader,
            opened.reference,
            decisions,
            workers=request.workers,
            rate=request.rate,
            without=request.without,
        )
        trio.run(_run, scanned, watch)
        return Result(decisions.map(), scanned.statistics(), opened.notes)


def natural_granularity(reference: base.Image) -> int:
    """Return the granularity where none was asked for: 64 KiB, or what a reference of hashes knows."""
    if isinstance(reference, base.HashedImage):
        return min(reference.granularity, units.LARGEST_GRANULARITY)
    return units.DEFAULT_GRANULARITY


async def _run(scanned: scan.Scan, watch: Watch | None) -> None:
    async with trio.open_nursery() as nursery:
        if watch is not None:
            nursery.start_soon(_watch, scanned, watch)
        await scanned.run()
        nursery.cancel_scope.cancel()
    if watch is not None:
        watch(scanned.statistics())


async def _watch(scanned: scan.Scan, watch: Watch) -> None:
    while True:
        watch(scanned.statistics())
        await trio.sleep(_REFRESH)


def error_texts(statistics: progress.ScanStatistics) -> list[str]:
    """Return a line for each unreadable place that is known by name, and for a failure."""
    lines = [
        f"{error.side}: {error.length} bytes at {error.start}: {os.strerror(error.errno)}"
        for error in statistics.errors
    ]
    if statistics.failure is not None:
        lines.append(statistics.failure)
    return lines
