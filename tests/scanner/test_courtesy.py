# SPDX-License-Identifier: Apache-2.0
"""The scan gives way to a guest that feels it, and takes all of an idle machine."""

from collections.abc import Callable

import numpy as np
import pytest

from scanner import courtesy

# Upper bounds of the buckets, in seconds: 0.1 ms, 0.125 ms, ... about 1.3 s.
BOUNDS = 0.0001 * 1.25 ** np.arange(43)

Felt = Callable[[float], float]


def always(value: float) -> Felt:
    """Whatever the scan does."""
    return lambda _: value


NEVER = always(0)

# The part of its time that the scan works beside a guest that feels nothing: the rest is for learning.
FULL = 5 / 6


def beside(scan: float, alone: float) -> Felt:
    """One value while the scan works, another without."""
    return lambda scanning: scan if scanning else alone


class Whole:
    """Makes whole numbers of fractions that come one by one, so that their sum stays right."""

    def __init__(self) -> None:
        self.left = 0.0

    def __call__(self, value: float) -> int:
        self.left += value
        whole = int(self.left + 1e-9)
        self.left -= whole
        return whole


class Guest:
    """A guest that feels the scan (1, else 0) in its requests a second and in the seconds each takes.

    It feels a scan that stops for another `drain` seconds. `depth` is how many requests are under way, what
    follows from the rest if not given. The clock is the test's.
    """

    def __init__(
        self,
        rate: Felt,
        latency: Felt,
        *,
        flushes: Felt = NEVER,
        flush_latency: Felt = NEVER,
        depth: Felt | None = None,
        drain: float = 0.0,
    ) -> None:
        self.now = self.stopped = 0.0
        self.kinds = [(rate, latency), (flushes, flush_latency)]
        self.depth = depth or (
            lambda felt: sum(rate(felt) * latency(felt) for rate, latency in self.kinds)
        )
        self.drain = drain
        # Writes, then flushes.
        self.counts = np.zeros((2, len(BOUNDS)), np.uint64)
        self.whole = [Whole(), Whole()]
        self.looked = Whole()
        self.felt = 1.0
        self.courtesy = courtesy.Courtesy(
            self.counts.copy,
            BOUNDS,
            depth=lambda: self.looked(self.depth(self.felt)),
            clock=lambda: self.now,
        )

    def falls_idle(self) -> None:
        self.kinds = []

    def live(self, seconds: float, step: float = 0.02, chunk: float = 0.0) -> float:
        """Let time pass and return the part of it that the scan worked.

        Two workers ask in each step, unless one is at work: it has begun on a chunk that takes so many seconds.
        """
        worked = 0
        steps = round(seconds / step)
        busy = 0.0
        for _ in range(steps):
            at_work = self.now < busy
            if self.courtesy.wait(at_work) == 0 and not at_work:
                at_work, busy = True, self.now + chunk - step / 2
            if at_work:
                worked += 1
                self.felt, self.stopped = 1.0, self.now
            elif self.now - self.stopped >= self.drain:
                self.felt = 0.0
            for kind, (rate, latency) in enumerate(self.kinds):
                took = int(np.searchsorted(BOUNDS, latency(self.felt)))
                self.counts[kind, took] += np.uint64(self.whole[kind](rate(self.felt) * step))
            self.now += step
        return worked / steps


def test_an_idle_guest_leaves_the_whole_machine() -> None:
    guest = Guest(NEVER, NEVER)
    assert guest.live(10) == 1
    assert not guest.courtesy.guest


def test_a_few_fast_requests_leave_the_whole_machine() -> None:
    """What any idle system writes now and then is no reason to rest."""
    assert Guest(always(5), always(0.001)).live(60) == 1


def test_a_guest_that_feels_nothing_costs_only_the_rests() -> None:
    guest = Guest(always(1000), always(0.0001))
    assert guest.live(60) == pytest.approx(FULL, abs=0.03)
    assert guest.courtesy.guest


