# SPDX-License-Identifier: Apache-2.0
"""NBD exports as images: reading, writing, blocks, TLS, faults, and servers that go away."""

import contextlib
import errno
import os
import pathlib
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from dirtymap import errors, images
from dirtymap.extent import Extent
from dirtymap.images import base, export, nbd, pool
from tests import nbdkit, qemu, wait

MIB = 1 << 20
SIZE = 3 * MIB


@pytest.fixture
def folder() -> Iterator[pathlib.Path]:
    """A folder of a name short enough for a socket."""
    with tempfile.TemporaryDirectory(prefix="posthoc-nbd-", dir="/tmp") as name:
        yield pathlib.Path(name)


@pytest.fixture
def disk(tmp_path: pathlib.Path) -> pathlib.Path:
    """1 MiB of random bytes, a hole, and random bytes again."""
    path = tmp_path / "disk.raw"
    content = random.Random(1)
    with open(path, "wb") as stream:
        stream.write(content.randbytes(MIB))
        stream.seek(2 * MIB)
        stream.write(content.randbytes(MIB))
    return path


@pytest.fixture
def opened() -> Iterator[Callable[..., base.Image]]:
    """Opens images and closes them after the test."""
    made: list[base.Image] = []

    def open_(spec: str, **keywords: object) -> base.Image:
        options = images.Options(**{k: v for k, v in keywords.items() if k != "writable"})  # type: ignore[arg-type]
        made.append(images.open(spec, writable=bool(keywords.get("writable")), options=options))
        return made[-1]

    yield open_
    for image in made:
        image.close()


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tries to reach a lost server follow each other at once."""
    monkeypatch.setattr(export, "PAUSES", (0.0, 0.0))


def read(image: base.Image, start: int = 0, length: int | None = None) -> bytes:
    buffer = bytearray(image.size - start if length is None else length)
    image.read_into(start, memoryview(buffer))
    return bytes(buffer)


def writable(image: base.Image) -> export.WritableNbdImage:
    assert isinstance(image, export.WritableNbdImage)
    return image


Opened = Callable[..., base.Image]


# -- reading -----------------------------------------------------------------------------------


@pytest.mark.parametrize("connections", [None, 1, 3])
def test_it_reads_what_is_there(
    disk: pathlib.Path, opened: Opened, connections: int | None
) -> None:
    with qemu.nbd_server(disk) as uri:
        image = opened(uri, connections=connections)
        assert (image.name, image.size) == (uri, SIZE)
        assert read(image) == disk.read_bytes()
        assert read(image, 77, 1000) == disk.read_bytes()[77:1077]


def test_threads_read_at_the_same_time(disk: pathlib.Path, opened: Opened) -> None:
    """Sixteen threads over four connections: each gets its own bytes."""
    content = disk.read_bytes()
    with qemu.nbd_server(disk) as uri:
        image = opened(uri, connections=4)
        wrong: list[int] = []

        def check(number: int) -> None:
            for start in range(number * 4096, SIZE - 8192, 16 * 4096):
                same = read(image, start, 8192) == content[start : start + 8192]
                wrong.extend([] if same else [start])

        threads = [threading.Thread(target=check, args=(number,)) for number in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []


def test_extents_are_what_the_server_says(disk: pathlib.Path, opened: Opened) -> None:
    with qemu.nbd_server(disk) as uri:
        image = opened(uri)
        assert list(image.extents(0, SIZE)) == [
            Extent(0, MIB),
            Extent(MIB, MIB, zero=True, hole=True),
            Extent(2 * MIB, MIB),
        ]
        assert list(image.extents(MIB - 10, 20)) == [
            Extent(MIB - 10, 10),
            Extent(MIB, 10, zero=True, hole=True),
        ]


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["--filter=noextents"], id="noextents"),
        pytest.param(["--no-sr"], id="no-structured-replies"),
    ],
)
def test_without_extents_all_is_data(
    disk: pathlib.Path, opened: Opened, folder: pathlib.Path, arguments: list[str]
) -> None:
    with nbdkit.Server(folder, *arguments, "file", disk) as server:
        image = opened(server.uri)
        assert list(image.extents(0, SIZE)) == [Extent(0, SIZE)]
        assert read(image) == disk.read_bytes()


def _scripted(*extra: str, size: int = SIZE) -> list[str]:
    """An export of zeros whose answers are shell scripts."""
    return ["eval", f"get_size=echo {size}", "pread=head -c $3 /dev/zero", *extra]


def _stuck(disk: pathlib.Path, log: pathlib.Path, verb: str) -> list[str]:
    """A server that notes requests in a log, and never answers those of one kind."""
    filters = ["--filter=log", "--filter=delay"]
    return [*filters, "file", str(disk), f"logfile={log}", f"delay-{verb}=1000"]


def test_short_answers_about_extents_are_asked_on(opened: Opened, folder: pathlib.Path) -> None:
    """A server may tell only the first part of what it was asked."""
    with nbdkit.Server(
        folder, *_scripted("extents=echo $4 524288 hole,zero", "can_extents=exit 0")
    ) as server:
        image = opened(server.uri)
        assert list(image.extents(0, SIZE)) == [Extent(0, SIZE, zero=True, hole=True)]


def test_a_hole_is_not_taken_for_zeros(opened: Opened, folder: pathlib.Path) -> None:
    """NBD_STATE_HOLE alone says nothing about contents: it must not spare a read."""
    script = _scripted(f"extents=echo 0 {SIZE} hole", "can_extents=exit 0")
    with nbdkit.Server(folder, *script) as server:
        assert list(opened(server.uri).extents(0, SIZE)) == [Extent(0, SIZE, hole=True)]


def test_an_error_about_extents_makes_data(opened: Opened, folder: pathlib.Path) -> None:
    script = _scripted("extents=echo EIO >&2; exit 1", "can_extents=exit 0")
    with nbdkit.Server(folder, *script) as server:
        image = opened(server.uri)
        assert list(image.extents(0, SIZE)) == [Extent(0, SIZE)]
        assert read(image, 0, 10) == bytes(10)


def test_asking_for_extents_ends_at_the_deadline(
    disk: pathlib.Path, opened: Opened, folder: pathlib.Path
) -> None:
    """The answer never comes; what is asked afterwards is answered, over another connection."""
    with nbdkit.Server(folder, "--filter=delay", "file", disk, "delay-extents=1000") as server:
        image = opened(server.uri)
        assert list(image.extents(0, SIZE, time.monotonic() + 0.2)) == [Extent(0, SIZE)]
        assert read(image) == disk.read_bytes()


def test_minimum_block_sizes_are_kept(
    disk: pathlib.Path, opened: Opened, folder: pathlib.Path
) -> None:
    """Such a server refuses what is not aligned; any range can be read all the same."""
    policy = ["blocksize-minimum=4096", "blocksize-preferred=4096", "blocksize-maximum=65536"]
    policy += ["blocksize-error-policy=error"]
    with nbdkit.Server(folder, "--filter=blocksize-policy", "file", disk, *policy) as server:
        image = opened(server.uri)
        content = disk.read_bytes()
        for start, length in ((0, SIZE), (1, 1), (4095, 2), (5000, 100_000), (SIZE - 1, 1)):
            assert read(image, start, length) == content[start : start + length]
        assert list(image.extents(MIB + 1, 10)) == [Extent(MIB + 1, 10, zero=True, hole=True)]


# -- faults ------------------------------------------------------------------------------------


def test_a_servers_error_is_an_oserror_and_the_connection_lives_on(
    disk: pathlib.Path, opened: Opened, folder: pathlib.Path
) -> None:
    trigger = folder / "fail"
    arguments = ["error-pread=ENOSPC", "error-pread-rate=100%", f"error-pread-file={trigger}"]
    with nbdkit.Server(folder, "--filter=error", "file", disk, *arguments) as server:
        image = opened(server.uri, connections=1)
        before = read(image)
        trigger.touch()
        with pytest.raises(OSError) as caught:
            read(image)
        assert caught.value.errno == errno.ENOSPC
        assert not isinstance(caught.value, base.GoneError)
        trigger.unlink()
        assert read(image) == before


def test_one_failed_request_among_many_in_flight_fails_the_read(
    opened: Opened, folder: pathlib.Path
) -> None:
    """Every answer is looked at (CVE-2022-0485): 12 requests, the tenth fails."""
    bad = 9 * nbd.REQUEST
    pread = f"pread=if [ $4 -eq {bad} ]; then echo EIO >&2; exit 1; fi; head -c $3 /dev/zero"
    with nbdkit.Server(folder, "eval", f"get_size=echo {SIZE}", pread) as server:
        image = opened(server.uri)
        with pytest.raises(OSError) as caught:
            read(image)
        assert caught.value.errno == errno.EIO
        assert read(image, 0, bad) == bytes(bad)


def test_a_server_that_comes_back_is_read_on(
    disk: pathlib.Path, opened: Opened, folder: pathlib.Path
) -> None:
    with nbdkit.Server(folder, "file", disk) as server:
        image = opened(server.uri)
        assert read(image, 0, 10) == disk.read_bytes()[:10]
        server.kill()
        server.start("file", disk)
        assert read(image) == disk.read_bytes()


def test_what_was_in_flight_is_read_again(
    disk: pathlib.Path, opened: Opened, folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """The server dies with the answer owed; its successor gives it."""
    log = tmp_path / "log"
    with nbdkit.Server(folder, *_stuck(disk, log, "read")) as server:
        image = opened(server.uri)
        result: list[bytes] = []
        thread = threading.Thread(target=lambda: result.append(read(image)))
        thread.start()
        wait.until(lambda: " Read " in log.read_text(), "the read is in flight")
        server.kill()
        server.start("file", disk)
        thread.join()
        assert result == [disk.read_bytes()]


@pytest.mark.usefixtures("no_pauses")
def test_a_server_that_stays_away_is_gone_until_it_answers(
    disk: pathlib.Path, opened: Opened, folder: pathlib.Path
) -> None:
    """After the bounded tries each further read fails at once; a server that is back is found."""
    with nbdkit.Server(folder, "file", disk) as server:
        image = opened(server.uri)
        server.kill()
        for _ in range(3):
            with pytest.raises(base.GoneError):
                read(image, 0, 10)
        assert list(image.extents(0, SIZE)) == [Extent(0, SIZE)]
        server.start("file", disk)
        assert read(image) == disk.read_bytes()


@pytest.mark.usefixtures("no_pauses")
def test_another_disk_behind_the_address_is_gone(
    disk: pathlib.Path, opened: Opened, folder: pathlib.Path
) -> None:
    with nbdkit.Server(folder, "file", disk) as server:
        image = opened(server.uri)
        server.kill()
        server.start("memory", str(SIZE + 512))
        # The first question finds the connection lost, the second has one to a disk of nothing but zeros.
        for _ in range(2):
            assert list(image.extents(0, SIZE)) == [Extent(0, SIZE)]
        with pytest.raises(base.GoneError, match="another disk"):
            read(image, 0, 10)


def test_closing_ends_the_wait_for_a_server(
    disk: pathlib.Path, folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "PAUSES", (1000.0,))
    with nbdkit.Server(folder, "file", disk) as server:
        image = images.open(server.uri)
        server.kill()
    result: list[OSError] = []

    def attempt() -> None:
        try:
            read(image, 0, 10)
        except OSError as error:
            result.append(error)

    thread = threading.Thread(target=attempt)
    thread.start()
    image.close()
    thread.join(wait.DEADLINE)
    assert [error.errno for error in result] == [errno.EBADF]
    image.close()


def test_a_silent_server_is_given_up(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A listener that never greets: an error in the end, not a hang."""
    monkeypatch.setattr(nbd, "CONNECT_PATIENCE", 0.3)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.fspath(folder / "s"))
        listener.listen()
        with pytest.raises(errors.ImageError, match="does not answer"):
            images.open(qemu.uri(folder / "s"))


