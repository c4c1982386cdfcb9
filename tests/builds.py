# SPDX-License-Identifier: Apache-2.0
"""The native data path's program as tests want it, built by scripts/build-datapath when it is first asked for."""

import atexit
import functools
import pathlib
import shutil
import subprocess
import tempfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent

# Runs a test with the product, and again with each sanitizer's build: for tests that ask for `variant`, if only
# through a fixture.
sanitized = pytest.mark.parametrize("variant", ["product", "thread", "address"])


@functools.cache
def _folder() -> pathlib.Path:
    folder = tempfile.mkdtemp(prefix="posthoc-builds-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return pathlib.Path(folder)


@functools.cache
def datapath(variant: str) -> pathlib.Path:
    """Return the program built as "faults", "thread" or "address"; all three know POSTHOC_FAULTS."""
    program = _folder() / variant
    subprocess.run([ROOT / "scripts" / "build-datapath", variant, program], check=True)
    return program


def check(log: str) -> None:
    """Fail with the whole log of a program if a sanitizer has reported anything in it."""
    for sign in ("Sanitizer", "runtime error"):
        assert sign not in log, log
