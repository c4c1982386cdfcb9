# SPDX-License-Identifier: Apache-2.0
"""The way back: for every change to a running QEMU the step that takes it away again."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable

import trio

from posthoc.qemu import qmp

# For one step, and for all that are left together. QEMU answers each at once; what takes longer hangs.
TIME_LIMIT = 60.0

Step = Callable[[qmp.Monitor], Awaitable[None]]


class Undo:
    """Steps by name, taken in the reverse order of their planning.

    A step is planned *before* the change it takes away is asked for, and succeeds where there is nothing to
    take away: a change that was cancelled or timed out may have been made or not, and QEMU carries out
    commands in their order, so that the step comes after it either way.
    """

    def __init__(self) -> None:
        self._steps: dict[str, Step] = {}
        self._reasons: dict[str, str] = {}
        self._useless: qmp.Monitor | None = None
        self.lasting: list[str] = []
        """Changes that have no way back, in words."""

    def plan(self, name: str, step: Step) -> None:
        """Plan `step`; what was planned under that name is forgotten."""
        for known in (self._steps, self._reasons):
            known.pop(name, None)
        self._steps[name] = step

    def forget(self, name: str) -> None:
        """Keep the change."""
        del self._steps[name]

    def give_up(self) -> None:
        """Forget everything: QEMU has gone, and every change with it."""
        self._steps.clear()
        self.lasting.clear()

    @property
    def left(self) -> list[str]:
        """The steps that are still to be taken, each with why it could not be."""
        return [
            f"{name} ({self._reasons[name]})" if name in self._reasons else name
            for name in self._steps
        ]

    async def take(self, monitor: qmp.Monitor, name: str) -> None:
        """Take the step of that name now, if it is planned; a cancel waits for it.

        Raises what the step raises; it is tried again at the end then.
        """
        if name not in self._steps:
            return
        try:
            with trio.move_on_after(TIME_LIMIT, shield=True) as scope:
                await self._steps[name](monitor)
            if scope.cancelled_caught:
                raise qmp.MonitorError(f"{name}: not done within {TIME_LIMIT:g} s")
        except qmp.MonitorError as error:
            self._reasons[name] = str(error).removeprefix(f"{name}: ")
            if not isinstance(error, qmp.CommandError):
                self._useless = monitor
            raise
        del self._steps[name]

    async def take_all(self, monitor: qmp.Monitor) -> None:
        """Take what is left, unless `monitor` is known to be of no use; a cancel waits for it.

        A step that fails stays, and does not keep the others from being taken; once the monitor is of no use,
        all of them stay, for another monitor.
        """
        with trio.move_on_after(TIME_LIMIT, shield=True):
            for name in reversed(list(self._steps)):
                if self._useless is monitor:
                    break
                with contextlib.suppress(qmp.MonitorError):
                    await self.take(monitor, name)
