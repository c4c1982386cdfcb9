# SPDX-License-Identifier: Apache-2.0
"""The python data path against an image whose every step a test decides: the concurrency protocol."""

import errno
import threading
from collections.abc import Callable, Iterator

import hypothesis
import pytest
import trio
import trio.testing
from hypothesis import strategies

from dirtymap import extent
from overlayfs import datapath, recorder
from overlayfs.datapath import python
from tests import oracle, wait

SIZE, GRANULARITY = 64 * 4096, 4096


class SteppedImage:
    """An image in memory whose writes stop in their thread until the test lets them go on."""

    name, size = "stepped", SIZE

    def __init__(self) -> None:
        self.content = bytearray(SIZE)
        self.flushed: list[bool] = []
        self.error: OSError | None = None
        self.before = threading.Event()
        self.before.set()
        self.arrived = threading.Semaphore(0)
        self.held: dict[int, threading.Event] = {}
        self.threads: set[int] = set()
        self.at_once = self.most_at_once = 0
        self._lock = threading.Lock()

    def read_into(self, start: int, buffer: memoryview) -> None:
        self.threads.add(threading.get_ident())
        if self.error is not None:
            raise self.error
        buffer[:] = self.content[start : start + len(buffer)]

    def extents(
        self, start: int, length: int, deadline: float | None = None
    ) -> Iterator[extent.Extent]:
        yield extent.data(start, length)

    def write(self, start: int, buffer: bytes | memoryview) -> None:
        self.threads.add(threading.get_ident())
        with self._lock:
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        self.arrived.release()
        self.held.get(start, self.before).wait()
        # What fails has written its first half.
        length = len(buffer) if self.error is None else len(buffer) // 2
        self.content[start : start + length] = buffer[:length]
        with self._lock:
            self.at_once -= 1
        if self.error is not None:
            raise self.error

    def flush(self, datasync: bool = True) -> None:
        self.threads.add(threading.get_ident())
        self.flushed.append(datasync)

    def close(self) -> None:
        pass


class ReadOnlyImage:
    """An image that cannot be written."""

    name, size = "read-only", SIZE

    def read_into(self, start: int, buffer: memoryview) -> None:
        buffer[:] = b"r" * len(buffer)

    def extents(
        self, start: int, length: int, deadline: float | None = None
    ) -> Iterator[extent.Extent]:
        yield extent.data(start, length)

    def close(self) -> None:
        pass


@pytest.fixture
def image() -> Iterator[SteppedImage]:
    stepped = SteppedImage()
    yield stepped
    # A thread that still waits would outlive the test.
    for gate in (stepped.before, *stepped.held.values()):
        gate.set()


@pytest.fixture
def record() -> recorder.Recorder:
    return recorder.Recorder(SIZE, GRANULARITY)


@pytest.fixture
def path(image: SteppedImage, record: recorder.Recorder) -> python.PythonDatapath:
    return python.PythonDatapath(image, record)


def marked(record: recorder.Recorder) -> set[int]:
    return {first + i for first, count in record.written.runs() for i in range(count)}


async def taken(semaphore: threading.Semaphore) -> None:
    """Wait for a step of the image's thread."""
    assert await trio.to_thread.run_sync(lambda: semaphore.acquire(timeout=wait.DEADLINE))


async def state(condition: Callable[[], bool]) -> None:
    """Wait for a state of the event loop's."""
    with trio.fail_after(wait.DEADLINE):
        while not condition():
            await trio.lowlevel.checkpoint()


# The rule


async def test_marked_before_a_byte_changes(
    image: SteppedImage, record: recorder.Recorder, path: python.PythonDatapath
) -> None:
    """When the image's write is called the bits stand; nothing has changed yet."""
    image.before.clear()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(path.disk.write, 4000, b"x" * 200)
        await taken(image.arrived)
        assert marked(record) == {0, 1}
        assert not any(image.content)
        image.before.set()
    assert image.content[4000:4200] == b"x" * 200
    assert marked(record) == {0, 1}