@pytest.mark.usefixtures("no_pauses")
def test_an_answer_that_never_comes_is_given_up(
    folder: pathlib.Path, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nbd, "ANSWER_PATIENCE", 0.3)
    with nbdkit.Server(folder, "--filter=delay", "memory", "1M", "delay-read=1000") as server:
        image = opened(server.uri)
        with pytest.raises(base.GoneError, match="does not answer"):
            read(image, 0, 10)


def test_fewer_connections_than_promised_are_enough(
    disk: pathlib.Path, opened: Opened, folder: pathlib.Path
) -> None:
    """A server that refuses a second client though it said that several are welcome."""
    with nbdkit.Server(folder, "--filter=limit", "file", disk, "limit=1") as server:
        image = opened(server.uri, connections=4)
        content = disk.read_bytes()
        results: list[bool] = []
        threads = [
            threading.Thread(target=lambda: results.append(read(image) == content))
            for _ in range(6)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results == [True] * 6


# -- opening -----------------------------------------------------------------------------------


def test_the_multi_conn_flag_decides_connections(
    disk: pathlib.Path, opened: Opened, folder: pathlib.Path
) -> None:
    """A scan gets connections of its own only where several see the same disk."""
    with qemu.nbd_server(disk) as uri:
        image = opened(uri)
        assert isinstance(image, export.NbdImage)
        reader = image.reader()
        assert reader is not image
        assert read(reader) == disk.read_bytes()
        reader.close()
        assert read(image, 0, 1) == disk.read_bytes()[:1]
    filters = ["--filter=multi-conn", "file", disk, "multi-conn-mode=disable"]
    with nbdkit.Server(folder, *filters) as server:
        image = opened(server.uri, writable=True, connections=8)
        assert isinstance(image, export.NbdImage)
        assert image.reader() is image


def test_export_names_are_part_of_the_uri(disk: pathlib.Path, opened: Opened) -> None:
    with qemu.nbd_server(disk, options=["-x", "my disk/1"]) as uri:
        address = nbd.uri(qemu.socket_of(uri), "my disk/1")
        assert read(opened(address), 0, 9) == disk.read_bytes()[:9]
        with pytest.raises(errors.ImageError, match="cannot be reached"):
            opened(nbd.uri(qemu.socket_of(uri), "another"))


def test_over_tcp(disk: pathlib.Path, opened: Opened) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        # qemu-nbd takes the listener from us: nobody else can get the port in between.
        probe.listen()
        environment = {**os.environ, "LISTEN_FDS": "1"}
        take_over = (
            "import os, sys; os.dup2(int(sys.argv[1]), 3); os.environ['LISTEN_PID'] = str(os.getpid()); "
            "os.execvp(sys.argv[2], sys.argv[2:])"
        )
        words = [sys.executable, "-c", take_over, str(probe.fileno())]
        words += ["qemu-nbd", "-r", "-t", "-f", "raw", str(disk)]
        process = subprocess.Popen(words, env=environment, pass_fds=[probe.fileno()])
        try:
            assert read(opened(f"nbd://127.0.0.1:{port}")) == disk.read_bytes()
        finally:
            process.kill()
            process.wait()


@pytest.mark.parametrize(
    "spec",
    ["nbd+unix:///?socket=/nonexistent/socket", "nbd://localhost:1", "nbd+unix:///", "nbd://["],
)
def test_what_cannot_be_reached_is_one_line(spec: str) -> None:
    with pytest.raises(errors.ImageError, match="cannot be reached") as caught:
        images.open(spec)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(spec)


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        pytest.param("nbd://host:10809/disk", "nbd://host:10809/disk", id="no-file"),
        pytest.param("nbd+unix:///?socket=/a%20b/s", "nbd+unix:///?socket=/a%20b/s", id="absolute"),
        pytest.param("nbd+unix:///?socket=a%20b", "nbd+unix:///?socket=/here/a%20b", id="relative"),
        pytest.param(
            "nbds+unix:///x?tls-username=a&socket=s;tls-psk-file=k+y&tls-certificates=../c",
            "nbds+unix:///x?tls-username=a&socket=/here/s;tls-psk-file=/here/k%2By&tls-certificates=/c",
            id="with-keys",
        ),
    ],
)
def test_files_in_an_address_are_made_absolute(
    monkeypatch: pytest.MonkeyPatch, uri: str, expected: str
) -> None:
    monkeypatch.setattr(os, "getcwd", lambda: "/here")
    assert nbd.absolute(uri) == expected


