# SPDX-License-Identifier: Apache-2.0
"""The rate limit and giving way, on a clock of the test's own."""

import pytest

from scanner import pace


class Mood:
    """A courtesy that says what the test wants."""

    def __init__(self, wait: float = 0.0, *, guest: bool = True) -> None:
        self.seconds = wait
        self.guest = guest

    def wait(self, at_work: int = 0) -> float:
        return self.seconds


def test_without_a_limit_nobody_waits() -> None:
    """No rate, no courtesy: no delay, however much was read."""
    free = pace.Pace()
    free.charge(1 << 40, 0.0)
    assert free.delay(0.0) == 0
    assert free.delay(5.0, at_work=99) == 0
    assert not free.gentle


def test_a_limit_spreads_what_is_read_over_time() -> None:
    """After N bytes the next chunk waits N / rate seconds, no less and no more."""
    limited = pace.Pace(100)
    assert limited.delay(0.0) == 0
    limited.charge(50, 0.0)
    assert limited.delay(0.0) == pytest.approx(0.5)
    assert limited.delay(0.4) == pytest.approx(0.1)
    assert limited.delay(0.6) == 0


def test_two_workers_share_one_limit() -> None:
    """What both take adds up."""
    limited = pace.Pace(100)
    limited.charge(50, 0.0)
    limited.charge(50, 0.0)
    assert limited.delay(0.0) == pytest.approx(1.0)


def test_idle_time_earns_no_burst() -> None:
    """A scan that was paused for an hour goes on at its rate."""
    limited = pace.Pace(100)
    limited.charge(100, 3600.0)
    assert limited.delay(3600.0) == pytest.approx(1.0)


def test_a_new_limit_holds_at_once() -> None:
    """The debt of a slow rate does not outlive it."""
    limited = pace.Pace(1)
    limited.charge(1 << 30, 0.0)
    limited.set_rate(1 << 30, 10.0)
    assert limited.delay(10.0) == 0
    assert limited.rate == 1 << 30
    limited.set_rate(None, 10.0)
    limited.charge(1 << 40, 10.0)
    assert limited.delay(10.0) == 0


def test_a_worker_waits_as_long_as_the_courtesy_says() -> None:
    courtesy = Mood(0.3)
    giving = pace.Pace(courtesy=courtesy)
    assert giving.delay(5.0) == 0.3
    courtesy.seconds = 0.0
    assert giving.delay(5.0) == 0


def test_what_has_to_be_paid_comes_first() -> None:
    """The courtesy is asked when the limit lets a worker go on: what it then says is of that moment."""
    courtesy = Mood(0.3)
    limited = pace.Pace(100, courtesy)
    limited.charge(200, 1.0)
    assert limited.delay(1.0) == pytest.approx(2.0)
    assert limited.delay(3.0) == 0.3


def test_half_of_the_cpus_are_left_to_a_guest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "_BESIDE_A_GUEST", 2)
    courtesy = Mood()
    giving = pace.Pace(courtesy=courtesy)
    assert giving.gentle
    assert giving.delay(5.0, at_work=1) == 0
    assert giving.delay(5.0, at_work=2) > 0
    courtesy.guest = False
    assert not giving.gentle
    assert giving.delay(5.0, at_work=2) == 0
