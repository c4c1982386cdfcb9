# SPDX-License-Identifier: Apache-2.0
"""SIGTERM and SIGHUP end a command as Ctrl-C does: what it has set up is taken down.

By default they would kill the process where it stands, with its temporary files, its children and a half of
a map left behind. A session replaces these handlers while it serves.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

_ENDING = (signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def as_ctrl_c() -> Iterator[list[int]]:
    """Treat them so for the time of the context; yields the list of those that have come.

    One that is ignored (nohup) stays ignored. Nothing happens in any thread but the main one.
    """
    arrived: list[int] = []

    def end(number: int, frame: FrameType | None) -> None:
        arrived.append(number)
        if len(arrived) > 1:
            # Whoever ends a process often sends both; the first is being obeyed.
            return
        # Whatever Ctrl-C does at this moment: trio lets it in only where it may, and others hold it back.
        handler = signal.getsignal(signal.SIGINT)
        if not callable(handler):
            raise KeyboardInterrupt
        handler(signal.SIGINT, frame)

    if threading.current_thread() is not threading.main_thread():
        yield arrived
        return
    before = {number: signal.getsignal(number) for number in _ENDING}
    for number, handler in before.items():
        if handler is signal.SIG_DFL:
            signal.signal(number, end)
    try:
        yield arrived
    finally:
        for number, handler in before.items():
            if handler is signal.SIG_DFL:
                signal.signal(number, handler)
