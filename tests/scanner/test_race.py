# SPDX-License-Identifier: Apache-2.0
"""The race between a guest's writes and the scanner's reads, stepped read by read.

A write is two steps: its segments are marked in the write bitmap, then its bytes change. Steps happen at chosen
reads of the scanner, before the bytes are copied. After every step the map of that instant must name every segment
that differs at that instant. The same check finds both ways of breaking the rule.
"""

import random
import threading
from dataclasses import dataclass, field

import trio
from hypothesis import given
from hypothesis import strategies as st

from dirtymap import bitmap
from scanner import plan, scan
from tests.scanner import fakes
from tests.scanner.test_scan import dirty, truth

K = 1024


@dataclass
class Write:
    """Bytes for [start, start + length), marked at the scanner's read number `mark`, changed at `change`."""

    start: int
    length: int
    mark: int | None
    change: int


@dataclass
class Guest:
    """Does the steps of its writes as the scanner reads, and keeps what it found missing."""

    live: fakes.MemoryImage
    reference: fakes.MemoryImage
    written: bitmap.Bitmap
    writes: list[Write]
    missing: set[int] = field(default_factory=set)
    made: scan.Scan | None = None
    reads: int = 0

    def step(self, *_: int) -> None:
        """Do what is due at this read of the scanner's."""
        now = self.reads
        self.reads += 1
        # Changes first: a mark that stands behind its change in time must not come before it here.
        for write in self.writes:
            if write.change == now and (write.mark is None or write.mark > now):
                self._change(write)
        for write in self.writes:
            if write.mark == now:
                self.written.set_range(write.start, write.length)
        for write in self.writes:
            if write.change == now and write.mark is not None and write.mark <= now:
                self._change(write)
        self.check()

    def _change(self, write: Write) -> None:
        end = min(write.start + write.length, self.live.size)
        for position in range(write.start, end):
            self.live.content[position] ^= 0xA5

    def finish(self) -> None:
        """Do what is left once the scan has ended."""
        steps = [step for write in self.writes for step in (write.mark or 0, write.change)]
        while self.reads <= max(steps, default=0):
            self.step()
        self.check()

    def check(self) -> None:
        assert self.made is not None
        granularity = self.written.granularity
        differing = truth(self.live, self.reference, granularity)
        self.missing |= differing - dirty(self.made.decisions, self.written)


def played(
    size: int, granularity: int, writes: list[Write], *, changed: list[int], workers: int = 1
) -> Guest:
    """Scan a disk while its guest writes; return the guest with what any map has missed."""
    content = bytearray(random.Random(2).randbytes(size))
    live, reference = fakes.MemoryImage(content), fakes.MemoryImage(bytearray(content))
    for position in changed:
        live.content[position % size] ^= 1
    guest = Guest(live, reference, bitmap.Bitmap(size, granularity), writes)
    guest.made = scan.Scan(
        live,
        reference,
        scan.Decisions(size, granularity),
        written=lambda: guest.written,
        workers=workers,
        tuning=plan.Tuning(chunk=4 * K, least_saving=0),
    )
    live.before = reference.before = guest.step
    trio.run(guest.made.run)
    guest.finish()
    return guest


steps = st.integers(0, 30)
in_order = st.builds(
    lambda start, length, mark, later: Write(start, length, mark, mark + later),
    st.integers(0, 60 * K - 1),
    st.integers(1, 9 * K),
    steps,
    st.sampled_from([0, 0, 1, 2, 5, 30]),
)


@given(
    size=st.integers(1, 60 * K).map(lambda size: 60 * K + 1 - size),
    granularity=st.sampled_from([512, 1 * K, 4 * K, 16 * K, 2 << 20]),
    writes=st.lists(in_order, max_size=6),
    changed=st.lists(st.integers(0, 60 * K), max_size=4),
)
def test_marked_before_changed_no_map_ever_misses_a_segment(
    size: int, granularity: int, writes: list[Write], changed: list[int]
) -> None:
    """Before, in and behind the cursor, between the reads of the two sides: the map is never too clean."""
    writes = [write for write in writes if write.start < size]
    guest = played(size, granularity, writes, changed=changed)
    assert guest.missing == set()


