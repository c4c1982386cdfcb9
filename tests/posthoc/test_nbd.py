# SPDX-License-Identifier: Apache-2.0
"""NBD servers on the command line: a live disk behind one, and TLS."""

import os
import pathlib
import tempfile
from collections.abc import Iterator

import pytest

from tests import command, nbdkit, qemu
from tests.posthoc import images
from tests.posthoc.images import SEGMENT

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


@pytest.mark.parametrize("tls", ["none", "option", "uri"])
def test_relative_names_are_good_for_a_reconnection(
    tmp_path: Path, mountpoint: Path, folder: Path, tls: str
) -> None:
    """The session in the background works from /: there it looked for the socket and the keys."""
    live, reference = images.pair(tmp_path)
    keys = nbdkit.psk_file(folder)
    arguments = [] if tls == "none" else ["--tls=require", f"--tls-psk={keys}"]
    scheme, user = ("nbd", "") if tls == "none" else ("nbds", "alice@")
    address = f"{scheme}+unix://{user}/?socket=s"
    if tls == "uri":
        address += f"&tls-psk-file={keys.name}"
    options = [f"--tls-psk={keys.name}"] if tls == "option" else []
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
