# SPDX-License-Identifier: Apache-2.0
"""Pause, resume, cancel, rescan, rate and workers while a scan runs; each stepped, none by chance."""

import math

import pytest
import trio
import trio.testing

from dirtymap.images import base
from scanner import pace, plan, progress, scan
from tests.scanner import fakes
from tests.scanner.test_scan import SMALL, dirty, pair, truth

K = 1024
SIZE = 512 * K
CHUNKS = SIZE // (16 * K)


class Lab:
    """A scan of two disks whose every read of the live one waits at a gate."""

    def __init__(self, permits: float = 0, **options: object) -> None:
        self.live, self.reference = pair(SIZE, 9)
        self.gate = fakes.Gate()
        self.gate.let(permits)
        self.live.before = self.gate
        self.scan = scan.Scan(
            self.live,
            self.reference,
            scan.Decisions(SIZE, 4 * K),
            tuning=SMALL,
            **options,  # type: ignore[arg-type]
        )

    @property
    def state(self) -> str:
        return self.scan.statistics().state

    async def stopped_at(self, waiting: int) -> None:
        """Wait until exactly so many threads stand at the gate."""
        await fakes.until(lambda: self.gate.waiting == waiting)

    def check_complete(self) -> None:
        assert self.state == progress.COMPLETE
        assert dirty(self.scan.decisions) == truth(self.live, self.reference, 4 * K)
        assert self.scan.statistics().scanned == SIZE

    def check_valid(self) -> None:
        """Cut short wherever: no difference is missing."""
        assert dirty(self.scan.decisions) >= truth(self.live, self.reference, 4 * K)


async def test_a_scan_begun_paused_reads_nothing_until_resumed() -> None:
    """--paused: the map is all dirty, the state says so, and resume makes it go."""
    lab = Lab(math.inf, paused=True)
    assert lab.state == progress.PAUSED
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lab.scan.run)
        await fakes.until(lambda: len(fakes.scan_threads()) == 2)
        await trio.testing.wait_all_tasks_blocked()
        assert lab.state == progress.PAUSED
        assert lab.live.reads == []
        lab.scan.resume()
    lab.check_complete()


async def test_a_paused_scan_takes_no_further_chunk() -> None:
    """What is being read is finished, nothing else begun; then it goes on to the end."""
    lab = Lab(3)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lab.scan.run)
        await lab.stopped_at(2)
        lab.scan.pause()
        assert lab.state == progress.PAUSED
        lab.gate.let(math.inf)
        await fakes.until(lambda: lab.scan.statistics().scanned == 5 * 16 * K)
        await trio.testing.wait_all_tasks_blocked()
        assert lab.gate.passed == 5
        assert lab.scan.statistics().eta is None
        lab.check_valid()
        lab.scan.resume()
    lab.check_complete()


async def test_cancel_ends_the_scan_within_one_chunk() -> None:
    """run() returns, the map is valid, and running again does nothing until rescan."""
    lab = Lab(3)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lab.scan.run)
        await lab.stopped_at(2)
        lab.scan.cancel()
        lab.gate.let(math.inf)
    assert lab.state == progress.CANCELLED
    assert lab.gate.passed == 5
    lab.check_valid()
    await lab.scan.run()
    assert lab.gate.passed == 5
    lab.scan.rescan()
    assert lab.state == progress.SCANNING
    assert lab.scan.decisions.map().dirty_bytes() == SIZE
    await lab.scan.run()
    lab.check_complete()


async def test_a_paused_scan_can_be_cancelled() -> None:
    """Threads that rest wake up to end."""
    lab = Lab(paused=True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lab.scan.run)
        await fakes.until(lambda: len(fakes.scan_threads()) == 2)
        lab.scan.cancel()
    assert lab.state == progress.CANCELLED
    assert lab.live.reads == []


async def test_cancel_before_the_beginning_holds() -> None:
    """A cancel that comes before run() is not forgotten by it."""
    lab = Lab(math.inf)
    lab.scan.cancel()
    await lab.scan.run()
    assert lab.state == progress.CANCELLED
    assert lab.live.reads == []


