# SPDX-License-Identifier: Apache-2.0
"""The scan as a whole: exact, whatever the extents; and it ends as its statistics say."""

import errno
import os
import random
import threading

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from dirtymap import bitmap
from dirtymap.images import base, same
from scanner import plan, progress, scan
from tests import oracle
from tests.scanner import fakes

K = 1024
SMALL = plan.Tuning(chunk=16 * K, least_saving=0, window=64 * K)
GRANULARITIES = [512 << bits for bits in range(13)]


def dirty(decisions: scan.Decisions, written: bitmap.Bitmap | None = None) -> set[int]:
    return {first + i for first, count in decisions.map(written).runs() for i in range(count)}


def truth(live: fakes.MemoryImage, reference: fakes.MemoryImage, granularity: int) -> set[int]:
    other = bytes(reference.content[: live.size]).ljust(live.size, b"\0")
    return oracle.differing_pieces(bytes(live.content), other, granularity)


async def scanned(
    live: fakes.MemoryImage,
    reference: fakes.MemoryImage,
    granularity: int = 4 * K,
    **options: object,
) -> scan.Scan:
    options.setdefault("tuning", SMALL)
    made = scan.Scan(live, reference, scan.Decisions(live.size, granularity), **options)  # type: ignore[arg-type]
    await made.run()
    return made


def pair(size: int, changes: int, seed: int = 1) -> tuple[fakes.MemoryImage, fakes.MemoryImage]:
    """A random disk and its copy with some bytes changed."""
    chance = random.Random(seed)
    content = bytearray(chance.randbytes(size))
    other = bytearray(content)
    for _ in range(changes):
        other[chance.randrange(size)] ^= 0xFF
    return fakes.MemoryImage(content), fakes.MemoryImage(other)


@pytest.mark.parametrize("granularity", GRANULARITIES)
async def test_the_map_is_exactly_the_difference(granularity: int) -> None:
    """With no writes, at every granularity and a size that is no multiple of anything."""
    size = 3 * granularity + 12_345
    live, reference = pair(size, 3)
    live.content[-1] ^= 1
    made = await scanned(live, reference, granularity, workers=3, tuning=plan.TUNING)
    expected = truth(live, reference, granularity)
    assert expected
    assert dirty(made.decisions) == expected
    now = made.statistics()
    assert now.state == progress.COMPLETE
    assert (now.scanned, now.skipped, now.undecided) == (size, 0, 0)
    assert now.differing == made.decisions.map().dirty_bytes()


def ranges(end: int) -> st.SearchStrategy[list[tuple[int, int]]]:
    edges = st.lists(st.integers(0, end), max_size=12, unique=True).map(sorted)
    return edges.map(lambda points: list(zip(points[::2], points[1::2], strict=False)))


@given(
    size=st.integers(1, 100 * K),
    difference=st.sampled_from([0, 0, 1, 700, 30 * K]),
    granularity=st.sampled_from([512, 2 * K, 16 * K, 64 * K]),
    zeros=st.tuples(ranges(100 * K), ranges(100 * K)),
    told=st.tuples(ranges(100 * K), ranges(100 * K)),
    changes=st.lists(st.integers(0, 100 * K), max_size=6),
    least_saving=st.sampled_from([0, 8 * K, 128 * K]),
    hashed=st.sampled_from([None, None, 512, 4 * K, 32 * K]),
    workers=st.integers(1, 3),
    without=st.sets(st.sampled_from(plan.REASONS)),
)
def test_a_planned_scan_finds_what_reading_everything_finds(
    size: int,
    difference: int,
    granularity: int,
    zeros: tuple[list[tuple[int, int]], list[tuple[int, int]]],
    told: tuple[list[tuple[int, int]], list[tuple[int, int]]],
    changes: list[int],
    least_saving: int,
    hashed: int | None,
    workers: int,
    without: set[str],
) -> None:
    """Over random contents and extent maps the shortcuts change nothing but what is read."""
    live, reference = pair(size, 0)
    for position in changes:
        live.content[position % size] ^= 1
    del reference.content[max(1, size - difference) :]
    for image, really, claimed in zip((live, reference), zeros, told, strict=True):
        for first, last in really:
            image.content[first:last] = bytes(len(image.content[first:last]))
        # What is told to be zero is part of what is.
        image.zeros = [
            (max(a, c), min(b, d, image.size))
            for a, b in really
            for c, d in claimed
            if max(a, c) < min(b, d, image.size)
        ]
    if hashed is not None:
        reference = fakes.HashedMemory(reference.content, zeros=reference.zeros, granularity=hashed)
    tuning = plan.Tuning(chunk=16 * K, least_saving=least_saving, window=64 * K)

    async def both() -> tuple[scan.Scan, scan.Scan]:
        planned = await scanned(
            live, reference, granularity, tuning=tuning, workers=workers, without=without
        )
        everything = await scanned(
            live, reference, granularity, tuning=tuning, without=plan.REASONS
        )
        return planned, everything

    planned, everything = trio.run(both)
    expected = truth(live, reference, granularity)
    assert everything.statistics().skipped == 0
    assert not any(planned.statistics().savings[shortcut] for shortcut in without)
    if hashed is None or hashed <= granularity:
        assert dirty(planned.decisions) == dirty(everything.decisions) == expected
    else:
        # A hash of a larger block cannot say which of its segments differ; zeros can.
        assert expected <= dirty(planned.decisions) <= dirty(everything.decisions)


