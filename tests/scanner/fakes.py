# SPDX-License-Identifier: Apache-2.0
"""Images in memory that do what real ones cannot be made to do at will: fail, stop, be written in between."""

import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import trio

from dirtymap import extent

# Reached only by what is broken, on however busy a machine.
PATIENCE = 60.0


@dataclass
class MemoryImage:
    """`content` as an image. `zeros` are ranges told as zero, `faults` ranges that fail with an error.

    `before` is called in the reading thread with (start, length) before each read copies anything.
    """

    content: bytearray
    name: str = "memory"
    zeros: list[tuple[int, int]] = field(default_factory=list)
    faults: list[tuple[int, int, OSError]] = field(default_factory=list)
    before: Callable[[int, int], None] | None = None
    reads: list[tuple[int, int]] = field(default_factory=list)
    closed: bool = False

    @property
    def size(self) -> int:
        return len(self.content)

    def read_into(self, start: int, buffer: memoryview) -> None:
        end = start + len(buffer)
        assert 0 <= start < end <= self.size, "a read beyond the image"
        self.reads.append((start, len(buffer)))
        if self.before is not None:
            self.before(start, len(buffer))
        self._fail(start, end)
        buffer[:] = self.content[start:end]

    def _fail(self, start: int, end: int) -> None:
        for first, last, error in self.faults:
            if first < end and start < last:
                raise error

    def extents(
        self, start: int, length: int, deadline: float | None = None
    ) -> Iterator[extent.Extent]:
        del deadline
        assert 0 <= start < start + length <= self.size, "a question beyond the image"
        return extent.join(self._extents(start, start + length))

    def _extents(self, start: int, end: int) -> Iterator[extent.Extent]:
        for first, last in self.zeros:
            first, last = max(first, start), min(last, end)
            if first < last:
                yield extent.data(start, first - start)
                yield extent.Extent(first, last - first, zero=True)
                start = last
        yield extent.data(start, end - start)

    def close(self) -> None:
        self.closed = True


@dataclass
class HashedMemory(MemoryImage):
    """A reference that only answers whether blocks of `granularity` bytes are the same."""

    granularity: int = 4096

    def read_into(self, start: int, buffer: memoryview) -> None:
        raise AssertionError("a reference of hashes was read")

    def equal(self, segment: int, data: memoryview) -> bool:
        start = segment * self.granularity
        self._fail(start, start + len(data))
        assert len(data) == min(self.granularity, self.size - start), "not one whole block"
        return bytes(data) == self.content[start : start + self.granularity]


class Gate:
    """Holds reading threads up, first come first served: an image's `before` that lets `permits` reads pass."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._permits: float = 0
        self._arrived = 0
        self.passed = 0

    @property
    def waiting(self) -> int:
        return self._arrived - self.passed

    def __call__(self, start: int, length: int) -> None:
        del start, length
        with self._condition:
            ticket = self._arrived
            self._arrived += 1
            assert self._condition.wait_for(lambda: ticket < self._permits, PATIENCE)
            self.passed += 1

    def let(self, permits: float) -> None:
        """Let so many more reads pass; math.inf opens the gate."""
        with self._condition:
            self._permits += permits
            self._condition.notify_all()


class Clock:
    """Time that passes only where somebody lets it."""

    def __init__(self) -> None:
        self._now = 1000.0
        self._lock = threading.Lock()

    def __call__(self) -> float:
        with self._lock:
            return self._now

    def pass_by(self, seconds: float) -> None:
        with self._lock:
            self._now += seconds


def slow(clock: Clock, *, each: float = 0.0, rate: float = math.inf) -> Callable[[int, int], None]:
    """Return an image's `before` by which each read takes so many seconds, and its bytes at `rate` more.

    One after the other, however many threads read.
    """
    return lambda start, length: clock.pass_by(each + length / rate)


def scan_threads() -> list[str]:
    """Return the names of the scanner's threads; one that has told its end may take a moment more."""
    names = (thread.name for thread in threading.enumerate())
    return [name for name in names if name.startswith("scan-")]


async def until(condition: Callable[[], object]) -> None:
    """Return when `condition()` is true; trio.TooSlowError if that does not happen."""
    with trio.fail_after(PATIENCE):
        while not condition():  # noqa: ASYNC110 (threads change what is waited for)
            await trio.sleep(0.001)
