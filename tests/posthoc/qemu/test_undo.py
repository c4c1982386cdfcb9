# SPDX-License-Identifier: Apache-2.0
"""The ways back: taken in reverse, each once, whatever fails."""

from typing import cast

import pytest
import trio

from posthoc.qemu import qmp, undo

MONITOR, ANOTHER = (cast("qmp.Monitor", object()) for _ in range(2))


class Steps:
    """Steps that note that they were taken, and raise what they are told to."""

    def __init__(self) -> None:
        self.taken: list[str] = []
        self.failing: dict[str, qmp.MonitorError] = {}

    def step(self, name: str) -> undo.Step:
        async def take(_: qmp.Monitor) -> None:
            await trio.lowlevel.checkpoint()
            self.taken.append(name)
            if name in self.failing:
                raise self.failing[name]

        return take


@pytest.fixture
def steps() -> Steps:
    return Steps()


@pytest.fixture
def three(steps: Steps) -> undo.Undo:
    planned = undo.Undo()
    for name in ("a", "b", "c"):
        planned.plan(name, steps.step(name))
    return planned


async def test_steps_are_taken_in_reverse_and_once(steps: Steps, three: undo.Undo) -> None:
    """What was made last goes first; a step taken or forgotten before is not taken again."""
    await three.take(MONITOR, "b")
    three.forget("a")
    await three.take_all(MONITOR)
    await three.take_all(MONITOR)
    assert steps.taken == ["b", "c"]
    assert three.left == []


async def test_refused_step_is_told_and_the_others_are_taken(
    steps: Steps, three: undo.Undo
) -> None:
    """QEMU refusing one step keeps it planned and does not keep the rest."""
    steps.failing["b"] = qmp.CommandError("x", {}, {"error": {"desc": "busy"}})
    await three.take_all(MONITOR)
    assert steps.taken == ["c", "b", "a"]
    assert three.left == ["b (QEMU refused x: busy)"]
    steps.failing.clear()
    await three.take_all(MONITOR)
    assert steps.taken[3:] == ["b"]
    assert three.left == []


async def test_lost_monitor_leaves_the_rest_for_another(steps: Steps, three: undo.Undo) -> None:
    """Where the monitor is of no use the steps stay, to be taken through a new one."""
    steps.failing["b"] = qmp.Disconnected("gone")
    await three.take_all(MONITOR)
    assert three.left == ["a", "b (gone)"]
    steps.failing.clear()
    await three.take_all(MONITOR)
    assert steps.taken == ["c", "b"]
    await three.take_all(ANOTHER)
    assert steps.taken == ["c", "b", "b", "a"]
    assert three.left == []


async def test_cancel_waits_for_the_steps(steps: Steps, three: undo.Undo) -> None:
    """Who is cancelled takes back first."""
    with trio.CancelScope() as scope:
        scope.cancel()
        await three.take(MONITOR, "c")
        await three.take_all(MONITOR)
    assert steps.taken == ["c", "b", "a"]


async def test_step_that_hangs_is_given_up(
    three: undo.Undo, autojump_clock: trio.testing.MockClock
) -> None:
    """A QEMU that never answers does not hold posthoc for ever."""

    async def hang(_: qmp.Monitor) -> None:
        await trio.sleep_forever()

    three.plan("d", hang)
    with pytest.raises(qmp.MonitorError, match="d: not done within 60 s"):
        await three.take(MONITOR, "d")
    await three.take_all(MONITOR)
    assert three.left == ["a", "b", "c", "d (not done within 60 s)"]


async def test_nothing_is_left_of_a_qemu_that_has_gone(three: undo.Undo) -> None:
    """What ended with it is neither taken back nor told."""
    three.lasting.append("a bitmap has more bits")
    three.give_up()
    assert (three.left, three.lasting) == ([], [])
