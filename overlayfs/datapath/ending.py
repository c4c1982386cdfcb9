# SPDX-License-Identifier: Apache-2.0
"""Ends that nobody tells: a connection that is gone, a process that is stuck."""

from __future__ import annotations

import contextlib
import os
import select
import signal
from pathlib import Path

import trio

# Seconds between two looks. The keeper tells of the end at once; this is for when it cannot.
_LOOK = 1.0


async def until_gone(fuse: int) -> None:
    """Return when the connection behind the /dev/fuse descriptor has ended: unmounted everywhere, or aborted.

    Looked at now and then: whoever waited for it in the kernel would be woken by every request.
    """
    watch = select.poll()
    watch.register(fuse, 0)  # an error is told whatever is asked for
    while not watch.poll(0):  # noqa: ASYNC110 (the kernel's event wakes at every request)
        await trio.sleep(_LOOK)


def kill(pid: int, start: int, patience: float) -> bool:
    """Kill the process `pid` that began at `start` (clock ticks since boot); return whether nothing of it runs.

    0 is no process. Gives up after `patience` seconds: what waits for a disk cannot be killed.
    """
    if pid == 0:
        return True
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    with contextlib.closing(os.fdopen(descriptor, "rb")):
        # The descriptor pins the number; the start tells whether it has been given anew before.
        found = state_and_start(pid)
        if found is None or found[1] != start:
            return True
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        watch = select.poll()
        watch.register(descriptor, select.POLLIN)
        return bool(watch.poll(patience * 1000))


def state_and_start(pid: int) -> tuple[str, int] | None:
    """Return proc(5)'s fields 3 and 22 of a process; None where there is none."""
    try:
        # Counted from behind the name, which may hold anything.
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return words[0], int(words[19])
