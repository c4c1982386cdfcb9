# SPDX-License-Identifier: Apache-2.0
"""Threads of the scanner's own, supervised by a trio task.

Not trio's threads: those are reused for other calls, and a worker lowers its priority, which only a
privileged process can raise again. A guest's request must not end up on such a thread.
"""

import threading
from collections.abc import Callable

import trio


class Crew:
    """Numbered threads that tell the event loop when one of them has ended. For the event loop only."""

    def __init__(self, work: Callable[[int], None]) -> None:
        self._work = work
        self._token = trio.lowlevel.current_trio_token()
        self._changed = trio.Event()
        self.alive: set[int] = set()

    def start(self, number: int) -> None:
        """Start thread `number`, which is not alive; `work` must not raise."""
        # A daemon, so that a read which never returns cannot keep a dying process from ending.
        thread = threading.Thread(
            target=self._run, args=(number,), name=f"scan-{number}", daemon=True
        )
        thread.start()
        # Behind the start, which may fail; the thread's end is told on this event loop, later.
        self.alive.add(number)

    def _run(self, number: int) -> None:
        try:
            self._work(number)
        finally:
            self._token.run_sync_soon(self._ended, number)

    def _ended(self, number: int) -> None:
        self.alive.discard(number)
        self.wake()

    def wake(self) -> None:
        """Make the supervisor look again."""
        self._changed.set()

    async def changed(self) -> None:
        """Return after a thread has ended or `wake` was called since the last return."""
        await self._changed.wait()
        self._changed = trio.Event()

    async def ended(self) -> None:
        """Return when no thread is alive, whatever is cancelled meanwhile."""
        with trio.CancelScope(shield=True):
            while self.alive:
                await self.changed()
