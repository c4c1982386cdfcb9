# SPDX-License-Identifier: Apache-2.0
"""How fast the scan may go: a rate limit, and giving way to the guest.

Both only ever say how long a worker waits before its next chunk. The rate is an upper bound whatever the
guest does; the courtesy takes from what is left.
"""

from typing import Protocol

# A rest is looked at anew this often (seconds), so that a guest falling idle frees the machine at once.
LONGEST_REST = 0.25

# A courtesy that allows nothing is asked again after this time (seconds): some looks for each of its rests.
_ASK_AGAIN = 0.02


class Courtesy(Protocol):
    """Judges from the guest's own requests how much of the time the scan may use."""

    def share(self) -> float:
        """Return the part of its time a worker may work, 0 to 1. Called often and from any thread."""


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

    def delay(self, now: float, ended: float = 0.0, took: float = 0.0) -> float:
        """Return the seconds until a worker may take its next chunk, or asks again.

        Its last one took it `took` seconds and ended at `ended`.
        """
        wait = self._paid - now
        if wait <= 0 and self._courtesy is not None:
            share = self._courtesy.share()
            if share <= 0:
                return _ASK_AGAIN
            wait = min(ended + took * (1 - share) / share - now, LONGEST_REST)
        return max(wait, 0.0)
