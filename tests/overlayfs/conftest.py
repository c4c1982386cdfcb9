# SPDX-License-Identifier: Apache-2.0
"""Mounts for the tests of overlayfs: one for each test, or one for a whole module that leaves it well."""

import functools
import pathlib
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import pytest

from tests.overlayfs import mounted

# No multiple of a page, nor of a segment.
SIZE = 8 * 1024 * 1024 + 1000


def fill(path: pathlib.Path, size: int = SIZE) -> pathlib.Path:
    """Write `size` bytes of noise that is the same in every run."""
    path.write_bytes(random.Random(size).randbytes(size))
    return path


@pytest.fixture
def live(tmp_path: pathlib.Path) -> pathlib.Path:
    """The disk: SIZE bytes."""
    return fill(tmp_path / "live")


@pytest.fixture
def serve(
    tmp_path: pathlib.Path, live: pathlib.Path, mountpoint: pathlib.Path
) -> Callable[..., AbstractContextManager[mounted.Mounted]]:
    """`with serve(read_only=True) as it:` mounts `live`."""
    return functools.partial(mounted.serving, tmp_path, live, mountpoint)


@pytest.fixture
def mount(
    serve: Callable[..., AbstractContextManager[mounted.Mounted]],
) -> Iterator[mounted.Mounted]:
    """A mount of this test's own."""
    with serve() as it:
        yield it


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[mounted.Mounted]:
    """A mount for all tests of a module; none may end or break it."""
    folder = tmp_path_factory.mktemp("shared")
    mountpoint = folder / "mnt"
    mountpoint.mkdir()
    with mounted.serving(folder, fill(folder / "live"), mountpoint) as it:
        yield it