async def test_marked_before_the_first_await(
    image: SteppedImage, record: recorder.Recorder, path: python.PythonDatapath
) -> None:
    """No task can run between a write's arrival and its mark: the first step of the call marks."""
    call = path.disk.write(0, b"x" * 4096)
    try:
        call.send(None)
        assert marked(record) == {0}
    finally:
        call.close()


async def test_a_write_that_waits_for_a_thread_is_marked(
    image: SteppedImage, record: recorder.Recorder, path: python.PythonDatapath
) -> None:
    """More writes than threads: all are marked, only as many as threads are in the image."""
    image.before.clear()
    async with trio.open_nursery() as nursery:
        for segment in range(20):
            nursery.start_soon(path.disk.write, segment * 4096, b"x" * 4096)
        for _ in range(datapath.DEFAULT_THREADS):
            await taken(image.arrived)
        await state(lambda: record.depth == 20)
        assert marked(record) == set(range(20))
        assert image.at_once == datapath.DEFAULT_THREADS
        image.before.set()
    assert image.most_at_once == datapath.DEFAULT_THREADS
    assert record.depth == 0


async def test_a_failed_write_leaves_its_bits_set(
    image: SteppedImage, record: recorder.Recorder, path: python.PythonDatapath
) -> None:
    """Half of it is on the disk; the errno is the image's, and the next request is not touched by it."""
    image.error = OSError(errno.EDQUOT, "quota")
    with pytest.raises(OSError) as error:
        await path.disk.write(8192, b"x" * 8192)
    assert error.value.errno == errno.EDQUOT
    assert marked(record) == {2, 3}
    image.error = None
    assert await path.disk.write(0, b"y") == 1
    write = record.statistics().write
    assert (write.operations, write.errors, write.bytes) == (2, 1, 1)


async def test_a_cancel_before_the_thread_leaves_bits_and_no_bytes(
    image: SteppedImage, record: recorder.Recorder
) -> None:
    """A write given up while it waits for a thread: dirty too much, never too little."""
    path = python.PythonDatapath(image, record, threads=1)
    image.before.clear()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(path.disk.write, 0, b"x" * 4096)
        await taken(image.arrived)
        with trio.CancelScope() as scope:
            scope.cancel()
            await path.disk.write(4096, b"x" * 4096)
        assert scope.cancelled_caught
        image.before.set()
    assert marked(record) == {0, 1}
    assert not any(image.content[4096:8192])
    with trio.fail_after(wait.DEADLINE):
        await path.drain()


async def test_a_write_in_its_thread_is_not_abandoned(
    image: SteppedImage, record: recorder.Recorder, path: python.PythonDatapath
) -> None:
    """A cancel waits for the thread: when the task has ended the bytes have landed."""
    image.before.clear()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(path.disk.write, 0, b"x" * 4096)
        await taken(image.arrived)
        nursery.cancel_scope.cancel()
        image.before.set()
    assert image.content[:4096] == b"x" * 4096
    assert image.at_once == 0


async def test_image_io_never_runs_on_the_event_loop(
    image: SteppedImage, path: python.PythonDatapath
) -> None:
    """Reads, writes and syncs are worker threads' work."""
    await path.disk.write(0, b"x")
    await path.disk.read(0, 1)
    await path.disk.sync(True)
    assert image.threads
    assert threading.get_ident() not in image.threads


async def test_syncs_do_not_take_the_threads_of_reads(
    image: SteppedImage, record: recorder.Recorder
) -> None:
    """A disk whose only thread is stuck in a write still syncs, and the other way round."""
    path = python.PythonDatapath(image, record, threads=1)
    image.before.clear()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(path.disk.write, 0, b"x")
        await taken(image.arrived)
        with trio.fail_after(wait.DEADLINE):
            await path.disk.sync(False)
        image.before.set()
    assert image.flushed == [False]


# swap and drain


async def test_drain_waits_for_the_writes_in_flight(
    image: SteppedImage, record: recorder.Recorder, path: python.PythonDatapath
) -> None:
    """What the swap took is on the disk when drain returns."""
    image.before.clear()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(path.disk.write, 0, b"x" * 4096)
        await taken(image.arrived)
        swapped = await path.swap()
        with trio.move_on_after(0):
            await path.drain()
            pytest.fail("drained while a write is in flight")
        image.before.set()
        with trio.fail_after(wait.DEADLINE):
            await path.drain()
        assert image.content[:4096] == b"x" * 4096
    assert list(swapped.runs()) == [(0, 1)]
    assert marked(record) == set()