async def test_what_was_not_read_is_told_by_its_reason() -> None:
    """Savings, skipped bytes and reads fit each other."""
    live, reference = pair(64 * K, 0)
    live.content[16 * K : 64 * K] = bytes(48 * K)
    reference.content[32 * K : 64 * K] = bytes(32 * K)
    live.zeros, reference.zeros = [(16 * K, 64 * K)], [(32 * K, 64 * K)]
    made = await scanned(live, reference)
    now = made.statistics()
    assert now.savings == {
        plan.ZEROS: 32 * K,
        plan.ONE_SIDE: 16 * K,
        plan.WRITTEN: 0,
        same.REFLINKS: 0,
        same.BACKING: 0,
    }
    assert (now.scanned, now.skipped) == (64 * K, 32 * K)
    assert sum(length for _, length in live.reads) == 16 * K
    assert sum(length for _, length in reference.reads) == 32 * K
    assert dirty(made.decisions) == truth(live, reference, 4 * K)


async def test_what_is_written_already_is_not_read() -> None:
    """Whole chunks and parts of one that the write bitmap has are left out, and are in the map."""
    live, reference = pair(64 * K, 0)
    written = bitmap.Bitmap(64 * K, 4 * K)
    written.set(0, 4)
    written.set(5, 2)
    made = await scanned(live, reference, written=lambda: written, workers=1)
    assert live.reads == [(16 * K, 4 * K), (28 * K, 4 * K), (32 * K, 16 * K), (48 * K, 16 * K)]
    assert made.statistics().savings[plan.WRITTEN] == 6 * 4 * K
    assert made.statistics().state == progress.COMPLETE
    assert dirty(made.decisions) == set()
    assert dirty(made.decisions, written) == {0, 1, 2, 3, 5, 6}


async def test_read_all_reads_what_is_written_already_too() -> None:
    """It trusts nothing, and says so: every byte of both sides is read, and the map is the same."""
    live, reference = pair(64 * K, 0)
    written = bitmap.Bitmap(64 * K, 4 * K)
    written.set(0, 7)
    live.content[5 * 4 * K] ^= 1
    made = await scanned(live, reference, written=lambda: written, workers=1, without=plan.REASONS)
    whole = [(at, 16 * K) for at in range(0, 64 * K, 16 * K)]
    assert (live.reads, reference.reads) == (whole, whole)
    assert made.statistics().savings[plan.WRITTEN] == made.statistics().skipped == 0
    assert dirty(made.decisions) == {5}
    assert dirty(made.decisions, written) == set(range(7))


async def test_a_write_bitmap_of_another_disk_is_a_bug() -> None:
    """A wrong geometry would skip the wrong segments: it is refused, and the scan has failed."""
    live, reference = pair(64 * K, 0)
    other = bitmap.Bitmap(64 * K, 8 * K)
    made = scan.Scan(live, reference, scan.Decisions(64 * K, 4 * K), written=lambda: other)
    with pytest.raises(ValueError, match="no write bitmap of this disk"):
        await made.run()
    assert made.statistics().state == progress.FAILED
    assert dirty(made.decisions) == set(range(16))


async def test_what_cannot_be_read_is_dirty_counted_and_named() -> None:
    """The scan goes on and completes; each unreadable segment is dirty, no other is."""
    live, reference = pair(64 * K, 0)
    live.faults = [(20 * K, 20 * K + 1, OSError(errno.EIO, "bad"))]
    reference.faults = [(63 * K, 64 * K, OSError(errno.EIO, "bad"))]
    made = await scanned(live, reference, workers=1)
    now = made.statistics()
    assert (now.state, now.error_count) == (progress.COMPLETE, 2)
    assert now.errors == (
        progress.ScanError("live", 20 * K, 4 * K, errno.EIO),
        progress.ScanError("reference", 60 * K, 4 * K, errno.EIO),
    )
    assert dirty(made.decisions) == {5, 15}
    assert now.differing == 8 * K


