# SPDX-License-Identifier: Apache-2.0
"""The program under test, and a disk to serve with it."""

import pathlib
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import pytest

from overlayfs.datapath import keeper
from tests.overlayfs.datapath import native

# No multiple of a page, nor of a segment.
SIZE = 16 * 1024 * 1024 + 1000
Serve = Callable[..., AbstractContextManager[native.Native]]


@pytest.fixture(scope="session")
def program() -> pathlib.Path:
    """The program as it was installed, or $POSTHOC_DATAPATH."""
    return keeper.program()


def fill(folder: pathlib.Path, size: int = SIZE) -> pathlib.Path:
    """Make `folder`/live: noise that is the same in every run."""
    path = folder / "live"
    path.write_bytes(random.Random(size).randbytes(size))
    return path


@pytest.fixture
def serve(tmp_path: pathlib.Path, program: pathlib.Path, faulty: pathlib.Path) -> Serve:
    """`with serve(threads=3) as it:` mounts a disk; with `faults=` over the build that has them."""

    def serving(**config: object) -> AbstractContextManager[native.Native]:
        if "live" not in config:
            fill(tmp_path)
        return native.serving(tmp_path, faulty if "faults" in config else program, **config)

    return serving


@pytest.fixture
def mount(serve: Serve) -> Iterator[native.Native]:
    """A mount of this test's own."""
    with serve() as it:
        yield it