def test_an_empty_export_is_refused(folder: pathlib.Path) -> None:
    with (
        nbdkit.Server(folder, "memory", "0") as server,
        pytest.raises(errors.ImageError, match="is empty"),
    ):
        images.open(server.uri)


def test_without_libnbd_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nbd, "libnbd", None)
    with pytest.raises(errors.UserError, match="python3-libnbd"):
        images.open("nbd://localhost")


def test_tls_with_certificates(
    disk: pathlib.Path, opened: Opened, folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    keys = nbdkit.certificates(tmp_path / "keys")
    tls = ["--tls=require", "--tls-verify-peer", f"--tls-certificates={keys}"]
    with nbdkit.Server(folder, *tls, "file", disk) as server:
        address = server.uri.replace("nbd+unix", "nbds+unix")
        assert read(opened(address, tls_certificates=str(keys))) == disk.read_bytes()
        for unsafe in (server.uri, address):
            with pytest.raises(errors.ImageError, match="cannot be reached"):
                opened(unsafe)


def test_tls_with_a_pre_shared_key(
    disk: pathlib.Path, opened: Opened, folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    keys = nbdkit.psk_file(tmp_path)
    with nbdkit.Server(folder, "--tls=require", f"--tls-psk={keys}", "file", disk) as server:
        address = server.uri.replace("nbd+unix:", "nbds+unix:")
        assert read(opened(address, tls_psk=str(keys), tls_user="alice")) == disk.read_bytes()
        named = address.replace("///", "//alice@/")
        assert read(opened(named, tls_psk=str(keys)), 0, 9) == disk.read_bytes()[:9]
        with pytest.raises(errors.ImageError, match="mallory"):
            opened(address, tls_psk=str(keys), tls_user="mallory")


# -- writing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 4096], ids=["any-byte", "blocks-of-4-KiB"])
def test_a_model_disk_agrees(
    tmp_path: pathlib.Path, opened: Opened, folder: pathlib.Path, block: int
) -> None:
    """Random writes, zeros and reads of any alignment, against a bytearray."""
    path = tmp_path / "disk"
    path.write_bytes(bytes(MIB))
    policy = [f"blocksize-minimum={block}", "blocksize-preferred=4096", "blocksize-maximum=1M"]
    policy += ["blocksize-error-policy=error"]
    with nbdkit.Server(folder, "--filter=blocksize-policy", "file", path, *policy) as server:
        image = writable(opened(server.uri, writable=True))
        assert isinstance(image, base.ZeroingImage)
        model = bytearray(MIB)
        chosen = random.Random(block)
        for _ in range(200):
            start = chosen.randrange(MIB)
            length = min(chosen.choice((1, 100, 4096, 70_000)), MIB - start)
            if chosen.random() < 0.3:
                chosen.choice((image.zero, image.discard))(start, length)
                model[start : start + length] = bytes(length)
            else:
                data = chosen.randbytes(length)
                image.write(start, data)
                model[start : start + length] = data
            at = chosen.randrange(MIB - 5000)
            assert read(image, at, 5000) == model[at : at + 5000]
        image.flush()
    assert path.read_bytes() == model


def test_two_writers_into_one_block_lose_nothing(
    tmp_path: pathlib.Path, opened: Opened, folder: pathlib.Path
) -> None:
    """Read-modify-write of one block by several threads at once: each keeps what it wrote."""
    path = tmp_path / "disk"
    path.write_bytes(bytes(MIB))
    policy = ["blocksize-minimum=4096", "blocksize-error-policy=error"]
    with nbdkit.Server(folder, "--filter=blocksize-policy", "file", path, *policy) as server:
        image = writable(opened(server.uri, writable=True, connections=4))
        lost: list[int] = []

        def write(number: int) -> None:
            for value in range(1, 100):
                mine = bytes([value]) * 512
                image.write(number * 512, mine)
                if read(image, number * 512, 512) != mine:
                    lost.append(number)

        threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert lost == []


def test_zeros_are_written_where_the_server_has_no_zero(
    tmp_path: pathlib.Path, opened: Opened, folder: pathlib.Path
) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"\xff" * MIB)
    with nbdkit.Server(folder, "--filter=nozero", "file", path) as server:
        image = writable(opened(server.uri, writable=True))
        assert not image.facts.can_zero
        image.zero(1000, MIB - 3000)
    assert path.read_bytes() == b"\xff" * 1000 + bytes(MIB - 3000) + b"\xff" * 2000


def test_a_discard_may_make_holes_and_a_zero_may_not(
    tmp_path: pathlib.Path, opened: Opened, folder: pathlib.Path
) -> None:
    """One request each where the server can zero; trim alone would promise nothing of the bytes."""
    path, log = tmp_path / "disk", tmp_path / "log"
    path.write_bytes(b"\xff" * MIB)
    with nbdkit.Server(folder, "--filter=log", "file", path, f"logfile={log}") as server:
        image = writable(opened(server.uri, writable=True))
        image.discard(65536, 65536)
        image.zero(262144, 65536)
        image.flush()
        assert read(image, 0, MIB).count(0) == 2 * 65536
    assert nbdkit.requests(log, "Zero", "Trim", "Write") == [
        nbdkit.Request("Zero", 65536, 65536, True),
        nbdkit.Request("Zero", 262144, 65536, False),
    ]


def test_long_zeros_come_in_pieces(
    tmp_path: pathlib.Path, opened: Opened, folder: pathlib.Path
) -> None:
    """A server that is slow to zero answers one piece after the other, and is not given up."""
    path, log = tmp_path / "disk", tmp_path / "log"
    qemu.create(path, 150 * MIB)
    with nbdkit.Server(folder, "--filter=log", "file", path, f"logfile={log}") as server:
        writable(opened(server.uri, writable=True)).discard(0, 150 * MIB)
    pieces = [(request.start, request.length) for request in nbdkit.requests(log, "Zero")]
    assert sorted(pieces) == [(0, 64 * MIB), (64 * MIB, 64 * MIB), (128 * MIB, 22 * MIB)]


@pytest.mark.parametrize("tells", [True, False], ids=["holes-are-told", "nothing-is-told"])
def test_a_discard_where_the_server_can_only_trim(
    tmp_path: pathlib.Path, opened: Opened, folder: pathlib.Path, tells: bool
) -> None:
    """It trims, and what it does not call zeros afterwards is written: the bytes are zeros either way."""
    path, log = tmp_path / "disk", tmp_path / "log"
    path.write_bytes(b"\xff" * MIB)
    filters = ["--filter=log", "--filter=nozero", *([] if tells else ["--filter=noextents"])]
    with nbdkit.Server(folder, *filters, "file", path, f"logfile={log}") as server:
        image = writable(opened(server.uri, writable=True))
        image.discard(65536, 65536)
        image.flush()
    assert path.read_bytes() == b"\xff" * 65536 + bytes(65536) + b"\xff" * (MIB - 131072)
    expected = [nbdkit.Request("Trim", 65536, 65536, False)]
    if not tells:
        expected.append(nbdkit.Request("Write", 65536, 65536, False))
    assert nbdkit.requests(log, "Zero", "Trim", "Write") == expected


def test_trim_leaves_parts_of_blocks_alone(
    tmp_path: pathlib.Path, opened: Opened, folder: pathlib.Path
) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"\xff" * MIB)
    policy = ["blocksize-minimum=4096", "blocksize-error-policy=error"]
    with nbdkit.Server(folder, "--filter=blocksize-policy", "file", path, *policy) as server:
        image = writable(opened(server.uri, writable=True))
        image.trim(4000, 10_000)
        image.trim(20_000, 10)
        image.flush()
    content = path.read_bytes()
    assert content[:4096] == b"\xff" * 4096
    assert content[3 * 4096 :] == b"\xff" * (MIB - 3 * 4096)


