# SPDX-License-Identifier: Apache-2.0
"""The rate limit and giving way, on a clock of the test's own."""

import pytest

from scanner import pace


class Share:
    """A courtesy that says what the test wants."""

    def __init__(self, value: float) -> None:
        self.value = value

    def share(self) -> float:
        return self.value


def test_without_a_limit_nobody_waits() -> None:
    """No rate, no courtesy: no delay, however much was read."""
    free = pace.Pace()
    free.charge(1 << 40, 0.0)
    assert free.delay(0.0) == 0
    assert free.delay(5.0, ended=5.0, took=5.0) == 0


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


def test_a_share_of_a_quarter_rests_three_times_as_long_as_it_works() -> None:
    """The rest is what makes the work that share of the time."""
    quarter = pace.Pace(courtesy=Share(0.25))
    assert quarter.delay(5.0, ended=5.0, took=0.01) == pytest.approx(0.03)
    assert quarter.delay(5.02, ended=5.0, took=0.01) == pytest.approx(0.01)
    assert quarter.delay(5.03, ended=5.0, took=0.01) == pytest.approx(0)
    assert pace.Pace(courtesy=Share(1.0)).delay(5.0, ended=5.0, took=0.01) == 0


def test_a_long_rest_is_looked_at_anew_but_not_cut_short() -> None:
    """A chunk of 0.12 s at a twentieth is followed by 2.28 s. After a quarter of a second it went on all the same."""
    courtesy = Share(0.05)
    giving = pace.Pace(courtesy=courtesy)
    assert giving.delay(5.0, ended=5.0, took=0.12) == pace.LONGEST_REST
    assert giving.delay(6.0, ended=5.0, took=0.12) == pace.LONGEST_REST
    assert giving.delay(7.2, ended=5.0, took=0.12) == pytest.approx(0.08)
    courtesy.value = 1.0
    assert giving.delay(5.25, ended=5.0, took=0.12) == 0


def test_a_share_of_nothing_waits_until_it_changes() -> None:
    """While the guest needs everything, a worker only asks again."""
    courtesy = Share(0.0)
    giving = pace.Pace(courtesy=courtesy)
    assert giving.delay(5.0) > 0
    assert giving.delay(5.0, ended=5.0, took=1.0) > 0
    courtesy.value = 1.0
    assert giving.delay(5.0) == 0


def test_a_rest_is_waited_for_within_a_limit() -> None:
    """A worker's own rest and the common limit: the longer one counts."""
    limited = pace.Pace(100, Share(0.5))
    assert limited.delay(1.0, ended=1.0, took=0.1) == pytest.approx(0.1)
    limited.charge(200, 1.0)
    assert limited.delay(1.0, ended=1.0, took=0.1) == pytest.approx(2.0)
    assert limited.delay(3.0, ended=1.0, took=0.1) == 0
