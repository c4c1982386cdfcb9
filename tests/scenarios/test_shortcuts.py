# SPDX-License-Identifier: Apache-2.0
"""Shortcuts over real files: a scan that trusts them finds what one that reads everything finds.

The judge compares the bytes as the tools give them. scanner/test_scan.py holds the same of made-up extents.
"""

import contextlib
import os
import pathlib
import random
from collections.abc import Collection, Iterator

import pytest
import trio

from dirtymap import images
from dirtymap.images import same
from scanner import plan, priority, progress, scan
from tests import oracle, qemu

Path = pathlib.Path

MIB = 1 << 20
SIZE = 6 * MIB + 4096
GRANULARITY = 16 << 10
# Every saving is taken, however small, and the disk is asked about in many windows.
GREEDY = plan.Tuning(chunk=128 << 10, least_saving=0, window=MIB)


@pytest.fixture(autouse=True)
def _ordinary_priority(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scan gives way to everybody; here nobody is waited for."""
    monkeypatch.setattr(priority, "lower", lambda: None)


def scanned(
    live: str, reference: str, *, without: Collection[str] = ()
) -> tuple[set[int], dict[str, int]]:
    """Return the dirty segments, and what was decided without reading, by reason."""
    options = images.Options(read_all=bool(without))
    with contextlib.ExitStack() as stack:
        sides = []
        for spec in (live, reference):
            sides.append(images.open(spec, options=options))
            stack.callback(sides[-1].close)
        decisions = scan.Decisions(sides[0].size, GRANULARITY)
        work = scan.Scan(*sides, decisions, without=without, tuning=GREEDY)
        trio.run(work.run)
    statistics = work.statistics()
    assert (statistics.state, statistics.error_count) == (progress.COMPLETE, 0)
    dirty = {
        segment
        for first, count in decisions.map().runs()
        for segment in range(first, first + count)
    }
    return dirty, dict(statistics.savings)


def check(live: str, reference: str, expected: set[int], reason: str) -> None:
    """With and without shortcuts `expected` is found, and `reason` saves unless it is switched off."""
    assert expected
    everything, nothing_saved = scanned(live, reference, without=plan.REASONS)
    most, saved_less = scanned(live, reference, without=[reason])
    planned, saved = scanned(live, reference)
    assert planned == most == everything == expected
    assert saved[reason] > MIB
    assert saved_less[reason] == 0
    assert not any(nothing_saved.values())


# -- chains with a common backing file ---------------------------------------------------------


def scatter(path: Path, chosen: random.Random, places: int) -> None:
    """Write, zero and discard at random places of a qcow2."""
    commands = []
    for _ in range(places):
        length = chosen.choice((512, 4096, 65536, 100_352))
        start = chosen.randrange((SIZE - length) // 512) * 512
        verb = chosen.choice(("write -P 17", "write -P 99", "write -z", "write -z -u", "discard"))
        commands.append(f"{verb} {start} {length}")
    qemu.io(path, *commands, format="qcow2", options=["-d", "unmap"])


def raw(path: Path) -> Path:
    """Return the disk of a qcow2 as a raw file."""
    target = path.with_suffix(".raw")
    qemu.convert(path, target, "raw", source_format="qcow2")
    return target


SHAPES = ["two-overlays", "overlay-and-its-middle", "deep-and-flat"]


@pytest.mark.parametrize("shape", SHAPES)
def test_chains_over_one_backing_file(tmp_path: Path, shape: str) -> None:
    """Overlays of one middle; the middle itself as the reference; chains of different depths and sizes."""
    chosen = random.Random(shape)
    base, middle = tmp_path / "base.img", tmp_path / "middle.qcow2"
    base.write_bytes(chosen.randbytes(SIZE - 512))
    qemu.create(middle, SIZE, "qcow2", backing=(base, "raw"), options="cluster_size=16k")
    scatter(middle, chosen, 8)
    live, reference = tmp_path / "live.qcow2", tmp_path / "reference.qcow2"
    qemu.create(live, SIZE, "qcow2", backing=(middle, "qcow2"))
    scatter(live, chosen, 12)
    if shape == "overlay-and-its-middle":
        reference = middle
    else:
        below = (middle, "qcow2") if shape == "two-overlays" else (base, "raw")
        qemu.create(reference, SIZE, "qcow2", backing=below, options="cluster_size=4k")
        scatter(reference, chosen, 12)
    expected = oracle.differing(raw(live), raw(reference), GRANULARITY)
    check(f"qcow2:{live}", f"qcow2:{reference}", expected, same.BACKING)


# -- reflinks ----------------------------------------------------------------------------------


@pytest.fixture(params=["xfs", "btrfs"], scope="module")
def reflinks(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """A folder on a file system with reflinks."""
    with qemu.reflinks(tmp_path_factory.mktemp(request.param), request.param) as mounted:
        yield mounted


@pytest.mark.parametrize("seed", [1, 2])
def test_reflinked_files(reflinks: Path, seed: int) -> None:
    """Both files are changed after one was made of the other, by any bytes, holes and copied ranges."""
    chosen = random.Random(seed)
    live, reference = reflinks / f"live{seed}", reflinks / f"reference{seed}"
    reference.write_bytes(chosen.randbytes(MIB) + bytes(MIB) + chosen.randbytes(SIZE - 2 * MIB))
    qemu.reflink(reference, live)
    for path in (live, reference):
        with open(path, "r+b", buffering=0) as stream:
            for _ in range(10):
                length = chosen.choice((1, 4096, 50_000))
                start = chosen.randrange(SIZE - length)
                content = bytes(length) if chosen.random() < 0.3 else chosen.randbytes(length)
                os.pwrite(stream.fileno(), content, start)
            # Shared as well, at another place of the same file: the file system clones whole blocks.
            source = chosen.randrange(4, 200) * 4096
            os.copy_file_range(stream.fileno(), stream.fileno(), 40 * 4096, source, 4 * MIB)
        start = chosen.randrange(SIZE // 4096 - 30) * 4096
        qemu.run("fallocate", "--punch-hole", "-o", str(start), "-l", str(20 * 4096), path)
    expected = oracle.differing(live, reference, GRANULARITY)
    check(str(live), str(reference), expected, same.REFLINKS)