def test_a_failed_write_is_an_oserror(
    tmp_path: pathlib.Path, opened: Opened, folder: pathlib.Path
) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(MIB))
    fail = ["error-pwrite=ENOSPC", "error-pwrite-rate=100%"]
    with nbdkit.Server(folder, "--filter=error", "file", path, *fail) as server:
        image = writable(opened(server.uri, writable=True))
        with pytest.raises(OSError) as caught:
            image.write(0, bytes(MIB))
        assert caught.value.errno == errno.ENOSPC
        assert read(image, 0, 10) == bytes(10)


def test_a_flush_tells_of_a_server_lost_with_unflushed_writes(
    tmp_path: pathlib.Path, opened: Opened, folder: pathlib.Path
) -> None:
    """What it had acknowledged may have died with it: once EIO, and no news without such writes."""
    path = tmp_path / "disk"
    path.write_bytes(bytes(MIB))
    with nbdkit.Server(folder, "file", path) as server:
        image = writable(opened(server.uri, writable=True))
        image.write(0, b"one")
        server.kill()
        server.start("file", path)
        image.write(0, b"two")
        with pytest.raises(OSError) as caught:
            image.flush()
        assert caught.value.errno == errno.EIO
        image.flush()
        server.kill()
        server.start("file", path)
        image.flush()
        assert read(image, 0, 3) == b"two"