async def test_rescan_begins_again_while_running() -> None:
    """A read of before the rescan decides nothing after it: the reads are all made again."""
    lab = Lab(3)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lab.scan.run)
        await lab.stopped_at(2)
        lab.scan.rescan()
        lab.gate.let(2)
        await fakes.until(lambda: lab.gate.passed == 5 and lab.gate.waiting == 2)
        assert lab.scan.statistics().scanned == 0
        assert lab.scan.decisions.map().dirty_bytes() == SIZE
        assert lab.state == progress.SCANNING
        lab.gate.let(math.inf)
    lab.check_complete()
    assert lab.gate.passed == 5 + CHUNKS


async def test_rescan_after_the_end_needs_another_run() -> None:
    """A complete scan is made again as a whole."""
    lab = Lab(math.inf)
    await lab.scan.run()
    lab.check_complete()
    lab.scan.rescan()
    assert (lab.state, lab.scan.statistics().scanned) == (progress.SCANNING, 0)
    await lab.scan.run()
    lab.check_complete()
    assert lab.gate.passed == 2 * CHUNKS


async def test_rescan_clears_errors_and_a_failure() -> None:
    """Errors are of the present scan; what was gone may be back."""
    lab = Lab(math.inf)
    lab.reference.faults = [(0, SIZE, base.GoneError("away"))]
    await lab.scan.run()
    assert (lab.state, lab.scan.statistics().failure) == (progress.FAILED, "away")
    lab.reference.faults = [(0, 1, OSError(5, "bad"))]
    lab.scan.rescan()
    assert lab.state == progress.SCANNING
    await lab.scan.run()
    assert lab.scan.statistics().error_count == 1
    lab.reference.faults = []
    lab.scan.rescan()
    await lab.scan.run()
    assert (lab.scan.statistics().error_count, lab.scan.statistics().errors) == (0, ())
    lab.check_complete()


async def test_a_surrounding_cancel_waits_for_the_reads_and_leaves_a_valid_map() -> None:
    """Trio's cancel: no thread outlives run(), and another run() goes on where it was."""
    lab = Lab(3)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lab.scan.run)
        await lab.stopped_at(2)
        nursery.cancel_scope.cancel()
        with trio.CancelScope(shield=True):
            # The scan has taken notice, and waits for its two reads.
            await trio.testing.wait_all_tasks_blocked()
        lab.gate.let(math.inf)
    assert lab.gate.passed == 5
    assert lab.state == progress.CANCELLED
    lab.check_valid()
    await fakes.until(lambda: not fakes.scan_threads())
    await lab.scan.run()
    lab.check_complete()
    assert lab.gate.passed == CHUNKS


async def test_a_rate_holds_the_scan_back_and_can_be_taken_away() -> None:
    """A byte a second stops it after what was taken; without the limit it ends at once."""
    lab = Lab(math.inf, rate=1, workers=1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lab.scan.run)
        await fakes.until(lambda: lab.scan.statistics().scanned)
        assert lab.scan.statistics().rate_limit == 1
        assert lab.scan.statistics().scanned == 16 * K
        lab.scan.set_rate(None)
    lab.check_complete()


async def test_a_scan_that_waits_for_its_rate_can_be_cancelled() -> None:
    """A wait of hours ends with the scan."""
    lab = Lab(math.inf, rate=1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lab.scan.run)
        await fakes.until(lambda: lab.scan.statistics().scanned)
        lab.scan.cancel()
    assert lab.state == progress.CANCELLED
    lab.check_valid()


async def test_workers_come_and_go() -> None:
    """More threads begin at once; fewer, once each has finished its chunk."""
    lab = Lab(workers=1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lab.scan.run)
        await lab.stopped_at(1)
        lab.scan.set_workers(4)
        await lab.stopped_at(4)
        assert lab.scan.statistics().workers == 4
        lab.scan.set_workers(2)
        lab.gate.let(4)
        await fakes.until(lambda: lab.gate.passed == 4 and lab.gate.waiting == 2)
        await fakes.until(lambda: len(fakes.scan_threads()) == 2)
        lab.scan.set_workers(3)
        await lab.stopped_at(3)
        lab.gate.let(math.inf)
    lab.check_complete()


