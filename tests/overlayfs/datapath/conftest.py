# SPDX-License-Identifier: Apache-2.0
"""The program under test, and a disk to serve with it."""

import pathlib
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import pytest

from overlayfs.datapath import keeper
from tests import builds
from tests.overlayfs.datapath import native

# No multiple of a page, nor of a segment.
SIZE = 16 * 1024 * 1024 + 1000
Serve = Callable[..., AbstractContextManager[native.Native]]


@pytest.fixture
def variant() -> str:
    """The build under test; `builds.sanitized` names others."""
    return "product"


# For what may differ where requests go around the page cache, and many are with the disk at a time.
both_ways = pytest.mark.parametrize("cache", ["writeback", "none"])


@pytest.fixture
def cache() -> str:
    """As `posthoc mount --cache`."""
    return "writeback"


def program(variant: str, *, faults: bool) -> pathlib.Path:
    """Return the build; the product knows no faults, and has a build of its own for them."""
    if variant != "product":
        return builds.datapath(variant)
    return builds.datapath("faults") if faults else keeper.program()


def fill(folder: pathlib.Path, size: int = SIZE) -> pathlib.Path:
    """Make `folder`/live: noise that is the same in every run."""
    path = folder / "live"
    path.write_bytes(random.Random(size).randbytes(size))
    return path


@pytest.fixture
def serve(tmp_path: pathlib.Path, variant: str, cache: str) -> Serve:
    """`with serve(threads=3) as it:` mounts a disk; with `faults=` over the build that has them."""

    def serving(**config: object) -> AbstractContextManager[native.Native]:
        if "live" not in config:
            fill(tmp_path)
        config = {"cache": cache, **config}
        return native.serving(tmp_path, program(variant, faults="faults" in config), **config)

    return serving


@pytest.fixture
def mount(serve: Serve) -> Iterator[native.Native]:
    """A mount of this test's own."""
    with serve() as it:
        yield it