def test_a_write_in_doubt_is_written_again(
    tmp_path: pathlib.Path, opened: Opened, folder: pathlib.Path
) -> None:
    path, log = tmp_path / "disk", tmp_path / "log"
    path.write_bytes(bytes(SIZE))
    with nbdkit.Server(folder, *_stuck(path, log, "write")) as server:
        image = writable(opened(server.uri, writable=True))
        thread = threading.Thread(target=lambda: image.write(5, b"again"))
        thread.start()
        wait.until(lambda: " Write " in log.read_text(), "the write is in flight")
        server.kill()
        server.start("file", path)
        thread.join()
        assert read(image, 0, 15) == bytes(5) + b"again" + bytes(5)
        # The server that is there has all of it: nothing for a flush to tell.
        image.flush()


def test_a_write_answered_in_part_is_in_doubt(
    tmp_path: pathlib.Path, opened: Opened, folder: pathlib.Path
) -> None:
    """Whole blocks are acknowledged before the rest of the same write is begun."""
    path, log = tmp_path / "disk", tmp_path / "log"
    path.write_bytes(bytes(MIB))
    policy = ["blocksize-minimum=4096", "blocksize-error-policy=error"]
    stuck = _stuck(path, log, "read")
    with nbdkit.Server(folder, "--filter=blocksize-policy", *stuck, *policy) as server:
        image = writable(opened(server.uri, writable=True))
        thread = threading.Thread(target=lambda: image.write(0, b"x" * 5000))
        thread.start()
        wait.until(lambda: " Read " in log.read_text(), "the second block's rest is being read")
        server.kill()
        server.start("--filter=blocksize-policy", "file", path, *policy)
        thread.join()
        with pytest.raises(OSError) as caught:
            image.flush()
        assert caught.value.errno == errno.EIO
        image.flush()


