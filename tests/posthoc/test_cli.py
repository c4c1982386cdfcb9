# SPDX-License-Identifier: Apache-2.0
"""The command: help for every verb, errors as one line, exit codes."""

import pathlib
import subprocess

import numpy as np
import pytest

from dirtymap import bitmap, errors
from dirtymap.qcow2 import carrier
from posthoc import cli, exits
from tests import command

VERBS = ["mount", "umount", "status", "wait", "diff", "map", "merge", "verify", "install"]


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb: str) -> None:
    shown = command.posthoc(verb, "--help").stdout
    assert shown.startswith(f"usage: posthoc {verb}")
    assert "--json" in shown


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