async def test_without_the_drain_a_checkpoint_loses_a_segment(
    image: SteppedImage, record: recorder.Recorder, path: python.PythonDatapath
) -> None:
    """Why it is needed: read after the swap alone, the disk changes later and no bit says so."""
    image.before.clear()
    before = bytes(image.content)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(path.disk.write, 0, b"x" * 4096)
        await taken(image.arrived)
        await path.swap()
        checkpoint = bytes(image.content)
        image.before.set()
    assert checkpoint == before
    changed = oracle.differing_pieces(bytes(image.content), checkpoint, GRANULARITY)
    assert changed - marked(record) == {0}


async def test_drain_does_not_wait_for_later_writes(
    image: SteppedImage, path: python.PythonDatapath
) -> None:
    """A guest that never stops writing does not hold a checkpoint up."""
    image.held = {0: threading.Event(), 4096: threading.Event()}
    drained = trio.Event()

    async def drain() -> None:
        await path.drain()
        drained.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(path.disk.write, 0, b"x")
        await taken(image.arrived)
        nursery.start_soon(drain)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(path.disk.write, 4096, b"y")
        await taken(image.arrived)
        assert not drained.is_set()
        image.held[0].set()
        with trio.fail_after(wait.DEADLINE):
            await drained.wait()
        assert image.at_once == 1
        image.held[4096].set()


async def test_drain_of_a_quiet_disk_returns_at_once(path: python.PythonDatapath) -> None:
    """Nothing in flight, nothing to wait for; a failed write is not in flight either."""
    with trio.fail_after(wait.DEADLINE):
        await path.drain()


# What it says, and images that cannot be written


def test_description(image: SteppedImage, record: recorder.Recorder) -> None:
    """The words of `datapath` in status."""
    described = [python.PythonDatapath(image, record, n).description() for n in (4, 1)]
    assert described == ["python, 4 threads", "python, 1 thread"]


async def test_read_only_image_reads_and_syncs(record: recorder.Recorder) -> None:
    """There is nothing to sync, and that is no error."""
    disk = python.PythonDisk(ReadOnlyImage(), record)
    assert await disk.read(0, 4) == b"rrrr"
    await disk.sync(False)


async def test_statistics_count_each_kind(
    record: recorder.Recorder, path: python.PythonDatapath
) -> None:
    """Reads, writes and flushes are told apart, in operations and bytes."""
    await path.disk.write(0, b"x" * 4096)
    await path.disk.read(0, 512)
    await path.disk.read(512, 512)
    await path.disk.sync(True)
    counted = record.statistics()
    assert (counted.read.operations, counted.read.bytes) == (2, 1024)
    assert (counted.write.operations, counted.write.bytes) == (1, 4096)
    assert (counted.flush.operations, counted.discard.operations) == (1, 0)


@hypothesis.given(
    granularity=strategies.sampled_from([512, 4096, 65536, 2 << 20]),
    writes=strategies.lists(
        strategies.tuples(strategies.integers(0, SIZE - 1), strategies.binary(max_size=9000)),
        max_size=30,
    ),
)
def test_concurrent_writes_are_in_the_bitmap(
    granularity: int, writes: list[tuple[int, bytes]]
) -> None:
    """All at once and in any order: the bits are exactly the segments that the writes touched."""
    image = SteppedImage()
    record = recorder.Recorder(SIZE, granularity)
    disk = python.PythonDisk(image, record)
    writes = [(start, data[: SIZE - start]) for start, data in writes]

    async def write_all() -> None:
        async with trio.open_nursery() as nursery:
            for start, data in writes:
                nursery.start_soon(disk.write, start, data)

    trio.run(write_all)
    touched = [oracle.touched(start, len(data), granularity) for start, data in writes]
    assert marked(record) == set().union(*touched)
    changed = oracle.differing_pieces(bytes(image.content), bytes(SIZE), granularity)
    assert changed <= marked(record)
