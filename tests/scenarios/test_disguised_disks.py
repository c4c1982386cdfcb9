# SPDX-License-Identifier: Apache-2.0
"""A guest writes what it likes: raw disks that begin with a qcow2's header, which names a file of the host's.

Whoever guesses a format takes the host's file for the disk's contents, or writes them into it.

1. Both disks of a pair begin so, and differ in some segments, the header's among them.
2. A verb is run on them by their plain paths.
3. It takes them for raw bytes, and nobody has opened the file that is named.
"""

import ctypes
import json
import os
import pathlib
import random
import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest

from tests import command, oracle, qemu
from tests.posthoc import images
from tests.posthoc.images import MIB, SEGMENT

Path = pathlib.Path

SIZE = 4 * MIB
SECRET = b"of the host, not of the guest" * 40_000

_libc = ctypes.CDLL(None, use_errno=True)
# include/uapi/linux/inotify.h
_IN_OPEN = 0x20


class Watch:
    """Tells whether somebody has opened a file since the last look (inotify(7))."""

    def __init__(self, path: Path) -> None:
        self._fd = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        assert _libc.inotify_add_watch(self._fd, os.fsencode(path), _IN_OPEN) >= 0

    def opened(self) -> bool:
        try:
            (_, mask, _, _) = struct.unpack_from("=iIII", os.read(self._fd, 4096))
        except BlockingIOError:
            return False
        return bool(mask & _IN_OPEN)

    def close(self) -> None:
        os.close(self._fd)


class Pair(NamedTuple):
    live: Path
    reference: Path
    differing: set[int]
    secret: Watch
    folder: Path


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    secret = tmp_path / "of-the-host"
    secret.write_bytes(SECRET)
    qemu.img("create", "-q", "-u", "-f", "qcow2", "-b", secret, "-F", "raw", tmp_path / "t", "4M")
    header = (tmp_path / "t").read_bytes()
    content = bytearray(header + random.Random(6).randbytes(SIZE - len(header)))
    reference, live = tmp_path / "reference.raw", tmp_path / "live.raw"
    reference.write_bytes(content)
    # Behind the header, within its clusters, and where its mapping has nothing: the guest's own bytes.
    for segment in (0, 2, 30, 63):
        content[segment * SEGMENT + 5000] ^= 0xFF
    live.write_bytes(content)
    watch = Watch(secret)
    try:
        yield Pair(live, reference, {0, 2, 30, 63}, watch, tmp_path)
    finally:
        watch.close()


def diff(pair: Pair) -> Path:
    made = pair.folder / "map.qcow2"
    command.posthoc("diff", pair.live, pair.reference, "-o", made, status=1)
    assert qemu.dirty_segments(made, SEGMENT) == pair.differing
    return made


def estimate(pair: Pair) -> None:
    words = ["--json", "--seconds", "60"]
    told = json.loads(command.posthoc("estimate", pair.live, pair.reference, *words).stdout)
    assert (told["size"], told["sampled"]) == (SIZE, SIZE // SEGMENT)
    assert told["sampled_differing"] == len(pair.differing)


def digest(pair: Pair) -> None:
    manifest, made = pair.folder / "full.digest", pair.folder / "map.qcow2"
    command.posthoc("digest", pair.reference, "-o", manifest)
    command.posthoc("digest", pair.reference, "--verify", manifest)
    told = command.posthoc("digest", pair.live, "--verify", manifest, "--json", status=1)
    assert json.loads(told.stdout)["differing"] == len(pair.differing) * SEGMENT
    command.posthoc("diff", pair.live, manifest, "-o", made, status=1)
    assert qemu.dirty_segments(made, SEGMENT) == pair.differing


def verify(pair: Pair) -> None:
    told = command.posthoc("verify", "--json", diff(pair), pair.live, pair.reference)
    facts = json.loads(told.stdout)
    assert facts["differing"] == facts["dirty"] == len(pair.differing) * SEGMENT


def install(pair: Pair) -> None:
    before, metadata = pair.live.read_bytes(), pair.folder / "meta.qcow2"
    words = ["--bitmap", "b", "--metadata", metadata]
    command.posthoc("install", diff(pair), pair.live, *words)
    assert pair.live.read_bytes() == before
    assert qemu.dirty_segments(metadata, SEGMENT, "b") == pair.differing
    # A VM that is started on it has the guest's bytes.
    qemu.convert(metadata, pair.folder / "seen.raw", "raw", source_format="qcow2")
    assert (pair.folder / "seen.raw").read_bytes() == before


def mount(pair: Pair) -> None:
    mountpoint, made = pair.folder / "mnt", pair.folder / "map.qcow2"
    mountpoint.mkdir()
    content = bytearray(pair.live.read_bytes())
    with command.mounted(pair.live, pair.reference, mountpoint, "--output", made):
        assert (mountpoint / "disk").read_bytes() == content
        command.posthoc("wait", mountpoint)
        images.overwrite(mountpoint / "disk", 40 * SEGMENT, b"by the guest")
    content[40 * SEGMENT : 40 * SEGMENT + 12] = b"by the guest"
    assert pair.live.read_bytes() == content
    assert qemu.dirty_segments(made, SEGMENT) == {*pair.differing, 40}


VERBS: dict[str, Callable[[Pair], object]] = {
    verb.__name__: verb for verb in (diff, estimate, digest, verify, install, mount)
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_disk_that_begins_like_a_qcow2_is_raw_bytes(pair: Pair, verb: str) -> None:
    assert oracle.differing(pair.live, pair.reference, SEGMENT) == pair.differing
    VERBS[verb](pair)
    assert not pair.secret.opened()
    assert (pair.folder / "of-the-host").read_bytes() == SECRET


def test_an_opening_would_be_seen(pair: Pair) -> None:
    """Said to be a qcow2, the disk is what its header says, and the file is opened."""
    command.posthoc("diff", f"qcow2:{pair.live}", pair.reference, status=None)
    assert pair.secret.opened()
