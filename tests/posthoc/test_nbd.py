# SPDX-License-Identifier: Apache-2.0
"""NBD servers on the command line: a live disk behind one, and TLS."""

import os
import pathlib
import tempfile
from collections.abc import Iterator

import pytest

from tests import command, nbdkit, oracle, qemu
from tests.posthoc import images, test_diff
from tests.posthoc.images import MIB, SEGMENT

Path = pathlib.Path


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder of a name short enough for a socket."""
    with tempfile.TemporaryDirectory(prefix="posthoc-nbd-", dir="/tmp") as name:
        yield Path(name)


def test_a_live_disk_behind_a_socket_is_mounted_and_written(
    tmp_path: Path, mountpoint: Path, folder: Path
) -> None:
    """Scanned, written by the guest, and in the map; the server has what was written."""
    live, reference = images.pair(tmp_path, changed=[3, 40])
    output = tmp_path / "map.qcow2"
    with nbdkit.Server(folder, "file", live) as server:
        with command.mounted(server.uri, reference, mountpoint, "--output", output) as mount:
            status = command.until_state(mount, "complete")
            assert status["datapath"].startswith("python")
            assert status["live"] == server.uri
            assert status["differing"] == 2 * SEGMENT
            with open(mount / "disk", "r+b", buffering=0) as disk:
                disk.seek(10 * SEGMENT - 1)
                disk.write(b"ab")
                os.fsync(disk.fileno())
                assert live.read_bytes()[10 * SEGMENT - 1 :][:2] == b"ab"
    assert qemu.dirty_segments(output, SEGMENT) == {3, 9, 10, 40}


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
def test_relative_names_are_good_for_a_reconnection(
    tmp_path: Path, mountpoint: Path, folder: Path, tls: bool
) -> None:
    """The session in the background works from /: there it looked for the socket and the keys."""
    live, reference = images.pair(tmp_path)
    keys = nbdkit.psk_file(folder)
    arguments = ["--tls=require", f"--tls-psk={keys}"] if tls else []
    options = [f"--tls-psk={keys.name}"] if tls else []
    address = "nbds+unix://alice@/?socket=s" if tls else "nbd+unix:///?socket=s"
    with nbdkit.Server(folder, *arguments, "file", live) as server:
        command.posthoc("mount", *options, address, reference, mountpoint, cwd=folder)
        try:
            command.until_state(mountpoint, "complete")
            server.kill()
            server.start(*arguments, "file", live)
            images.overwrite(mountpoint / "disk", 7 * SEGMENT, b"again")
        finally:
            command.posthoc("umount", mountpoint)
    assert live.read_bytes()[7 * SEGMENT :][:5] == b"again"


@pytest.mark.parametrize("connections", ["1", "3"])
def test_connections_are_as_many_as_were_asked_for(
    tmp_path: Path, folder: Path, connections: str
) -> None:
    # A chunk for every thread.
    live, reference = images.pair(tmp_path, 64 * MIB, changed=[5])
    log = tmp_path / "log"
    with nbdkit.Server(folder, "--filter=log", "file", reference, f"logfile={log}") as server:
        options = ["--connections", connections, "--workers", "8", "--read-all"]
        facts = test_diff.diff(live, server.uri, *options, status=1)
    assert facts["differing"] == SEGMENT
    made = sum(" Connect " in line for line in log.read_text().splitlines())
    assert (made == 1) if connections == "1" else (1 < made <= 3)


def test_slow_block_status_costs_time_only(tmp_path: Path, folder: Path) -> None:
    """A server that takes longer to tell its holes than the scan listens: its disk is read."""
    live, reference = tmp_path / "live.raw", tmp_path / "reference.raw"
    for path in (live, reference):
        with path.open("wb") as stream:
            stream.truncate(8 * MIB)
            stream.write(b"x" * MIB)
            stream.seek(5 * MIB)
            stream.write(b"y" * MIB)
    images.overwrite(live, 2 * MIB + 7, b"z")
    images.overwrite(live, 8 * MIB - 1, b"z")
    images.overwrite(reference, 5 * MIB, bytes(3))
    output = tmp_path / "map.qcow2"
    slow = ["--filter=delay", "file", reference, "delay-extents=1000"]
    with nbdkit.Server(folder, *slow) as server:
        facts = test_diff.diff(live, server.uri, "-o", output, status=1)
    assert (facts["state"], facts["errors"], facts["savings"]["zeros"]) == ("complete", 0, 0)
    assert qemu.dirty_segments(output, SEGMENT) == oracle.differing(live, reference, SEGMENT)


# -- TLS over TCP ------------------------------------------------------------------------------


def differs(live: Path, address: str, *options: str | Path) -> None:
    """Compare with a server's disk, of which one segment is another."""
    assert test_diff.diff(live, address, *options, status=1)["differing"] == SEGMENT


def test_tls_with_a_pre_shared_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    live, reference = images.pair(tmp_path, changed=[5])
    keys = nbdkit.psk_file(tmp_path)
    (tmp_path / "other").mkdir()
    others = nbdkit.psk_file(tmp_path / "other")
    with nbdkit.over_tcp("--tls=require", f"--tls-psk={keys}", "file", reference) as port:
        address = f"nbds://localhost:{port}"
        differs(live, address, "--tls-psk", keys, "--tls-user", "alice")
        differs(live, f"nbds://alice@localhost:{port}", "--tls-psk", keys)
        mistakes: list[list[str | Path]] = [
            [address, "--tls-psk", keys, "--tls-user", "mallory"],
            [address, "--tls-psk", others, "--tls-user", "alice"],
            [address],
            [f"nbd://localhost:{port}"],
        ]
        for arguments in mistakes:
            told = test_diff.refused(capsys, [live, *arguments])
            assert told.startswith(f"posthoc: {arguments[0]}: cannot be reached: ")


def test_tls_with_certificates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The server's certificate names its host: under another name it is another host."""
    live, reference = images.pair(tmp_path, changed=[5])
    keys = nbdkit.certificates(tmp_path / "keys")
    others = nbdkit.certificates(tmp_path / "others")
    tls = ["--tls=require", "--tls-verify-peer", f"--tls-certificates={keys}"]
    with nbdkit.over_tcp(*tls, "file", reference) as port:
        address, other_name = f"nbds://localhost:{port}", f"nbds://127.0.0.1:{port}"
        differs(live, address, "--tls-certificates", keys)
        told = test_diff.refused(capsys, [live, other_name, "--tls-certificates", keys])
        assert "certificate verification" in told
        # An authority that is not ours, and none at all.
        for options in (["--tls-certificates", others], []):
            told = test_diff.refused(capsys, [live, address, *options])
            assert told.startswith(f"posthoc: {address}: cannot be reached: ")
