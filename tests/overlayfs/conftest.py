# SPDX-License-Identifier: Apache-2.0
"""Mounts for the tests of overlayfs: one for each test, or one for a whole module that leaves it well."""

import contextlib
import functools
import mmap
import os
import pathlib
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import pytest

from tests import builds
from tests.overlayfs import mounted

python_only = pytest.mark.parametrize("datapath", ["python"], indirect=True)
in_python = pytest.mark.parametrize("datapath", ["python", "forward"], indirect=True)
# For what is said of the image: where it is a file, the native program's calls go past all gates.
gated = pytest.mark.parametrize("datapath", ["python", "forward", "stacked"], indirect=True)

# No multiple of a page, nor of a segment.
SIZE = 8 * 1024 * 1024 + 1000


def fill(path: pathlib.Path, size: int = SIZE) -> pathlib.Path:
    """Write `size` bytes of noise that is the same in every run."""
    path.write_bytes(random.Random(size).randbytes(size))
    return path


@pytest.fixture(params=["python", "native", "direct", "forward"])
def datapath(request: pytest.FixtureRequest) -> str:
    """Every form of the disk's data path; "direct" is native around the host's page cache."""
    name: str = request.param
    return name


@pytest.fixture
def live(tmp_path: pathlib.Path) -> pathlib.Path:
    """The disk: SIZE bytes."""
    return fill(tmp_path / "live")


@pytest.fixture
def faulty() -> pathlib.Path:
    """A build of the native program with delays and sabotage."""
    return builds.datapath("faults")


def aligned(data: bytes) -> mmap.mmap:
    """Return a page-aligned buffer, as O_DIRECT asks for."""
    buffer = mmap.mmap(-1, max(len(data), 1))
    buffer[: len(data)] = data
    return buffer


def hang_up(descriptor: int) -> None:
    """Close a descriptor whose server is gone: close(2) closes it, and says ENOTCONN."""
    with contextlib.suppress(OSError):
        os.close(descriptor)


@pytest.fixture
def variant() -> str:
    """The native data path's build; `builds.sanitized` names others."""
    return "product"


@pytest.fixture
def serve(
    tmp_path: pathlib.Path,
    live: pathlib.Path,
    mountpoint: pathlib.Path,
    datapath: str,
    variant: str,
) -> Callable[..., AbstractContextManager[mounted.Mounted]]:
    """`with serve(read_only=True) as it:` mounts `live`, over each data path in turn.

    What is said of the image itself (gates, broken places, its calls) is `gated`.
    """
    if datapath == "stacked":
        return functools.partial(mounted.stacked, tmp_path, live, mountpoint)
    built = {} if variant == "product" else {"POSTHOC_DATAPATH": str(builds.datapath(variant))}
    return functools.partial(
        mounted.serving, tmp_path, live, mountpoint, datapath=datapath, environment=built
    )


@pytest.fixture
def mount(
    serve: Callable[..., AbstractContextManager[mounted.Mounted]],
) -> Iterator[mounted.Mounted]:
    """A mount of this test's own."""
    with serve() as it:
        yield it


@pytest.fixture(scope="module", params=["python", "native", "direct", "forward"])
def shared(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[mounted.Mounted]:
    """A mount for all tests of a module; none may end or break it."""
    folder = tmp_path_factory.mktemp("shared")
    mountpoint = folder / "mnt"
    mountpoint.mkdir()
    live = fill(folder / "live")
    with mounted.serving(folder, live, mountpoint, datapath=request.param) as it:
        yield it
