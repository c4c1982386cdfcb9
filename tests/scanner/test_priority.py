# SPDX-License-Identifier: Apache-2.0
"""Threads of the scanner step back, and only they."""

import ctypes
import os
import platform
import struct
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


def test_a_worker_gives_up_the_cpu_to_whoever_wakes_up() -> None:
    """Its time slice is the longest there is: 0.1 s; kernels before 6.12 have none to be set."""
    version = tuple(int(number) for number in platform.release().split(".")[:2])
    seen: list[int] = []

    def work() -> None:
        priority.lower()
        attributes = ctypes.create_string_buffer(48)
        number = {"x86_64": 315, "aarch64": 275}[platform.machine()]
        assert ctypes.CDLL(None).syscall(number, 0, attributes, 48, 0) == 0
        seen.append(struct.unpack("=IIQiIQQQ", attributes.raw)[5])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == ([100_000_000] if version >= (6, 12) else [0])
