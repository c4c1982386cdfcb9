# SPDX-License-Identifier: Apache-2.0
"""Children that die with us."""

import os
import pathlib
import signal
import subprocess
import sys
import threading

import pytest

from dirtymap import errors
from dirtymap.images import child
from tests import wait


def _is_running(pid: int) -> bool:
    try:
        state = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_it_dies_with_a_killed_parent(tmp_path: pathlib.Path) -> None:
    """SIGKILL of the parent leaves it no time to clean up; the kernel ends the child."""
    program = (
        "import sys, signal\n"
        "from dirtymap.images import child\n"
        "c = child.Child(['sleep', '1000'], sys.argv[1], signal.SIGKILL)\n"
        "print(c.pid, flush=True)\n"
        "signal.pause()\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "stderr")],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    try:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        wait.until(
            lambda: pathlib.Path(f"/proc/{pid}/comm").read_text() == "sleep\n", "it has started"
        )
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()
    wait.until(lambda: not _is_running(pid), "the child has died")


def test_it_outlives_the_thread_that_asked_for_it(tmp_path: pathlib.Path) -> None:
    """The kernel's signal is bound to a thread; a worker thread's end must not be the child's."""
    made: list[child.Child] = []

    def make() -> None:
        made.append(child.Child(["cat", str(fifo)], str(tmp_path / "stderr"), signal.SIGKILL))

    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    # Opening the other end waits for the child, which by now must have survived the thread.
    with open(fifo, "wb"):
        assert not made[0].has_ended()
    wait.until(made[0].has_ended, "cat has read to the end")


def test_its_last_words_are_kept(tmp_path: pathlib.Path) -> None:
    made = child.Child(["cat", "/nonexistent"], str(tmp_path / "stderr"), signal.SIGKILL)
    wait.until(made.has_ended, "cat has ended")
    assert "No such file or directory" in made.complaint()
    silent = child.Child(["false"], str(tmp_path / "stderr"), signal.SIGKILL)
    wait.until(silent.has_ended, "false has ended")
    assert silent.complaint() == "exit status 1"


def test_one_that_ignores_sigterm_is_killed(tmp_path: pathlib.Path) -> None:
    deaf = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); signal.pause()"
    made = child.Child([sys.executable, "-c", deaf], str(tmp_path / "stderr"), signal.SIGKILL)
    made.stop(1)
    assert made.has_ended()
    made.stop(1)


def test_a_missing_command_is_named(tmp_path: pathlib.Path) -> None:
    with pytest.raises(errors.ToolError, match="no-such-tool: is not installed"):
        child.Child(["no-such-tool"], str(tmp_path / "stderr"), signal.SIGKILL)
