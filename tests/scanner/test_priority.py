# SPDX-License-Identifier: Apache-2.0
"""Threads of the scanner step back, and only they."""

import os
import threading

from scanner import priority


def test_a_thread_lowers_only_its_own_priority() -> None:
    """The worker ends at the lowest CPU priority; the thread that serves the guest keeps its own."""
    mine = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    seen: list[int] = []

    def work() -> None:
        priority.lower()
        seen.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [19]
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == mine
