# SPDX-License-Identifier: Apache-2.0
"""The way back: for every change to a running QEMU the step that takes it away again."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

from posthoc.qemu import qmp

# For all steps together. QEMU answers each at once; what takes longer hangs.
TIME_LIMIT = 120.0

Step = Callable[[qmp.Monitor], Awaitable[None]]


class Undo:
    """Steps by name, taken in the reverse order of their planning.

    A step is planned *before* the change it takes away is asked for, and succeeds where there is nothing to
    take away: a change that was cancelled or timed out may have been made or not, and QEMU carries out
    commands in their order, so that the step comes after it either way.
    """

    def __init__(self) -> None:
        self._steps: dict[str, Step] = {}
        self.problems: list[str] = []
        self.lost = False
        """Whether the monitor was of no use at the last take_all()."""

    def plan(self, name: str, step: Step) -> None:
        """Plan `step`; what was planned under that name is forgotten."""
        self._steps.pop(name, None)
        self._steps[name] = step

    def forget(self, name: str) -> None:
        """Keep the change."""
        del self._steps[name]

    async def take(self, monitor: qmp.Monitor, name: str) -> None:
        """Take the step of that name now, if it is planned; a cancel waits for it. Raises what it raises."""
        if name not in self._steps:
            return
        with trio.move_on_after(TIME_LIMIT, shield=True) as scope:
            await self._steps[name](monitor)
            # Only now: a step that failed is tried again at the end.
            del self._steps[name]
        if scope.cancelled_caught:
            raise qmp.MonitorError(f"{name}: not done within {TIME_LIMIT:g} s")

    async def take_all(self, monitor: qmp.Monitor) -> None:
        """Take what is left; a cancel waits for it.

        A step that fails stays planned, is told in `problems`, and does not keep the others from being
        taken; where the monitor is lost, all of them stay.
        """
        self.problems.clear()
        self.lost = False
        with trio.move_on_after(TIME_LIMIT, shield=True):
            for name, step in reversed(list(self._steps.items())):
                try:
                    await step(monitor)
                except qmp.CommandError as error:
                    self.problems.append(f"{name}: {error}")
                except qmp.MonitorError as error:
                    self.problems.append(f"{name}: {error}")
                    self.lost = True
                    return
                else:
                    del self._steps[name]
