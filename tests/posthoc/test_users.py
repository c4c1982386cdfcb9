# SPDX-License-Identifier: Apache-2.0
"""Users that are not root, root with a user's mount, and names that are no text: each in a namespace of its own."""

import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import pytest

from tests import command
from tests.posthoc import images, namespace


@pytest.fixture
def users_folder() -> Iterator[pathlib.Path]:
    """A folder of nobody's. (pytest's are root's alone, and their parents let no other user through.)"""
    folder = pathlib.Path(tempfile.mkdtemp(prefix="posthoc-nobody-"))
    paths = images.pair(folder, changed=[3])
    (folder / "mnt").mkdir()
    for path in (folder, folder / "mnt", *paths):
        os.chown(path, namespace.NOBODY, namespace.NOBODY)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("scenario", [scenario.__name__ for scenario in namespace.SCENARIOS])
def test_users(users_folder: pathlib.Path, scenario: str) -> None:
    """See the scenario's own words."""
    if os.geteuid() != 0:
        pytest.skip("another user's session needs root")
    done = subprocess.run(
        [
            *("unshare", "--mount", "--", sys.executable, "-m", "tests.posthoc.namespace"),
            *(scenario, str(users_folder)),
        ],
        cwd=command.ROOT,
        capture_output=True,
        text=True,
        timeout=command.TIMEOUT,
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stdout + done.stderr
