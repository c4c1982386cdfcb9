# SPDX-License-Identifier: Apache-2.0
"""The shared memory: the same to C and to Python, and only read here."""

import fcntl
import os
import subprocess

import numpy as np
import pytest

from overlayfs import recorder
from overlayfs.datapath import keeper, shared


@pytest.fixture
def memory() -> shared.Memory:
    return shared.Memory.create(10_000_000, 65536, threads=2, max_write=131072, scan_length=5000)


def test_layout_is_that_of_the_program() -> None:
    """Every field has one offset and one length, whoever reads it."""
    said = subprocess.run(
        [keeper.program(), "--layout"], check=True, capture_output=True, text=True
    ).stdout
    assert said.splitlines() == shared.layout()


def test_geometry_and_parts(memory: shared.Memory) -> None:
    """All parts begin empty, and none lies in another."""
    assert (memory.size, memory.granularity) == (10_000_000, 65536)
    assert memory.written.segments == memory.taken.segments == 153
    memory.scan[:] = 0xFF
    memory.written.fill()
    assert memory.taken.count() == 0
    assert memory.session == b""
    assert len(memory.scan) == 5000
    assert not memory.slots.any()
    memory.close()
    assert memory.written.count() == 153


def test_second_holder_sees_the_same(memory: shared.Memory) -> None:
    """What one holder of a descriptor writes the other reads."""
    other = shared.Memory(os.dup(memory.fd))
    memory.written.set(7)
    memory.write_session(b"hello")
    assert other.written.get(7)
    assert other.session == b"hello"
    other.close()
    memory.close()


def test_size_is_sealed(memory: shared.Memory) -> None:
    """Nobody can take memory from under another process."""
    seals = fcntl.fcntl(memory.fd, fcntl.F_GET_SEALS)
    assert seals & fcntl.F_SEAL_SHRINK
    assert seals & fcntl.F_SEAL_GROW
    with pytest.raises(PermissionError):
        os.truncate(memory.fd, 0)
    memory.close()


def test_other_memory_is_refused() -> None:
    """A header of another version is not guessed at."""
    fd = os.memfd_create("other")
    os.truncate(fd, 1 << 20)
    with pytest.raises(ValueError, match="another version"):
        shared.Memory(fd)
    os.close(fd)


def test_what_is_remembered_has_bounds(memory: shared.Memory) -> None:
    """Too long a description or command line is refused, a relative command too."""
    with pytest.raises(ValueError, match="too long"):
        memory.write_session(bytes(1 << 20))
    with pytest.raises(ValueError, match="too long"):
        memory.write_restart(["/bin/true", "x" * 100_000])
    with pytest.raises(ValueError, match="absolute"):
        memory.write_restart(["true"])
    memory.close()


def test_statistics_are_the_sum_of_all_threads(memory: shared.Memory) -> None:
    """Each thread counts for itself, in the recorder's own form."""
    for slot in (0, 5):
        counters = memory.slots[slot, 3:]
        base = recorder.WRITE * recorder.KIND_WORDS
        counters[base + recorder.OPERATIONS] = 3
        counters[base + recorder.BYTES] = 3000
        counters[base + recorder.HISTOGRAM + recorder.bucket(50_000)] = 3
    memory.slots[5, 1] = np.uint64(7)
    seen = shared.SharedRecorder(memory)
    write = seen.statistics().write
    assert (write.operations, write.bytes, write.errors) == (6, 6000, 0)
    assert write.histogram[recorder.bucket(50_000)] == 6
    assert seen.depth == 1
    memory.close()


def test_python_never_marks(memory: shared.Memory) -> None:
    """A read-modify-write here would lose a mark of the server's."""
    seen = shared.SharedRecorder(memory)
    for change in (
        lambda: seen.mark(0, 1),
        lambda: seen.account(recorder.READ, 1, 1),
        seen.swap,
    ):
        with pytest.raises(TypeError):
            change()
    memory.close()
