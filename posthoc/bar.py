# SPDX-License-Identifier: Apache-2.0
"""A scan's progress as a bar on stderr, where that is a terminal."""

import contextlib
import sys
from collections.abc import Iterator

from posthoc import report
from posthoc.sessions import offline
from scanner import progress


@contextlib.contextmanager
def shown() -> Iterator[offline.Watch | None]:
    """Yield what to call with a scan's statistics; None where nobody would see it."""
    if not sys.stderr.isatty():
        yield None
        return
    # Imported here: whoever has no terminal need not wait for it.
    import rich.console
    import rich.progress

    columns = (
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.DownloadColumn(binary_units=True),
        rich.progress.TextColumn("{task.fields[eta]}"),
    )
    console = rich.console.Console(stderr=True)
    with rich.progress.Progress(*columns, console=console, transient=True) as bars:
        task = bars.add_task(progress.SCANNING, total=None, eta="")

        def watch(now: progress.ScanStatistics) -> None:
            eta = "" if now.eta is None else report.duration(now.eta)
            bars.update(
                task,
                description=now.state,
                total=now.size,
                completed=now.scanned,
                eta=eta,
                # Not only every tenth of a second: by then the next disk's scan may have begun.
                refresh=now.state != progress.SCANNING,
            )

        yield watch