async def test_impossible_settings_are_refused() -> None:
    """No worker at all, or a rate of nothing, is not a way to pause."""
    lab = Lab(math.inf)
    with pytest.raises(ValueError, match="0 workers"):
        lab.scan.set_workers(0)
    with pytest.raises(ValueError, match="a rate of 0"):
        lab.scan.set_rate(0)
    await lab.scan.run()
    lab.check_complete()


async def test_one_scan_runs_once_at_a_time() -> None:
    """A second run() is a mistake of the caller's and does not disturb the first."""
    lab = Lab()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lab.scan.run)
        await lab.stopped_at(2)
        with pytest.raises(RuntimeError):
            await lab.scan.run()
        lab.gate.let(math.inf)
    lab.check_complete()


class Moody:
    """A courtesy that allows nothing until told otherwise, asked a hundred times a second."""

    def __init__(self, wait: float = 0.01, *, guest: bool = True) -> None:
        self.seconds = wait
        self.guest = guest
        self.asked = 0

    def wait(self, at_work: int = 0) -> float:
        self.asked += 1
        return self.seconds


async def test_a_guest_that_needs_everything_stops_the_scan() -> None:
    """While the courtesy allows nothing no chunk is taken; when it allows, the scan goes on by itself."""
    courtesy = Moody()
    lab = Lab(math.inf, courtesy=courtesy)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lab.scan.run)
        await fakes.until(lambda: courtesy.asked > 4)
        assert lab.live.reads == []
        courtesy.seconds = 0.0
    lab.check_complete()


async def test_a_courtesy_that_has_changed_its_mind_is_asked_at_once() -> None:
    """Pacing switched off in the middle of a long rest."""
    courtesy = Moody(3600.0)
    lab = Lab(math.inf, courtesy=courtesy)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lab.scan.run)
        await fakes.until(lambda: courtesy.asked == 2)
        courtesy.seconds = 0.0
        lab.scan.wake()
    lab.check_complete()


async def test_a_scan_that_is_complete_ends_within_a_rest() -> None:
    """The last chunk ended with the work, and whoever waited for the end waited for the rest's, up to six seconds."""
    courtesy = Moody(0.0, guest=False)
    lab = Lab(courtesy=courtesy)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lab.scan.run)
        lab.gate.let(CHUNKS - 2)
        await lab.stopped_at(2)
        courtesy.seconds = 3600.0
        lab.gate.let(math.inf)
    lab.check_complete()


async def test_beside_a_guest_some_workers_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """With half of the CPUs for the scan one of two workers has a chunk; without the guest both."""
    monkeypatch.setattr(pace, "_BESIDE_A_GUEST", 1)
    monkeypatch.setattr(pace, "_ASK_AGAIN", 0.01)
    courtesy = Moody(0.0)
    lab = Lab(courtesy=courtesy)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lab.scan.run)
        await lab.stopped_at(1)
        asked = courtesy.asked
        await fakes.until(lambda: courtesy.asked > asked + 4)
        assert lab.gate.waiting == 1
        courtesy.guest = False
        await lab.stopped_at(2)
        lab.gate.let(math.inf)
    lab.check_complete()


async def test_statistics_while_running() -> None:
    """Rate and eta are there once something was read, and gone at the end."""
    lab = Lab(8)
    assert lab.scan.statistics().eta is None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lab.scan.run)
        await lab.stopped_at(2)
        now = lab.scan.statistics()
        assert (now.state, now.scanned) == (progress.SCANNING, 8 * 16 * K)
        assert now.rate > 0
        assert now.eta is not None
        assert now.savings == dict.fromkeys(plan.REASONS, 0)
        lab.gate.let(math.inf)
    assert lab.scan.statistics().eta is None