@pytest.mark.parametrize("rate", [1, 5, 20])
def test_a_slow_guest_that_feels_nothing_costs_only_the_rests(rate: float) -> None:
    """Each request takes long by nature: the settling is long then, and the work with it."""
    assert Guest(always(rate), always(0.1)).live(120) > 0.8


def test_a_guest_that_suffers_is_given_way_to() -> None:
    """Five times slower beside the scan: the least share, never none."""
    guest = Guest(always(1000), beside(0.0005, 0.0001))
    guest.live(10)
    assert guest.courtesy.allowed == pytest.approx(0.05)
    assert guest.live(60) == pytest.approx(0.05, abs=0.02)


@pytest.mark.parametrize("chunk", [0.2, 0.8, 2.0])
def test_chunks_that_take_long_are_paid_for(chunk: float) -> None:
    """One is still being read while the other worker asks: the rest was taken to have begun, with the scan in it."""
    guest = Guest(always(1000), beside(0.0005, 0.0001))
    guest.live(60, chunk=chunk)
    assert guest.live(300, chunk=chunk) == pytest.approx(0.05, abs=0.03)


@pytest.mark.parametrize(("rate", "alone", "beside_it"), [(10, 0.01, 0.03), (18, 0.005, 0.05)])
def test_a_guest_of_few_and_short_requests_is_not_taken_for_none(
    rate: float, alone: float, beside_it: float
) -> None:
    """Ten looks find nothing of a tenth of a request in one rest of three."""
    guest = Guest(always(rate), beside(beside_it, alone))
    guest.live(60)
    assert guest.live(120) < 0.25


def test_a_guest_that_the_scan_brings_to_a_standstill_is_given_way_to() -> None:
    """500 requests a second become 10, of one writer: that was taken for an idle guest."""
    guest = Guest(beside(10, 500), beside(0.1, 0.002))
    guest.live(60)
    assert guest.courtesy.allowed < 0.2


def test_a_guest_of_few_requests_is_given_way_to() -> None:
    """Six requests a rest were too few to be judged, ever."""
    guest = Guest(always(30), beside(0.03, 0.002))
    guest.live(60)
    assert guest.courtesy.allowed < 0.2


def test_a_few_requests_that_become_a_little_slower_are_given_way_to() -> None:
    """Here the depth does not tell: one in five looks finds a request."""
    guest = Guest(always(30), beside(0.006, 0.002))
    guest.live(60)
    assert guest.courtesy.allowed < 0.2


def test_a_guest_of_fast_requests_is_given_way_to() -> None:
    """Where a twentieth of the looks finds a request, their number tells that it is not idle."""
    guest = Guest(always(100), beside(0.0004, 0.0001))
    guest.live(60)
    assert guest.courtesy.allowed < 0.2


@pytest.mark.parametrize("rate", [10, 30, 100])
def test_uneven_latencies_are_no_reason(rate: float) -> None:
    """The slowest of a few requests are further apart from one time to the next than the scan may make them."""
    chance = np.random.default_rng(7)
    guest = Guest(always(rate), lambda _: chance.exponential(0.02), depth=always(0.6))
    assert guest.live(300) > 0.8 * FULL


def test_a_burst_that_is_over_before_the_rest_is_no_reason() -> None:
    """A rest in which the guest does nothing shows nothing of it."""
    guest = Guest(beside(100, 0), always(0.05))
    assert guest.live(60) == pytest.approx(FULL, abs=0.03)


def test_a_guest_whose_flushes_alone_suffer_is_given_way_to() -> None:
    """A write goes into a cache, and what waits for the disk is the flush. One in 51 requests is one."""
    guest = Guest(always(500), always(0.0001), flushes=always(10), flush_latency=beside(0.05, 0.01))
    guest.live(60)
    assert guest.courtesy.allowed < 0.2


def test_flushes_that_take_long_by_nature_are_no_reason() -> None:
    guest = Guest(always(500), always(0.0001), flushes=always(10), flush_latency=always(0.05))
    assert guest.live(60) == pytest.approx(FULL, abs=0.03)


