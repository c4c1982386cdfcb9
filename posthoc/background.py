# SPDX-License-Identifier: Apache-2.0
"""Going to the background: the command returns when the session in a process of its own is ready.

The session is a fresh process, not a fork: the libraries in use (numpy's, libfuse's) may have threads. Until
it is ready it shares the terminal, so that what goes wrong is told where the user looks; then `detach` sends
whatever it still has to say to a log.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

READY_OPTION = "--ready-fd"
_READY = b"ready\n"


def is_meant(arguments: Sequence[str]) -> bool:
    """Return whether `posthoc ARGUMENTS` needs nothing but `start`, which parses them in the new process."""
    here = {"-h", "--help", "--foreground", READY_OPTION}
    return arguments[:1] == ["mount"] and not here & {word.partition("=")[0] for word in arguments}


def start(arguments: Sequence[str]) -> int:
    """Run `posthoc ARGUMENTS` (a verb first) in a session of its own; return 0 once it is ready, else its exit code.

    Interrupted while waiting, the session is ended and waited for: it takes down what it has set up.
    """
    receiver, sender = os.pipe()
    # -P: a folder that happens to be the current one is no place to import from.
    # The option stands right behind the verb: what follows a "--" is no option.
    verb, *others = arguments
    told = [verb, READY_OPTION, str(sender), *others]
    command = [sys.executable, "-P", "-m", "posthoc", *told]
    process = subprocess.Popen(
        command, pass_fds=[sender], stdin=subprocess.DEVNULL, start_new_session=True
    )
    os.close(sender)
    try:
        with os.fdopen(receiver, "rb") as stream:
            if stream.read() == _READY:
                return 0
        return process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise


def detach(ready_fd: int, log: Path) -> None:
    """Let go of the terminal, write to `log` from now on, and tell `start` that the session is ready."""
    sys.stdout.flush()
    sys.stderr.flush()
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    os.dup2(fd, sys.stdout.fileno())
    os.dup2(fd, sys.stderr.fileno())
    os.close(fd)
    # A session must not keep somebody's file system busy only because it was started there.
    os.chdir("/")
    os.write(ready_fd, _READY)
    os.close(ready_fd)
