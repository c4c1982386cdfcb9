# SPDX-License-Identifier: Apache-2.0
"""The scan gives way to a guest that feels it, and takes all of an idle machine."""

from collections.abc import Callable

import numpy as np
import pytest

from scanner import courtesy

# Upper bounds of ten buckets, in microseconds: 100, 200, ... 1000.
BOUNDS = np.arange(1, 11) * 100.0


class Guest:
    """A guest whose requests take what `latency` says of the scan's share; its clock is the test's.

    `depth` is how many of them are under way, also by the share.
    """

    def __init__(
        self,
        rate: float,
        latency: Callable[[float], int],
        depth: Callable[[float], int] = lambda _: 1,
    ) -> None:
        self.now = 0.0
        self.rate = rate
        self.latency = latency
        self.counts = np.zeros(10, np.uint64)
        self.share = 1.0
        self.courtesy = courtesy.Courtesy(
            self.counts.copy, BOUNDS, depth=lambda: depth(self.share), clock=lambda: self.now
        )

    def live(self, seconds: float, step: float = 0.1) -> list[float]:
        """Let time pass and return the share that was allowed in each step."""
        shares = []
        for _ in range(round(seconds / step)):
            self.share = share = self.courtesy.share()
            self.counts[self.latency(share)] += np.uint64(self.rate * step)
            self.now += step
            shares.append(share)
        return shares


def test_an_idle_guest_leaves_the_whole_machine() -> None:
    guest = Guest(rate=0, latency=lambda _: 0)
    assert guest.live(10) == [1.0] * 100


def test_a_guest_that_feels_nothing_costs_only_the_rests() -> None:
    shares = Guest(rate=1000, latency=lambda _: 0).live(60)
    assert set(shares) == {0.0, 1.0}
    assert shares.count(0.0) / len(shares) == pytest.approx(0.2 / 1.2, abs=0.03)


def test_a_guest_that_suffers_is_given_way_to() -> None:
    """Five times slower with the scan whatever it does: the least share, never none."""
    guest = Guest(rate=1000, latency=lambda share: 4 if share > 0 else 0)
    guest.live(60)
    assert guest.courtesy.allowed == pytest.approx(0.05)


def test_a_guest_whose_requests_pile_up_is_given_way_to() -> None:
    """Each takes no longer by its percentile, but more of them wait at once."""
    guest = Guest(rate=1000, latency=lambda _: 0, depth=lambda share: 8 if share > 0 else 4)
    guest.live(60)
    assert guest.courtesy.allowed == pytest.approx(0.05)


def test_a_depth_that_is_the_same_is_no_reason() -> None:
    guest = Guest(rate=1000, latency=lambda _: 0, depth=lambda _: 32)
    assert set(guest.live(60)) == {0.0, 1.0}


def test_the_share_settles_where_the_guest_is_well() -> None:
    """Slow above a third of the time, fast below: the share swings about a third."""
    guest = Guest(rate=1000, latency=lambda share: 4 if share > 1 / 3 else 0)
    guest.live(60)
    shares = [share for share in guest.live(60) if share]
    assert 0.1 < np.mean(shares) < 0.45


def test_it_takes_all_again_when_the_guest_falls_idle() -> None:
    guest = Guest(rate=1000, latency=lambda share: 4 if share > 0 else 0)
    guest.live(60)
    guest.rate = 0
    guest.live(3)
    assert guest.courtesy.share() == 1.0


def test_switched_off_it_allows_everything() -> None:
    guest = Guest(rate=1000, latency=lambda share: 4 if share > 0 else 0)
    guest.courtesy.enabled = False
    assert set(guest.live(30)) == {1.0}
    assert guest.courtesy.allowed == 1.0