def test_flushes_are_not_taken_for_slow_writes() -> None:
    """The more of the requests are flushes with the scan, the higher the percentile of both together would be."""
    guest = Guest(always(500), always(0.0001), flushes=beside(10, 2), flush_latency=always(0.05))
    assert guest.live(60) == pytest.approx(FULL, abs=0.03)


def test_what_the_scan_leaves_under_way_is_not_taken_for_the_guests_own() -> None:
    """A read of the scan's keeps requests waiting into the rest: 5 % of it, as slow as those beside the scan."""
    guest = Guest(beside(400, 1000), beside(0.02, 0.001), depth=always(2), drain=0.05)
    guest.live(60)
    assert guest.courtesy.allowed < 0.2


def test_a_guest_whose_requests_pile_up_is_given_way_to() -> None:
    """Each takes no longer by its percentile, but more of them wait at once."""
    guest = Guest(always(1000), always(0.0001), depth=beside(8, 4))
    guest.live(60)
    assert guest.courtesy.allowed < 0.2


def test_a_guest_whose_requests_do_not_end_is_given_way_to() -> None:
    """No request ends beside the scan, so none has a latency: the depth alone is known, after a long settling."""
    guest = Guest(beside(0, 100), always(0.002), depth=beside(1, 0.2), drain=0.5)
    guest.live(60)
    assert guest.courtesy.allowed < 0.2


def test_a_depth_that_is_the_same_is_no_reason() -> None:
    guest = Guest(always(1000), always(0.0001), depth=always(32))
    assert guest.live(60) == pytest.approx(FULL, abs=0.03)


@pytest.mark.parametrize(("beside_it", "share"), [(1.2, 0.5), (1.5, 0.2), (2, 0.1)])
def test_the_share_is_what_the_guest_bears_on_average(beside_it: float, share: float) -> None:
    """Its requests may take 1.1 of what they take without a scan, over all of the time."""
    # Beyond the buckets' resolution, and at a depth that is a whole number.
    guest = Guest(beside(10000 / beside_it, 10000), always(0.0001), depth=always(4))
    guest.live(10)
    # Less what a figure may be wrong by: a tenth of a request at each look of few.
    assert share <= guest.courtesy.allowed < 2.5 * share


def test_the_share_is_what_the_guest_bears_at_its_percentile() -> None:
    """Four requests in a hundred are slow beside the scan: over all of the time, one in a hundred may be."""
    turn = iter(range(1 << 30))

    def latency(felt: float) -> float:
        return 0.001 if felt and next(turn) % 25 == 0 else 0.0001

    guest = Guest(always(1000), latency, depth=always(1))
    guest.live(60, step=0.001)
    assert 0.2 < guest.courtesy.allowed < 0.4


@pytest.mark.parametrize("rate", [1000, 10])
def test_it_takes_all_again_when_the_guest_falls_idle(rate: float) -> None:
    guest = Guest(beside(rate, 1000), beside(0.1, 0.002))
    guest.live(60)
    assert guest.courtesy.allowed < 0.2
    guest.falls_idle()
    guest.live(3)
    assert guest.live(1) == 1
    assert not guest.courtesy.guest


def test_what_happened_while_the_scan_was_paused_is_of_no_condition() -> None:
    """An hour without a scan made the guest with it look well for as long as that was remembered."""
    guest = Guest(always(1000), beside(0.0005, 0.0001))
    guest.live(0.5)
    guest.now += 3600
    guest.counts[0, 0] += np.uint64(3600 * 1000)
    guest.live(10)
    assert guest.courtesy.allowed == pytest.approx(0.05)


def test_switched_off_it_allows_everything() -> None:
    guest = Guest(always(1000), beside(0.0005, 0.0001))
    guest.courtesy.enabled = False
    assert guest.live(30) == 1
    assert guest.courtesy.allowed == 1
    assert not guest.courtesy.guest