async def test_a_disk_full_of_errors_lists_only_the_first() -> None:
    """A dead disk gives a full map and a short list."""
    live, reference = pair(100 * K, 0)
    live.faults = [(0, 100 * K, OSError(errno.EIO, "bad"))]
    now = (await scanned(live, reference, 512)).statistics()
    assert (now.state, now.error_count, now.differing) == (progress.COMPLETE, 200, 100 * K)
    assert len(now.errors) == 64


async def test_an_image_that_is_gone_ends_the_scan_with_a_valid_map() -> None:
    """Failed, no exception: what was decided stays, the rest is dirty; run() again goes on."""
    live, reference = pair(128 * K, 5)
    reference.faults = [(64 * K, 128 * K, base.GoneError("the server is away"))]
    made = await scanned(live, reference, workers=1)
    now = made.statistics()
    assert (now.state, now.failure, now.scanned) == (progress.FAILED, "the server is away", 64 * K)
    expected = truth(live, reference, 4 * K)
    half = set(range(16))
    assert dirty(made.decisions) == (expected & half) | set(range(16, 32))
    reference.faults = []
    await made.run()
    assert made.statistics().state == progress.COMPLETE
    assert made.statistics().failure is None
    assert dirty(made.decisions) == expected


@pytest.mark.parametrize("where", ["read", "extents", "written"])
async def test_a_bug_in_a_thread_comes_out_of_run(where: str) -> None:
    """Nothing unexpected is swallowed, no thread is left behind, and the map is valid."""
    live, reference = pair(64 * K, 0)

    def bug(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    options: dict[str, object] = {}
    if where == "read":
        live.before = bug
    elif where == "extents":
        live.extents = bug  # type: ignore[method-assign, assignment]
    else:
        options["written"] = bug
    made = scan.Scan(live, reference, scan.Decisions(64 * K, 4 * K), **options)  # type: ignore[arg-type]
    with pytest.raises(ZeroDivisionError):
        await made.run()
    assert made.statistics().state == progress.FAILED
    assert made.statistics().failure == "ZeroDivisionError: a bug"
    assert made.decisions.map().count() == 16
    await fakes.until(lambda: not fakes.scan_threads())


async def test_a_longer_live_disk_is_compared_with_zeros_and_says_so() -> None:
    """What the reference does not have differs where it is not zero."""
    live, reference = pair(64 * K, 0)
    del reference.content[20 * K + 5 :]
    live.content[40 * K :] = bytes(24 * K)
    made = await scanned(live, reference)
    assert made.statistics().beyond == 44 * K - 5
    assert dirty(made.decisions) == truth(live, reference, 4 * K) == {5, 6, 7, 8, 9}


async def test_a_session_started_anew_goes_on_over_the_same_buffer() -> None:
    """Only what the former scan has not decided is read."""
    live, reference = pair(256 * K, 6)
    buffer = bytearray(scan.buffer_length(256 * K, 4 * K))
    gate = fakes.Gate()
    gate.let(4)
    live.before = gate
    first = scan.Scan(
        live, reference, scan.Decisions(256 * K, 4 * K, buffer), tuning=SMALL, workers=1
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(first.run)
        await fakes.until(lambda: gate.waiting)
        first.cancel()
        gate.let(1)
    left = first.decisions.undecided()
    assert left == [(80 * K, 176 * K)]
    live.before = None
    live.reads.clear()
    second = scan.Scan(live, reference, scan.Decisions(256 * K, 4 * K, buffer), tuning=SMALL)
    await second.run()
    assert sorted(live.reads) == [(at, 16 * K) for at in range(80 * K, 256 * K, 16 * K)]
    assert dirty(second.decisions) == truth(live, reference, 4 * K)
    assert second.statistics().scanned == 256 * K


async def test_readers_step_back_and_the_event_loop_does_not() -> None:
    """Reads are made at the lowest priority by threads that nothing else uses."""
    live, reference = pair(64 * K, 0)
    seen: set[int] = set()
    live.before = lambda *_: seen.add(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
    mine = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    await scanned(live, reference)
    assert seen == {19}
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == mine
    others = await trio.to_thread.run_sync(
        lambda: os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    )
    assert others == mine
