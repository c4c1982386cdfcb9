# SPDX-License-Identifier: Apache-2.0
"""How fast the scan may go: a rate limit, and giving way to the guest.

Both only ever say how long a worker waits before its next chunk. The rate is an upper bound whatever the
guest does; the courtesy takes from what is left.
"""

import os
from typing import Protocol

# Beside a guest the workers leave it half of the CPUs: with one on each of two, the 99th percentile of 4 KiB
# writes was 1.7 of that without a scan, with one on one 0.75, and the scan as fast.
_BESIDE_A_GUEST = max(len(os.sched_getaffinity(0)) // 2, 1)

# A worker that is one too many asks again after this time (seconds).
_ASK_AGAIN = 0.25


class Courtesy(Protocol):
    """Judges from the guest's own requests when the scan may work."""

    def wait(self, at_work: int = 0) -> float:
        """Return the seconds after which a worker asks again, 0 if it may take a chunk; `at_work` others have one.

        Called by one thread at a time.
        """

    @property
    def guest(self) -> bool:
        """Whether there is a guest to give way to, as of the last call of `wait`."""


class Pace:
    """The waits of all workers of one scan. Times are seconds of one clock, given by the caller.

    Not thread-safe: the scan calls it under its own lock.
    """

    def __init__(self, rate: int | None = None, courtesy: Courtesy | None = None) -> None:
        self._rate = rate
        self._courtesy = courtesy
        # When the bytes taken so far have been paid for. There is no credit for idle time: a scan
        # that was paused goes on at its rate, not in a burst.
        self._paid = 0.0

    @property
    def rate(self) -> int | None:
        """Bytes of the disk a second, or None for no limit."""
        return self._rate

    def set_rate(self, rate: int | None, now: float) -> None:
        """Change the limit; what was taken under the former one is forgiven."""
        self._rate = rate
        self._paid = now

    def charge(self, length: int, now: float) -> None:
        """Note that `length` bytes of the disk are about to be read."""
        if self._rate is not None:
            self._paid = max(self._paid, now) + length / self._rate

    @property
    def gentle(self) -> bool:
        """Whether there is a guest that should not feel the scan."""
        return self._courtesy is not None and self._courtesy.guest

    def delay(self, now: float, at_work: int = 0) -> float:
        """Return the seconds until a worker may take its next chunk, or asks again; `at_work` others have one."""
        wait = self._paid - now
        if wait <= 0 and self._courtesy is not None:
            wait = self._courtesy.wait(at_work)
            if wait <= 0 and self.gentle and at_work >= _BESIDE_A_GUEST:
                return _ASK_AGAIN
        return max(wait, 0.0)
