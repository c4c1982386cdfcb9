# SPDX-License-Identifier: Apache-2.0
"""The command: help for every verb, errors as one line, exit codes."""

import os
import pathlib
import signal
import subprocess
import sys
import tempfile

import numpy as np
import pytest

from dirtymap import bitmap, errors
from dirtymap.qcow2 import carrier
from posthoc import cli, exits
from tests import command, qemu, wait
from tests.posthoc import images

VERBS = ["mount", "umount", "status", "wait", "diff", "map", "merge", "verify", "install"]


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb: str) -> None:
    shown = command.posthoc(verb, "--help").stdout
    assert shown.startswith(f"usage: posthoc {verb}")
    assert "--json" in shown


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)]
)
def test_a_signal_leaves_nothing_half_written(
    tmp_path: pathlib.Path, number: signal.Signals, code: int
) -> None:
    """diff that was ended by SIGTERM while it wrote left .posthoc-*.new beside the map."""
    live, reference = images.pair(tmp_path, changed=[1])
    fifo, folder = tmp_path / "writing", tmp_path / "maps"
    os.mkfifo(fifo)
    folder.mkdir()
    script = (
        "import sys\n"
        "from dirtymap.qcow2 import atomic\n"
        "from posthoc import cli\n"
        "def stuck(*_):\n"
        "    open(sys.argv.pop(1), 'w').close()\n"
        # Not pause(): a signal that comes just before it would be waited for in vain.
        "    while True: pass\n"
        "atomic.write_all = stuck\n"
        "sys.exit(cli.main(sys.argv[2:]))\n"
    )
    words = [fifo, "diff", live, reference, "-o", folder / "map.qcow2"]
    process = subprocess.Popen(
        # As in a terminal: what is started in the background of a shell script ignores SIGINT.
        ["env", "--default-signal=INT", sys.executable, "-c", script, *words],
        env=command.environment(),
        stdout=subprocess.DEVNULL,
    )
    fifo.read_text()
    assert len(list(folder.iterdir())) == 1
    process.send_signal(number)
    assert process.wait(60) == code
    assert list(folder.iterdir()) == []


def test_a_signal_takes_the_children_along(tmp_path: pathlib.Path) -> None:
    """A diff of a format has a qemu-nbd and a folder for its socket."""
    live, reference = images.pair(tmp_path, 32 << 20, changed=[1])
    image, temporary = tmp_path / "live.qcow2", pathlib.Path(tempfile.mkdtemp())
    qemu.convert(live, image, "qcow2")
    process = subprocess.Popen(
        command.words("diff", "--rate", "64K", f"qcow2:{image}", reference),
        env=command.environment({"TMPDIR": str(temporary)}),
        stdout=subprocess.DEVNULL,
    )
    wait.until(lambda: list(temporary.glob("*/nbd")), "qemu-nbd listens")
    mine = command.children(process.pid)
    assert len(mine) == 1
    process.terminate()
    assert process.wait(60) == 143
    assert [pid for pid in mine if pathlib.Path(f"/proc/{pid}").exists()] == []
    temporary.rmdir()


def test_a_signal_that_is_ignored_stays_so(tmp_path: pathlib.Path) -> None:
    """nohup."""
    live, reference = images.pair(tmp_path)
    script = (
        "import os, signal, sys\n"
        "from posthoc import cli\n"
        "from posthoc.sessions import offline\n"
        "compare = offline.compare\n"
        "def hung_up(*words, **options):\n"
        "    os.kill(os.getpid(), signal.SIGHUP)\n"
        "    return compare(*words, **options)\n"
        "offline.compare = hung_up\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    words = [sys.executable, "-c", script, "diff", live, reference]
    assert subprocess.run(["nohup", *words], env=command.environment()).returncode == 0
    assert subprocess.run(words, env=command.environment()).returncode == 129


def test_help_names_the_exit_codes() -> None:
    assert "Exit codes: 0 done" in command.posthoc("--help").stdout


@pytest.mark.parametrize("words", [[], ["fly"], ["mount", "--rate", "0"], ["map"]])
def test_a_wrong_command_line_is_one_line(words: list[str]) -> None:
    told = command.posthoc(*words, status=2)
    assert told.stdout == ""
    assert told.stderr.startswith("posthoc: ")
    assert len(told.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (errors.UserError("no\nsuch"), exits.MISTAKE, "posthoc: no such\n"),
        (errors.ReadError("d", 0, 512, 5), exits.READ_ERROR, "posthoc: d: cannot read 512 bytes"),
        (KeyboardInterrupt(), exits.INTERRUPTED, ""),
        (
            ExceptionGroup("", [ExceptionGroup("", [errors.ImageError("d", "gone")])]),
            exits.MISTAKE,
            "posthoc: d: gone\n",
        ),
    ],
    ids=["mistake", "read-error", "ctrl-c", "from-a-nursery"],
)
def test_an_expected_error_is_one_line(
    error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.report_error(error) == code
    assert capsys.readouterr().err.startswith(line)


def test_a_bug_is_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    mixed = BaseExceptionGroup("", [errors.UserError("one"), KeyError("two")])
    assert cli.report_error(mixed) == exits.BUG
    assert "KeyError: 'two'" in capsys.readouterr().err


def test_a_reader_that_has_enough_is_no_error(tmp_path: pathlib.Path) -> None:
    """`posthoc map --extents MAP | head` ends quietly, like every tool in a pipe."""
    dirty = bitmap.Bitmap(64 << 20, 512)
    dirty.set_where(0, np.arange(dirty.segments) % 2 == 0)
    carrier.write(tmp_path / "map.qcow2", dirty)
    shown = subprocess.Popen(
        command.words("map", "--extents", tmp_path / "map.qcow2"),
        env=command.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert shown.stdout is not None
    assert shown.stderr is not None
    assert shown.stdout.read(1) == b"["
    shown.stdout.close()
    assert shown.stderr.read() == b""
    assert shown.wait(60) == exits.DONE
    shown.stderr.close()
