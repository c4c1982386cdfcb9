# SPDX-License-Identifier: Apache-2.0
"""What `status` says of the native data path: what this kernel or this user cannot have."""

import contextlib
import pathlib
import struct
from collections.abc import Iterator

import pytest

from overlayfs.datapath import keeper, kept, native, shared
from tests.overlayfs.datapath import conftest

Serve = conftest.Serve
ALL = 0xFFFF_FFFF_FFFF_FFFF


@contextlib.contextmanager
def path_of(
    *, minor: int = 45, flags: int = ALL, locked: int = 1
) -> Iterator[native.NativeDatapath]:
    """A data path whose server has had an INIT request of a kernel like that."""
    memory = shared.Memory.create(1 << 20, 65536, threads=2, max_write=131072)
    unused = pathlib.Path("unused")
    descriptors = keeper.Descriptors(memory.fd, *keeper.pair(4096))
    mount = kept.KeptMount(memory, descriptors, unused, program=unused)
    path = native.NativeDatapath(memory, mount, -1)
    init = struct.pack("<40x4I", 7, minor, 0, flags & 0xFFFF_FFFF)
    memory.header.init[: len(init)] = init
    memory.header.init_length = len(init)
    memory.header.kernel_flags = flags
    memory.header.locked = locked
    with contextlib.closing(path):
        yield path


def test_a_kernel_that_has_everything_is_not_mentioned() -> None:
    with path_of() as path:
        assert path.description() == "native, 2 threads"


@pytest.mark.parametrize(("minor", "told"), [(37, True), (38, False)])
def test_parallel_writes_are_missed(minor: int, told: bool) -> None:
    """Without them the kernel lets one write to the disk at a time through."""
    with path_of(minor=minor) as path:
        assert ("without parallel direct writes" in path.description()) == told
        assert ("(this kernel is too old)" in path.description()) == told


def test_unlocked_buffers_are_told() -> None:
    """A kill during a copy may then fail a request; that is not the kernel's age."""
    with path_of(locked=0) as path:
        assert path.description() == (
            "native, 2 threads; a kill may fail a request (buffers not locked: raise RLIMIT_MEMLOCK)"
        )


def test_server_that_may_not_lock_says_so(serve: Serve) -> None:
    with serve(faults="no-lock") as it:
        assert "buffers not locked" in it.facts()["description"]
        assert it.facts()["locked"] == 0
        assert "buffers are not locked into memory" in it.log
    with serve() as it:
        assert it.facts()["locked"] == 1
        assert "locked" not in it.facts()["description"]
