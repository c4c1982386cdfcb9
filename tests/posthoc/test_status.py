# SPDX-License-Identifier: Apache-2.0
"""`posthoc status --watch`: on a terminal, into a pipe, for machines; until Ctrl-C or the mount's end."""

import json
import os
import pathlib
import signal
import subprocess

import pytest

from tests import command, terminal
from tests.posthoc import images

Path = pathlib.Path


def watch(mountpoint: Path, *options: str) -> "subprocess.Popen[str]":
    # As in a terminal: what is started in the background of a shell script ignores SIGINT.
    return subprocess.Popen(
        [
            "env",
            "--default-signal=INT",
            *command.words("status", "--watch", *options, mountpoint),
        ],
        env=command.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_watching_into_a_pipe_ends_with_the_mount(tmp_path: Path, mountpoint: Path) -> None:
    """One status after another, each at once, not when a buffer is full."""
    live, reference = images.pair(tmp_path)
    with command.mounted(live, reference, mountpoint, "--paused") as mount, watch(mount) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        states = (line for line in process.stdout if line.startswith("state: "))
        assert next(states) == "state: paused\n"
        command.control(mount, "resume")
        assert next(line for line in states if line != "state: paused\n") == "state: complete\n"
        command.posthoc("umount", mount)
        process.stdout.read()
        assert process.wait(60) == 0
        assert process.stderr.read() == f"posthoc: {mount}: the mount has ended\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_watching_as_json_ends_with_a_signal(
    tmp_path: Path, mountpoint: Path, number: signal.Signals
) -> None:
    """Ctrl-C is how one ends it."""
    live, reference = images.pair(tmp_path)
    with command.mounted(live, reference, mountpoint), watch(mountpoint, "--json") as process:
        assert process.stdout is not None
        for _ in range(2):
            text = "".join(iter(process.stdout.readline, "}\n")) + "}"
            assert json.loads(text)["size"] == 4 << 20
        process.send_signal(number)
        assert process.wait(60) == {signal.SIGINT: 0, signal.SIGTERM: 143}[number]


def test_watching_on_a_terminal(tmp_path: Path, mountpoint: Path) -> None:
    """One screen that changes."""
    live, reference = images.pair(tmp_path)
    with command.mounted(live, reference, mountpoint, "--paused") as mount:
        with terminal.running(command.words("status", "--watch", mount)) as (process, screen):
            screen.until("state: paused")
            command.control(mount, "resume")
            screen.until("state: complete")
            screen.type(b"\x03")
            assert process.wait(60) == 0
        assert os.fsencode(str(live))[-8:] in screen.seen
