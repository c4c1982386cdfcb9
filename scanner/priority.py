# SPDX-License-Identifier: Apache-2.0
"""Workers step back: the calling thread's CPU and I/O priority are lowered for good.

Raising them again takes a privilege, so only threads that are the scanner's own may call this.
"""

import contextlib
import ctypes
import os
import platform
import threading

_NICE = 19

# ioprio_set(2); the numbers are those of the kernel's system call tables.
_IOPRIO_SET = {"x86_64": 251, "aarch64": 30, "riscv64": 30, "ppc64le": 273, "s390x": 282}
_WHO_PROCESS = 1
_CLASS_SHIFT = 13
_CLASS_IDLE = 3
_CLASS_BEST_EFFORT, _LOWEST = 2, 7


def lower() -> None:
    """Give the calling thread the lowest priorities; a kernel that refuses is left as it is."""
    thread = threading.get_native_id()
    with contextlib.suppress(OSError):
        # On Linux a "process" is a thread here (setpriority(2), NOTES).
        os.setpriority(os.PRIO_PROCESS, thread, _NICE)
    call = _IOPRIO_SET.get(platform.machine())
    if call is None:
        return
    syscall = ctypes.CDLL(None).syscall
    # The idle class needs a privilege on kernels before 2.6.25 and under some security modules.
    idle, lowest = _CLASS_IDLE << _CLASS_SHIFT, _CLASS_BEST_EFFORT << _CLASS_SHIFT | _LOWEST
    if syscall(call, _WHO_PROCESS, thread, idle) != 0:
        syscall(call, _WHO_PROCESS, thread, lowest)
