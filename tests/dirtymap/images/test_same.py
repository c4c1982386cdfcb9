# SPDX-License-Identifier: Apache-2.0
"""What two images are known to share without reading, on real file systems and real chains."""

import contextlib
import ctypes
import fcntl
import itertools
import mmap
import os
import pathlib
import random
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator

import pytest

from dirtymap import images
from dirtymap.images import base, fiemap, file, same
from tests import qemu

MIB = 1 << 20
SIZE = 4 * MIB + 5000  # ends within a block

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


@pytest.fixture(params=["xfs", "btrfs"], scope="module")
def reflinks(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[pathlib.Path]:
    """A folder on a file system with reflinks."""
    with qemu.reflinks(tmp_path_factory.mktemp(request.param), request.param) as mounted:
        yield mounted


@pytest.fixture
def pair(
    reflinks: pathlib.Path,
) -> Iterator[tuple[pathlib.Path, pathlib.Path]]:
    """A reference of random bytes and its reflink copy, live."""
    folder = pathlib.Path(tempfile.mkdtemp(dir=reflinks))
    reference, live = folder / "reference", folder / "live"
    reference.write_bytes(random.Random(3).randbytes(SIZE))
    qemu.reflink(reference, live)
    yield live, reference
    for path in (live, reference):
        path.unlink()


@contextlib.contextmanager
def opened(*specs: str | os.PathLike[str]) -> Iterator[list[base.Image]]:
    with contextlib.ExitStack() as stack:
        found = []
        for spec in specs:
            found.append(images.open(os.fspath(spec)))
            stack.callback(found[-1].close)
        yield found


def told(
    live: base.Image, reference: base.Image, start: int = 0, length: int | None = None
) -> dict[str, set[int]]:
    """Return by rule the bytes told to be the same, in pieces of 512."""
    length = max(live.size, reference.size) - start if length is None else length
    answers = {}
    for rule in same.rules(live, reference):
        found = list(rule.equal(start, length, time.monotonic() + 60))
        assert all(a.end < b.start for a, b in itertools.pairwise(found))
        assert all(start <= e.start and e.end <= start + length for e in found)
        answers[rule.reason] = {at // 512 for e in found for at in range(e.start, e.end, 512)}
    return answers


def pieces(start: int, end: int) -> set[int]:
    return set(range(start // 512, -(-end // 512)))


# -- reflinks ----------------------------------------------------------------------------------


def test_a_reflink_copy_is_the_same_to_its_last_byte(
    pair: tuple[pathlib.Path, pathlib.Path],
) -> None:
    with opened(*pair) as (live, reference):
        assert told(live, reference) == {"reflinks": pieces(0, SIZE)}
        assert told(live, reference, 1000 * 512, 512) == {"reflinks": {1000}}


def test_what_was_just_written_is_not_the_same(pair: tuple[pathlib.Path, pathlib.Path]) -> None:
    """Also while the new bytes are in the page cache only, without an fsync of the writer's."""
    live_path, reference_path = pair
    chosen = random.Random(4)
    offsets = [0, SIZE - 1, *(chosen.randrange(SIZE) for _ in range(12))]
    with opened(*pair) as (live, reference), open(live_path, "r+b", buffering=0) as stream:
        for offset in offsets:
            before = told(live, reference)["reflinks"]
            stream.seek(offset)
            stream.write(bytes([reference_path.read_bytes()[offset] ^ 0xFF]))
            after = told(live, reference)["reflinks"]
            assert after <= before
            assert offset // 512 not in after
        # Blocks at a time: nearly all is still known.
        assert len(after) > 0.7 * SIZE // 512
        ours, theirs = live_path.read_bytes(), reference_path.read_bytes()
        assert all(ours[at * 512 :][:512] == theirs[at * 512 :][:512] for at in after)


def test_punched_grown_and_shrunk_parts_are_not_the_same(
    pair: tuple[pathlib.Path, pathlib.Path],
) -> None:
    """Holes, and both kinds of a changed end: where such bugs were."""
    live_path, _ = pair
    subprocess.run(
        ["fallocate", "--punch-hole", "-o", str(MIB), "-l", str(MIB), str(live_path)], check=True
    )
    with opened(*pair) as (live, reference):
        assert told(live, reference)["reflinks"] == pieces(0, MIB) | pieces(2 * MIB, SIZE)
    os.truncate(live_path, 3 * MIB + 100)
    with opened(*pair) as (live, reference):
        found = told(live, reference)["reflinks"]
        assert found <= pieces(0, MIB) | pieces(2 * MIB, 3 * MIB + 100)
        assert pieces(0, MIB) <= found
    os.truncate(live_path, SIZE + MIB)
    with opened(*pair) as (live, reference):
        found = told(live, reference)["reflinks"]
        assert found <= pieces(0, MIB) | pieces(2 * MIB, 3 * MIB + 100)


def test_what_was_cut_off_after_opening_is_not_the_same(
    pair: tuple[pathlib.Path, pathlib.Path],
) -> None:
    """A shared block holds bytes behind the file's end, which nobody can read."""
    live_path, reference_path = pair
    with opened(*pair) as (live, reference):
        for path in (live_path, reference_path):
            os.truncate(path, MIB + 100)
        # Shared again, up to the end of a block that the file has only the first bytes of.
        subprocess.run(["cp", "--reflink=always", str(reference_path), str(live_path)], check=True)
        assert told(live, reference)["reflinks"] == pieces(0, MIB + 100)


# include/uapi/linux/fs.h, falloc.h
_FICLONERANGE = 0x4020940D
_KEEP_SIZE, _PUNCH_HOLE, _ZERO_RANGE = 1, 2, 16


def _disturb(chosen: random.Random, live: int, reference: int) -> None:
    """Do to the live file whatever a file system offers, in whole blocks or not."""
    block = 4096
    start = chosen.randrange(SIZE // block - 40) * block
    length = chosen.randint(1, 40) * block
    verb = chosen.choice(("write", "direct", "punch", "zero", "clone", "clone-elsewhere", "cut"))
    if verb == "write":
        os.pwrite(
            live, chosen.randbytes(chosen.randrange(1, 9000)), start + chosen.randrange(block)
        )
    elif verb == "direct":
        memory = mmap.mmap(-1, block)
        memory.write(chosen.randbytes(block))
        direct = os.open(f"/proc/self/fd/{live}", os.O_WRONLY | os.O_DIRECT)
        os.pwritev(direct, [memory], start)
        os.close(direct)
    elif verb in ("punch", "zero"):
        mode = (_PUNCH_HOLE if verb == "punch" else _ZERO_RANGE) | _KEEP_SIZE
        assert _libc.fallocate(live, mode, start, length) == 0
    elif verb == "cut":
        os.ftruncate(live, start + 77)
        os.ftruncate(live, SIZE)
    else:
        # The reference's bytes at their own place again, or at another: the same extents there.
        source = start if verb == "clone" else chosen.randrange(SIZE // block - 40) * block
        argument = struct.pack("=qQQQ", reference, source, length, start)
        fcntl.ioctl(live, _FICLONERANGE, argument)


@pytest.mark.parametrize("seed", [1, 2])
def test_whatever_was_done_to_the_live_file_what_is_told_is_true(
    pair: tuple[pathlib.Path, pathlib.Path], seed: int
) -> None:
    """Random writes, holes, zeroed ranges, cuts, and clones of right and wrong places."""
    chosen = random.Random(seed)
    live_path, reference_path = pair
    theirs, known = reference_path.read_bytes(), 0
    with opened(*pair) as (live, reference), open(live_path, "r+b") as ours:
        assert isinstance(reference, file.FileImage)
        for _ in range(12):
            for _ in range(3):
                _disturb(chosen, ours.fileno(), reference.fd)
            (rule,) = same.rules(live, reference)
            found = list(rule.equal(0, SIZE, time.monotonic() + 60))
            now = live_path.read_bytes()
            assert all(now[e.start : e.end] == theirs[e.start : e.end] for e in found)
            known += sum(e.length for e in found)
    # It is worth asking: not everything is gone at once.
    assert known > SIZE


def test_equal_bytes_at_another_place_are_read(pair: tuple[pathlib.Path, pathlib.Path]) -> None:
    live_path, reference_path = pair
    live_path.unlink()
    live_path.write_bytes(reference_path.read_bytes())
    with opened(*pair) as (live, reference):
        assert told(live, reference) == {"reflinks": set()}


def test_a_reference_that_moves_meanwhile_is_not_believed(
    pair: tuple[pathlib.Path, pathlib.Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its places are asked for before and after the live disk's; balancing may come in between."""
    real, answers = fiemap.shared, []

    def moving(fd: int, *arguments: object) -> Iterator[fiemap.Place]:
        answers.append(fd)
        for place in real(fd, *arguments):  # type: ignore[arg-type]
            moved = MIB if len(answers) == 3 and place.start < MIB else 0
            yield fiemap.Place(place.start, place.end, place.physical + moved)

    monkeypatch.setattr(fiemap, "shared", moving)
    with opened(*pair) as (live, reference):
        assert 0 not in told(live, reference)["reflinks"]


def test_two_file_systems_share_no_places(
    pair: tuple[pathlib.Path, pathlib.Path], tmp_path: pathlib.Path
) -> None:
    """The numbers of their places may agree by chance."""
    other = tmp_path / "reference"
    other.write_bytes(pair[1].read_bytes())
    with opened(pair[0], other) as (live, reference):
        assert told(live, reference) == {}


def test_an_overlayfs_over_two_file_systems_shares_no_places(tmp_path: pathlib.Path) -> None:
    """It gives the files of both one device number and hands FIEMAP through to whichever has the file.

    That was taken for one file system: two files of different bytes were told to be identical.
    """
    with contextlib.ExitStack() as stack:
        for name in ("x1", "x2"):
            stack.enter_context(_xfs_with_shared_file(tmp_path / name))
        (tmp_path / "mnt").mkdir()
        lower = ":".join(str(tmp_path / name / "mnt/d") for name in ("x1", "x2"))
        subprocess.run(
            [
                *["mount", "-t", "overlay", "-o", f"lowerdir={lower},xino=on"],
                *["overlay", str(tmp_path / "mnt")],
            ],
            check=True,
        )
        stack.callback(qemu.run, "umount", tmp_path / "mnt")
        paths = [tmp_path / "mnt" / name for name in ("x1", "x2")]
        assert paths[0].stat().st_dev == paths[1].stat().st_dev
        with opened(*paths) as (live, reference):
            assert told(live, reference) == {}


@contextlib.contextmanager
def _xfs_with_shared_file(folder: pathlib.Path) -> Iterator[None]:
    """A new xfs on FOLDER/mnt with a file d/NAME of its own bytes, and a reflink copy of it."""
    with qemu.reflinks(folder) as mounted:
        (mounted / "d").mkdir()
        path = mounted / "d" / folder.name
        path.write_bytes(random.Random(folder.name).randbytes(MIB))
        qemu.reflink(path, mounted / "copy")
        yield


def test_devices_have_no_reflinks(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(MIB))
    with qemu.loop_device(path) as device, opened(device, device) as (live, reference):
        assert "reflinks" not in told(live, reference)


# -- backing chains ----------------------------------------------------------------------------

K = 1 << 10


@pytest.fixture
def chain(tmp_path: pathlib.Path) -> pathlib.Path:
    """base.raw (random) below middle.qcow2, with one and two over it; base2.raw is a copy of base."""
    content = random.Random(5).randbytes(4 * MIB)
    for name in ("base.raw", "base2.raw"):
        (tmp_path / name).write_bytes(content)
    qemu.create(tmp_path / "middle.qcow2", 4 * MIB, "qcow2", backing=("base.raw", "raw"))
    qemu.io(tmp_path / "middle.qcow2", "write -P 1 0 64k", format="qcow2")
    for name in ("one", "two"):
        qemu.create(tmp_path / f"{name}.qcow2", 4 * MIB, "qcow2", backing=("middle.qcow2", "qcow2"))
    qemu.io(tmp_path / "one.qcow2", "write -P 2 1M 64k", "write -z 2M 64k", format="qcow2")
    qemu.io(tmp_path / "two.qcow2", "write -P 3 3M 128k", format="qcow2")
    return tmp_path


def test_only_what_lies_above_the_common_layer_can_differ(chain: pathlib.Path) -> None:
    specs = [f"qcow2:{chain}/{name}.qcow2" for name in ("one", "two")]
    above = pieces(MIB, MIB + 64 * K) | pieces(2 * MIB, 2 * MIB + 64 * K)
    above |= pieces(3 * MIB, 3 * MIB + 128 * K)
    with opened(*specs) as (live, reference):
        assert told(live, reference) == {"backing": pieces(0, 4 * MIB) - above}
        assert told(live, reference, MIB - 512, 1024) == {"backing": {(MIB - 512) // 512}}


@pytest.mark.parametrize(
    ("reference", "above"),
    [
        pytest.param(
            "qcow2:{}/middle.qcow2",
            pieces(MIB, MIB + 64 * K) | pieces(2 * MIB, 2 * MIB + 64 * K),
            id="layer-below",
        ),
        pytest.param(
            "{}/base.raw",
            pieces(0, 64 * K) | pieces(MIB, MIB + 64 * K) | pieces(2 * MIB, 2 * MIB + 64 * K),
            id="raw-base",
        ),
    ],
)
def test_a_reference_may_be_a_layer_of_the_live_disk(
    chain: pathlib.Path, reference: str, above: set[int]
) -> None:
    with opened(f"qcow2:{chain}/one.qcow2", reference.format(chain)) as (live, below):
        assert told(live, below) == {"backing": pieces(0, 4 * MIB) - above}


def test_a_copy_of_the_base_is_another_file(chain: pathlib.Path) -> None:
    with opened(f"qcow2:{chain}/one.qcow2", chain / "base2.raw") as (live, reference):
        assert told(live, reference) == {}


def test_one_file_found_by_another_name_with_another_base_is_not_common(
    chain: pathlib.Path,
) -> None:
    """A relative backing name is looked for beside the overlay: a hard link elsewhere has another base."""
    elsewhere = chain / "elsewhere"
    elsewhere.mkdir()
    os.link(chain / "middle.qcow2", elsewhere / "middle.qcow2")
    (elsewhere / "base.raw").write_bytes(bytes(4 * MIB))
    qemu.create(elsewhere / "two.qcow2", 4 * MIB, "qcow2", backing=("middle.qcow2", "qcow2"))
    specs = [f"qcow2:{chain}/one.qcow2", f"qcow2:{elsewhere}/two.qcow2"]
    with opened(*specs) as (live, reference):
        assert told(live, reference) == {}


def test_what_a_raw_base_has_lost_is_not_the_same(chain: pathlib.Path) -> None:
    """QEMU reads zeros beyond its end, a raw image an error."""
    with opened(f"qcow2:{chain}/one.qcow2", chain / "base.raw") as (live, reference):
        os.truncate(chain / "base.raw", MIB // 2)
        assert told(live, reference) == {"backing": pieces(64 * K, MIB // 2)}


def test_bytes_hidden_by_a_shorter_layer_do_not_count(chain: pathlib.Path) -> None:
    """The layer between ends at 1 MiB: behind that live reads zeros and the reference the base."""
    qemu.create(chain / "short.qcow2", MIB, "qcow2", backing=("base.raw", "raw"))
    qemu.create(chain / "long.qcow2", 4 * MIB, "qcow2", backing=("short.qcow2", "qcow2"))
    specs = [f"qcow2:{chain}/long.qcow2", str(chain / "base.raw")]
    with opened(*specs) as (live, reference):
        assert told(live, reference) == {"backing": pieces(0, MIB)}


def test_what_is_written_meanwhile_is_not_the_same(chain: pathlib.Path) -> None:
    reference = images.open(f"qcow2:{chain}/two.qcow2")
    live = images.open(f"qcow2:{chain}/one.qcow2", writable=True)
    try:
        assert isinstance(live, base.WritableImage)
        assert 0 in told(live, reference)["backing"]
        live.write(7, b"x")
        assert not pieces(0, 64 * K) & told(live, reference)["backing"]
    finally:
        live.close()
        reference.close()


def test_at_the_deadline_nothing_more_is_told(chain: pathlib.Path) -> None:
    specs = [f"qcow2:{chain}/{name}.qcow2" for name in ("one", "two")]
    with opened(*specs) as (live, reference):
        (rule,) = same.rules(live, reference)
        assert list(rule.equal(0, 4 * MIB, time.monotonic() - 1)) == []