def test_a_loss_between_an_answer_and_its_counting_is_in_doubt(
    tmp_path: pathlib.Path,
    opened: Opened,
    folder: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another thread may find out first that the server has gone which has just acknowledged a write."""
    path = tmp_path / "disk"
    path.write_bytes(bytes(MIB))
    with nbdkit.Server(folder, "file", path) as server:
        image = writable(opened(server.uri, writable=True))
        real = nbd.Connection.write

        def write(self: nbd.Connection, start: int, buffer: memoryview) -> None:
            real(self, start, buffer)
            image.lost()

        monkeypatch.setattr(nbd.Connection, "write", write)
        image.write(0, b"one")
        with pytest.raises(OSError) as caught:
            image.flush()
        assert caught.value.errno == errno.EIO


@pytest.mark.usefixtures("no_pauses")
def test_after_a_loss_no_idle_connection_is_tried(
    disk: pathlib.Path, opened: Opened, folder: pathlib.Path
) -> None:
    """They lead to the same server: each would cost a try, and be taken for another loss."""
    with nbdkit.Server(folder, "file", disk) as server:
        image = opened(server.uri, writable=True)
        assert isinstance(image, export.NbdImage)
        with contextlib.ExitStack() as stack:
            for _ in range(export.CONNECTIONS):
                stack.enter_context(image._pool.connection())
        server.kill()
        server.start("file", disk)
        assert read(image, 0, 10) == disk.read_bytes()[:10]


def test_a_server_that_never_shakes_hands_again_is_given_up_in_time(
    disk: pathlib.Path, opened: Opened, folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its connections are accepted, by the kernel: each try took its full patience, with the guest waiting."""
    monkeypatch.setattr(export, "PAUSES", (0.0,) * 6)
    monkeypatch.setattr(export, "PATIENCE", 0.5)
    monkeypatch.setattr(nbd, "CONNECT_PATIENCE", 0.3)
    monkeypatch.setattr(pool, "FURTHER_PATIENCE", 0.1)
    with nbdkit.Server(folder, "file", disk) as server:
        image = opened(server.uri)
        server.kill()
    (folder / "s").unlink()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.fspath(folder / "s"))
        listener.listen()
        listener.setblocking(False)
        with pytest.raises(base.GoneError, match="does not answer"):
            read(image, 0, 10)
        tries = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                listener.accept()[0].close()
                tries += 1
        assert 1 <= tries <= 3


def test_a_read_only_export_is_not_written(disk: pathlib.Path) -> None:
    with qemu.nbd_server(disk) as uri, pytest.raises(errors.ImageError, match="read-only"):
        images.open(uri, writable=True)
