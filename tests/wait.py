# SPDX-License-Identifier: Apache-2.0
"""Waiting for a state with a deadline, instead of sleeping and hoping."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

# Generous: it is reached only by what is broken, also on two busy cores.
DEADLINE = 60.0
_PAUSE = 0.01


def until(condition: Callable[[], T], what: str, deadline: float = DEADLINE) -> T:
    """Return the first true value of `condition()`; AssertionError with `what` after `deadline`."""
    end = time.monotonic() + deadline
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            raise AssertionError(f"not within {deadline:.0f} s: {what}")
        time.sleep(_PAUSE)
