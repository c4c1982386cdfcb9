# SPDX-License-Identifier: Apache-2.0
"""The README's first command does what it says."""

import os
import pathlib
import subprocess

from tests import command


def test_demo_proves_the_map_and_leaves_nothing(workdir: pathlib.Path) -> None:
    """scripts/demo ends with no segment missed, and removes what it made."""
    result = subprocess.run(
        [command.ROOT / "scripts" / "demo"],
        env={**os.environ, "TMPDIR": str(workdir)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=command.TIMEOUT,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    assert lines[-1] == "Every changed segment is in the map."
    assert "differ and are not in the map:          0" in lines
    assert "state: complete" in lines
    assert "No errors were found on the image." in lines
    assert list(workdir.iterdir()) == []