# The fifth chunk: the live side is read at read 8, the reference at read 9.
LIVE_READ = 8


def test_a_write_between_the_two_reads_of_a_segment_is_in_the_map() -> None:
    """The rule's hardest case by hand, at every distance of mark and change around the reads."""
    for mark in range(LIVE_READ - 2, LIVE_READ + 4):
        for change in range(mark, LIVE_READ + 5):
            write = Write(4 * 4 * K + 100, 5, mark, change)
            assert played(40 * K, 4 * K, [write], changed=[]).missing == set()


def test_marking_after_the_write_is_caught() -> None:
    """Sabotage: bytes change behind the scanner's read and their mark comes later: a map misses them."""
    late = Write(4 * 4 * K + 100, 5, mark=LIVE_READ + 4, change=LIVE_READ + 2)
    assert played(40 * K, 4 * K, [late], changed=[]).missing == {4}


def test_arming_the_bitmap_after_the_first_read_is_caught() -> None:
    """Sabotage: a write that the bitmap does not record yet falls on what was read already."""
    unrecorded = Write(100, 5, mark=None, change=2)
    assert played(40 * K, 4 * K, [unrecorded], changed=[]).missing == {0}


def test_the_same_writes_recorded_in_order_are_not_missed() -> None:
    """The two cases above, done right: the check does not cry wolf."""
    rightly = [Write(4 * 4 * K + 100, 5, LIVE_READ + 2, LIVE_READ + 4), Write(100, 5, 2, 2)]
    assert played(40 * K, 4 * K, rightly, changed=[]).missing == set()


def test_a_segment_skipped_for_its_write_is_in_every_map() -> None:
    """Marked before its chunk is taken: it is never read, and never missing."""
    guest = played(40 * K, 4 * K, [Write(20 * K, 4 * K, mark=2, change=15)], changed=[])
    assert guest.missing == set()
    assert (20 * K, 4 * K) not in guest.live.reads
    assert (24 * K, 4 * K) in guest.live.reads


def test_a_guest_that_writes_freely_while_many_threads_read() -> None:
    """Thousands of writes by threads of their own, the scan held to their pace: nothing is missing."""
    size, granularity = 1 << 20, 4 * K
    content = bytearray(random.Random(3).randbytes(size))
    live, reference = fakes.MemoryImage(content), fakes.MemoryImage(bytearray(content))
    written = bitmap.Bitmap(size, granularity)
    marking = threading.Lock()
    progress = threading.Semaphore(0)
    done = threading.Event()

    def write(seed: int) -> None:
        chance = random.Random(seed)
        while not done.is_set():
            start, length = chance.randrange(size), chance.choice([1, 512, 5000])
            with marking:
                written.set_range(start, length)
            length = min(length, size - start)
            content[start : start + length] = chance.randbytes(length)
            progress.release()

    def three_writes_later(*_: int) -> None:
        for _number in range(3):
            assert progress.acquire(timeout=fakes.PATIENCE)

    live.before = reference.before = three_writes_later
    made = scan.Scan(
        live,
        reference,
        scan.Decisions(size, granularity),
        written=lambda: written,
        workers=3,
        tuning=plan.Tuning(chunk=8 * K, least_saving=0),
    )
    writers = [threading.Thread(target=write, args=(seed,)) for seed in range(3)]
    for writer in writers:
        writer.start()
    try:
        trio.run(made.run)
    finally:
        done.set()
        for writer in writers:
            writer.join()
    assert made.decisions.complete
    missing = truth(live, reference, granularity) - dirty(made.decisions, written)
    assert missing == set()
