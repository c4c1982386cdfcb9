# SPDX-License-Identifier: Apache-2.0
"""Workers step back: the calling thread's CPU and I/O priority are lowered for good.

Raising them again takes a privilege, so only threads that are the scanner's own may call this.
"""

import contextlib
import ctypes
import os
import platform
import struct
import threading
from typing import NamedTuple

_NICE = 19


class _Calls(NamedTuple):
    """Numbers of the kernel's system call tables."""

    ioprio_set: int
    sched_setattr: int


_CALLS = {
    "x86_64": _Calls(251, 314),
    "aarch64": _Calls(30, 274),
    "riscv64": _Calls(30, 274),
    "ppc64le": _Calls(273, 355),
    "s390x": _Calls(282, 345),
}
# The time slice that is asked for, nanoseconds: the longest there is (Linux 6.12; earlier kernels know none). A
# thread that wakes up and asks for a shorter one, as all do that do not ask, preempts at once; else it waits until
# 0.7 ms are over, whatever the priority (kernel/sched/fair.c, do_preempt_short()). 4 KiB writes at depth 1 beside a
# scan: 99.9th percentile 105 us with it, 169 us without.
_SLICE = 100_000_000
_KEEP_POLICY = 0x08
_WHO_PROCESS = 1
_CLASS_SHIFT = 13
_CLASS_IDLE = 3
_CLASS_BEST_EFFORT, _LOWEST = 2, 7


def lower() -> None:
    """Give the calling thread the lowest priorities and the longest time slice; what the kernel refuses is left."""
    thread = threading.get_native_id()
    with contextlib.suppress(OSError):
        # On Linux a "process" is a thread here (setpriority(2), NOTES).
        os.setpriority(os.PRIO_PROCESS, thread, _NICE)
    calls = _CALLS.get(platform.machine())
    if calls is None:
        return
    syscall = ctypes.CDLL(None).syscall
    syscall(calls.sched_setattr, 0, _attributes(), 0)
    # The idle class needs a privilege on kernels before 2.6.25 and under some security modules.
    idle, lowest = _CLASS_IDLE << _CLASS_SHIFT, _CLASS_BEST_EFFORT << _CLASS_SHIFT | _LOWEST
    if syscall(calls.ioprio_set, _WHO_PROCESS, thread, idle) != 0:
        syscall(calls.ioprio_set, _WHO_PROCESS, thread, lowest)


def _attributes() -> bytes:
    """Return a struct sched_attr (sched(7)): size, policy, flags, nice, priority, runtime, deadline, period."""
    layout = struct.Struct("=IIQiIQQQ")
    return layout.pack(layout.size, 0, _KEEP_POLICY, _NICE, 0, _SLICE, 0, 0)
