# SPDX-License-Identifier: Apache-2.0
"""A command on a terminal of its own, as a person runs it."""

import contextlib
import os
import pty
import select
import subprocess
from collections.abc import Iterator, Sequence

from tests import command, wait


class Screen:
    """What a command has written to its terminal."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.seen = b""

    def _look(self) -> bool:
        """Take in what there is; return whether that may go on."""
        while select.select([self._fd], [], [], 0)[0]:
            try:
                part = os.read(self._fd, 65536)
            except OSError:
                # EIO: the last process on the other side has ended.
                return False
            self.seen += part
        return True

    def until(self, text: str) -> None:
        """Wait until `text` has been written since the last call."""

        def found() -> bool:
            goes_on = self._look()
            here = text.encode() in self.seen[self._from :]
            assert here or goes_on, self.seen
            return here

        wait.until(found, f"the screen shows {text!r}")
        self._from = self.seen.index(text.encode(), self._from) + len(text.encode())

    _from = 0

    def type(self, keys: bytes) -> None:
        """Press keys."""
        os.write(self._fd, keys)


@contextlib.contextmanager
def running(words: Sequence[str]) -> Iterator[tuple["subprocess.Popen[bytes]", Screen]]:
    """Run a command whose terminal this is; it is killed at the end of the block if it still runs."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        # Makes the terminal its own, so that Ctrl-C is a signal.
        ["setsid", "--ctty", "--wait", "env", "--default-signal=INT", *words],
        env=command.environment({"TERM": "xterm", "COLUMNS": "120", "LINES": "50"}),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    try:
        yield process, Screen(ours)
    finally:
        process.kill()
        process.wait()
        os.close(ours)
