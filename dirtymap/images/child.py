# SPDX-License-Identifier: Apache-2.0
"""Child processes that die with us, however we die.

The kernel's parent-death signal (PR_SET_PDEATHSIG, prctl(2)) is sent when the *thread* that made the
child ends, so that all children are made by one thread that lives as long as this process. The signal is
asked for in the child by a few lines of Python before they become the command: a function run between
fork and exec is not safe in a process with threads.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent import futures

from dirtymap import errors

# Arguments: signal, our process id, the command. The check closes the gap between fork and prctl.
_PRELUDE = """
import ctypes, os, sys
if ctypes.CDLL(None).prctl(1, int(sys.argv[1]), 0, 0, 0) or os.getppid() != int(sys.argv[2]):
    sys.exit("cannot be tied to the life of its parent")
os.execv(sys.argv[3], sys.argv[3:])
"""

_launcher = futures.ThreadPoolExecutor(1, thread_name_prefix="children")


class Child:
    """A running command. The caller stops it."""

    def __init__(self, command: Sequence[str], stderr: str, death: signal.Signals) -> None:
        """Start `command`, its messages into the file `stderr`, with `death` sent to it when we die.

        Raises ToolError where there is no such command.
        """
        path = shutil.which(command[0])
        if path is None:
            raise errors.ToolError(command, "is not installed or not in PATH")
        prelude = [sys.executable, "-I", "-S", "-c", _PRELUDE, str(int(death)), str(os.getpid())]
        self._stderr = stderr
        self._process = _launcher.submit(
            _start, [*prelude, os.path.abspath(path), *command[1:]], stderr
        ).result()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def has_ended(self, patience: float = 0) -> bool:
        """Return whether it has ended, waiting for it at most `patience` seconds."""
        if patience == 0:
            return self._process.poll() is not None
        try:
            self._process.wait(patience)
        except subprocess.TimeoutExpired:
            return False
        return True

    def complaint(self) -> str:
        """Return the last line it wrote to stderr."""
        with open(self._stderr, encoding="utf-8", errors="replace") as file:
            lines = [line.strip() for line in file if line.strip()]
        return lines[-1] if lines else f"exit status {self._process.returncode}"

    def stop(self, patience: float) -> None:
        """End it with SIGTERM; with SIGKILL after `patience` seconds. Returns when it has ended."""
        for _ in range(max(1, round(patience))):
            # More than one: a SIGTERM before qemu-nbd's main loop has begun is forgotten by it.
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()
            if self.has_ended(1):
                return
        self._process.kill()
        self._process.wait()


def _start(command: list[str], stderr: str) -> subprocess.Popen[bytes]:
    with open(stderr, "wb") as errors_file:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors_file,
            # The terminal's Ctrl-C is for us: we end it when nothing is in flight any more.
            start_new_session=True,
        )
