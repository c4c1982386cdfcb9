# SPDX-License-Identifier: Apache-2.0
"""Discards and zeroes in the session, by the same protocol as writes."""

import errno
from collections.abc import Iterator

import pytest
import trio

from overlayfs import recorder
from overlayfs.datapath import forward
from tests import wait
from tests.overlayfs.datapath import test_python
from tests.overlayfs.datapath.test_python import GRANULARITY, SIZE, marked, taken


class ZeroedImage(test_python.SteppedImage):
    """One that makes zeros, stopping as at a write."""

    def zero(self, start: int, length: int) -> None:
        self.write(start, bytes(length))

    discard = zero


@pytest.fixture
def image() -> Iterator[ZeroedImage]:
    stepped = ZeroedImage()
    stepped.content[:] = b"x" * SIZE
    yield stepped
    stepped.before.set()


@pytest.fixture
def record() -> recorder.Recorder:
    return recorder.Recorder(SIZE, GRANULARITY)


@pytest.fixture
def disk(image: ZeroedImage, record: recorder.Recorder) -> forward.ForwardDisk:
    return forward.ForwardDisk(image, record, threads=1)


@pytest.mark.parametrize("verb", ["discard", "zero"])
async def test_marked_before_the_first_await(
    disk: forward.ForwardDisk, record: recorder.Recorder, verb: str
) -> None:
    """No task can run between its arrival and its mark."""
    call = getattr(disk, verb)(4095, 2)
    try:
        call.send(None)
        assert marked(record) == {0, 1}
    finally:
        call.close()


async def test_drain_waits_for_it_and_reads_do_not(
    image: ZeroedImage, disk: forward.ForwardDisk, record: recorder.Recorder
) -> None:
    """It is a change in flight; the threads of reads and writes are not its own."""
    image.before.clear()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(disk.discard, 0, 4096)
        nursery.start_soon(disk.zero, 8192, 4096)
        await taken(image.arrived)
        await taken(image.arrived)
        with trio.move_on_after(0):
            await disk.drain()
            pytest.fail("drained while a discard is in flight")
        with trio.fail_after(wait.DEADLINE):
            assert await disk.read(0, 4) == b"xxxx"
        image.before.set()
        with trio.fail_after(wait.DEADLINE):
            await disk.drain()
        assert image.content[:4096] == image.content[8192:12288] == bytes(4096)
    assert marked(record) == {0, 2}
    assert record.depth == 0


async def test_a_failure_leaves_its_bits_and_is_counted(
    image: ZeroedImage, disk: forward.ForwardDisk, record: recorder.Recorder
) -> None:
    """The errno is the image's."""
    image.error = OSError(errno.ENOSPC, "full")
    with pytest.raises(OSError) as error:
        await disk.discard(0, 4096)
    assert error.value.errno == errno.ENOSPC
    image.error = None
    await disk.zero(4096, 100)
    assert marked(record) == {0, 1}
    counted = record.statistics().discard
    assert (counted.operations, counted.errors, counted.bytes) == (2, 1, 100)
