# SPDX-License-Identifier: Apache-2.0
"""Every kind of live disk against every kind of reference: the map is the difference, exactly.

Two disks of 8 MiB are made in thirteen kinds each and opened once; every pair is scanned as `posthoc diff`
does. The judge compares the raw bytes.
"""

import contextlib
import itertools
import pathlib
import random
import tempfile
import threading
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

import pytest
import trio

from dirtymap import images
from dirtymap.images import base, export, sizes
from scanner import plan, priority, progress, scan
from tests import command, nbdkit, oracle, qemu, wait

MIB = 1 << 20
SIZE = 8 * MIB
GRANULARITY = 64 << 10
SECRET = "open sesame"

KINDS = (
    "raw",
    "qcow2",
    "compressed",
    "chain",
    "shared-backing",
    "vmdk",
    "vdi",
    "vhdx",
    "vpc",
    "luks",
    "loop",
    "nbdkit",
    "nbdkit-tls",
)


def _content(base_content: bytes, seed: int, *, places: int) -> bytes:
    """`base_content` with pieces of any length overwritten, some by zeros, and its last byte changed."""
    chosen = random.Random(seed)
    content = bytearray(base_content)
    for _ in range(places):
        start, length = chosen.randrange(SIZE), chosen.choice((1, 512, 5000, 200_000))
        length = min(length, SIZE - start)
        content[start : start + length] = (
            bytes(length) if chosen.random() < 0.4 else chosen.randbytes(length)
        )
    content[-1] = seed
    return bytes(content)


class Disk(NamedTuple):
    """One side: its bytes, and an open image of each kind."""

    content: pathlib.Path
    images: dict[str, base.Image]


class Maker:
    """Makes the images of one side in `folder`, over the disk that both began as."""

    def __init__(self, folder: pathlib.Path, content: bytes, began: pathlib.Path) -> None:
        self._folder = folder
        self._began = began
        self.raw = folder / "disk.raw"
        self.raw.write_bytes(content)
        # Holes where there are zeros, as a raw disk in use has them.
        qemu.img("convert", "-f", "raw", "-O", "raw", "-S", "4k", self.raw, folder / "sparse.raw")

    def specs(self, stack: contextlib.ExitStack) -> dict[str, tuple[str, images.Options]]:
        """Return the specification of each kind, served until `stack` ends."""
        plain = images.Options()
        specs = {"raw": (str(self._folder / "sparse.raw"), plain)}
        for kind in ("qcow2", "vmdk", "vdi", "vhdx", "vpc"):
            qemu.convert(self.raw, self._folder / kind, kind)
            specs[kind] = (f"{kind}:{self._folder / kind}", plain)
        compressed = self._folder / "compressed"
        qemu.img("convert", "-c", "-f", "raw", "-O", "qcow2", self.raw, compressed)
        specs["compressed"] = (f"qcow2:{compressed}", plain)
        specs["chain"] = (f"qcow2:{self._chain()}", plain)
        specs["shared-backing"] = (f"qcow2:{self._overlay()}", plain)
        specs["luks"] = self._luks()
        specs["loop"] = (str(stack.enter_context(qemu.loop_device(self.raw))), plain)
        specs.update(self._served(stack))
        return specs

    def _chain(self) -> pathlib.Path:
        """Three layers: each holds a part of what was written, the uppermost all that remains."""
        names = [self._folder / f"chain{number}" for number in range(3)]
        qemu.convert(self._began, names[0], "qcow2")
        for below, above in itertools.pairwise(names):
            qemu.create(above, SIZE, "qcow2", backing=(below, "qcow2"))
        qemu.io(names[1], "write -P 9 1M 1M", "write -z 3M 300k", format="qcow2")
        self._rewrite(names[2])
        return names[2]

    def _overlay(self) -> pathlib.Path:
        path = self._folder / "overlay"
        qemu.create(path, SIZE, "qcow2", backing=(self._began, "raw"))
        self._rewrite(path)
        return path

    def _rewrite(self, path: pathlib.Path) -> None:
        """Make an overlay hold the disk: rebase writes what differs from its backing file."""
        image = images.open(f"qcow2:{path}", writable=True)
        try:
            assert isinstance(image, base.WritableImage)
            content, before = self.raw.read_bytes(), bytearray(SIZE)
            image.read_into(0, memoryview(before))
            for start in range(0, SIZE, 4096):
                piece = content[start : start + 4096]
                if piece != before[start : start + 4096]:
                    image.write(start, piece)
            image.flush()
        finally:
            image.close()

    def _luks(self) -> tuple[str, images.Options]:
        path, secret = self._folder / "luks", self._folder / "secret"
        secret.write_text(SECRET)
        # Copied from the other side where it is there: making one takes QEMU seconds.
        template = self._began.parent / "template.luks"
        if not template.exists():
            qemu.create_encrypted(template, SIZE, SECRET)
        path.write_bytes(template.read_bytes())
        options = images.Options(secrets=(str(secret),))
        image = images.open(f"luks:{path}", writable=True, options=options)
        assert isinstance(image, base.WritableImage)
        image.write(0, self.raw.read_bytes())
        image.flush()
        image.close()
        return f"luks:{path}", options

    def _served(
        self, stack: contextlib.ExitStack
    ) -> Iterator[tuple[str, tuple[str, images.Options]]]:
        short = [
            pathlib.Path(
                stack.enter_context(tempfile.TemporaryDirectory(prefix="posthoc-f-", dir="/tmp"))
            )
            for _ in range(2)
        ]
        plain = stack.enter_context(nbdkit.Server(short[0], "file", self.raw))
        yield "nbdkit", (plain.uri, images.Options())
        keys = str(nbdkit.psk_file(self._folder))
        server = nbdkit.Server(short[1], "--tls=require", f"--tls-psk={keys}", "file", self.raw)
        address = stack.enter_context(server).uri.replace("nbd+unix", "nbds+unix")
        yield "nbdkit-tls", (address, images.Options(tls_psk=keys, tls_user="alice"))


@pytest.fixture(autouse=True)
def _ordinary_priority(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scan gives way to everybody: on a busy machine these would take minutes."""
    monkeypatch.setattr(priority, "lower", lambda: None)


@pytest.fixture(scope="module")
def disks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Disk, Disk]]:
    """The live disk and the reference, each in every kind."""
    folder = tmp_path_factory.mktemp("formats")
    began = folder / "began.raw"
    zeros, chosen = bytes(MIB), random.Random(10)
    began.write_bytes(b"".join(chosen.choice((zeros, chosen.randbytes(MIB))) for _ in range(8)))
    with contextlib.ExitStack() as stack:
        sides = []
        for seed, name in enumerate(("live", "reference"), 1):
            (folder / name).mkdir()
            content = _content(began.read_bytes(), seed, places=25)
            maker = Maker(folder / name, content, began)
            opened: dict[str, base.Image] = {}
            for kind, (spec, options) in maker.specs(stack).items():
                opened[kind] = images.open(spec, options=options)
                stack.callback(opened[kind].close)
            assert set(opened) == set(KINDS)
            sides.append(Disk(maker.raw, opened))
        yield sides[0], sides[1]


def _scanned(live: base.Image, reference: base.Image, *, without: Collection[str] = ()) -> set[int]:
    reference, _ = sizes.fit(reference, live.size)
    decisions = scan.Decisions(live.size, GRANULARITY)
    work = scan.Scan(live, reference, decisions, without=without)
    trio.run(work.run)
    assert work.statistics().state == progress.COMPLETE
    assert work.statistics().error_count == 0
    return _segments(decisions)


def _segments(decisions: scan.Decisions) -> set[int]:
    runs = decisions.map().runs()
    return {segment for first, count in runs for segment in range(first, first + count)}


@pytest.mark.parametrize("live", KINDS)
def test_the_map_is_exact_against_every_kind_of_reference(
    disks: tuple[Disk, Disk], live: str
) -> None:
    """A vpc is longer by its rounding, in zeros: no segment more, none less."""
    expected = oracle.differing(disks[0].content, disks[1].content, GRANULARITY)
    assert 5 < len(expected) < SIZE // GRANULARITY - 5
    found = {kind: _scanned(disks[0].images[live], disks[1].images[kind]) for kind in KINDS}
    assert found == dict.fromkeys(KINDS, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_of_image_is_identical_to_the_bytes_it_was_made_of(
    disks: tuple[Disk, Disk], kind: str
) -> None:
    """With and without trusting what it says of itself."""
    disk = disks[0]
    assert _scanned(disk.images[kind], disk.images["raw"]) == set()
    assert _scanned(disk.images[kind], disk.images["raw"], without=plan.REASONS) == set()


@pytest.mark.parametrize("kind", ["qcow2", "vpc"])
def test_the_command_says_the_same(
    disks: tuple[Disk, Disk], tmp_path: pathlib.Path, kind: str
) -> None:
    """`posthoc diff` of two files of a format, at a granularity of its own, as QEMU reads the map."""
    expected = oracle.differing(disks[0].content, disks[1].content, 4096)
    specs = [f"{kind}:{disk.content.parent / kind}" for disk in disks]
    dirty = tmp_path / "map.qcow2"
    command.posthoc("diff", *specs, "-o", dirty, "--granularity", "4K", status=1)
    assert qemu.dirty_segments(dirty, 4096) == expected


@pytest.mark.parametrize("kind", ["qcow2", "vmdk", "vdi", "vhdx", "vpc", "luks"])
def test_a_disk_of_any_format_is_mounted_and_written(
    disks: tuple[Disk, Disk], tmp_path: pathlib.Path, mountpoint: pathlib.Path, kind: str
) -> None:
    """A guest's writes go into the format; the map has them and the difference; the image stays sound."""
    folder, live, reference = disks[0].content.parent, tmp_path / "live", disks[1].content
    live.write_bytes((folder / kind).read_bytes())
    dirty, model = tmp_path / "map.qcow2", bytearray(disks[0].content.read_bytes())
    options = ["--output", dirty, *(["--secret", folder / "secret"] if kind == "luks" else [])]
    with command.mounted(f"{kind}:{live}", reference, mountpoint, *options):
        command.until_state(mountpoint, "complete")
        chosen = random.Random(11)
        with open(mountpoint / "disk", "r+b", buffering=0) as disk:
            for _ in range(30):
                data = chosen.randbytes(chosen.choice((1, 700, 70_000)))
                start = chosen.randrange(SIZE - len(data))
                disk.seek(start)
                disk.write(data)
                model[start : start + len(data)] = data
                disk.seek(start // 2)
                assert disk.read(1000) == model[start // 2 :][:1000]
    after = tmp_path / "after.raw"
    key = ["--object", f"secret,id=key,data={SECRET}"] if kind == "luks" else []
    secret = ",key-secret=key" if kind == "luks" else ""
    source = f"driver={kind},file.filename={live}{secret}"
    qemu.img("convert", *key, "--image-opts", "-O", "raw", source, after)
    # A vpc's rounding, in zeros.
    assert after.read_bytes() == model.ljust(disks[0].images[kind].size, b"\0")
    assert oracle.differing(after, reference, GRANULARITY) <= qemu.dirty_segments(
        dirty, GRANULARITY
    )


def test_a_server_that_goes_away_for_a_moment_costs_nothing(
    disks: tuple[Disk, Disk], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scan goes on where it was; segments in doubt are read again."""
    pauses = UntilBack(len(export.PAUSES))
    monkeypatch.setattr(export, "PAUSES", pauses)
    expected = oracle.differing(disks[0].content, disks[1].content, GRANULARITY)
    with _interrupted(disks, pauses.back) as (work, decisions):
        trio.run(work.run)
        assert (work.statistics().state, work.statistics().failure) == (progress.COMPLETE, None)
        assert _segments(decisions) == expected


def test_a_reference_lost_for_good_leaves_a_valid_map(
    disks: tuple[Disk, Disk], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scan ends as failed; what it had not decided is dirty, nothing that differs is missing."""
    monkeypatch.setattr(export, "PAUSES", (0.0,))
    expected = oracle.differing(disks[0].content, disks[1].content, GRANULARITY)
    with _interrupted(disks) as (work, decisions):
        trio.run(work.run)
        now = work.statistics()
        assert now.state == progress.FAILED
        assert now.failure
        assert 0 < now.undecided < SIZE
        assert expected <= _segments(decisions)


@contextlib.contextmanager
def _interrupted(
    disks: tuple[Disk, Disk], back: threading.Event | None = None
) -> Iterator[tuple[scan.Scan, scan.Decisions]]:
    """A scan whose reference's server is killed in the middle; with `back`, set then, it is started anew."""
    decisions = scan.Decisions(SIZE, GRANULARITY)
    arguments = ("file", disks[1].content)
    with (
        tempfile.TemporaryDirectory(prefix="posthoc-f-", dir="/tmp") as folder,
        nbdkit.Server(pathlib.Path(folder), *arguments) as server,
    ):

        def interrupt() -> None:
            server.kill()
            if back is not None:
                server.start(*arguments)
                back.set()

        def is_under_way() -> bool:
            return not decisions.unscanned.all(0, decisions.unscanned.segments)

        live = Interrupted(disks[0].images["raw"], is_under_way, interrupt)
        reference = images.open(server.uri)
        try:
            # Small chunks: something is decided before the last read has begun.
            tuning = plan.Tuning(chunk=256 << 10)
            yield (
                scan.Scan(live, reference, decisions, without=plan.REASONS, tuning=tuning),
                decisions,
            )
        finally:
            reference.close()
        assert live.done


class UntilBack:
    """Pauses before so many further tries that end when the server is back, however long it takes for that."""

    def __init__(self, tries: int) -> None:
        self._tries = tries
        self.back = threading.Event()

    def __iter__(self) -> Iterator[float]:
        for _ in range(self._tries):
            assert self.back.wait(wait.DEADLINE), "the server does not come back"
            yield 0.0


class Interrupted:
    """A live image of which one read, the first after `when` holds, does something else before."""

    def __init__(
        self, image: base.Image, when: Callable[[], bool], act: Callable[[], None]
    ) -> None:
        self.name, self.size = image.name, image.size
        self._image = image
        self._when, self._act = when, act
        self._lock = threading.Lock()
        self.done = False
        self.extents = image.extents
        self.close = image.close

    def read_into(self, start: int, buffer: memoryview) -> None:
        with self._lock:
            if not self.done and self._when():
                self.done = True
                self._act()
        self._image.read_into(start, buffer)
