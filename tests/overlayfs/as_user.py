# SPDX-License-Identifier: Apache-2.0
"""What a user who is not root does with a mount of his own: `python -m tests.overlayfs.as_user FOLDER DATAPATH`."""

import contextlib
import os
import pathlib
import subprocess
import sys

from overlayfs.datapath import keeper
from tests import oracle, wait
from tests.overlayfs import mounted
from tests.overlayfs.datapath import native, test_native_deaths, test_native_disk

Serving = contextlib.AbstractContextManager[mounted.Mounted]


class Folder:
    """A folder of this user's, with a disk and a mountpoint, and the data path to serve it by."""

    def __init__(self, path: pathlib.Path, datapath: str) -> None:
        self.path = path
        self.datapath = datapath

    def serving(self) -> Serving:
        return mounted.serving(
            self.path, self.path / "live", self.path / "mnt", datapath=self.datapath
        )

    def spawn(self) -> mounted.Mounted:
        return mounted.spawn(
            self.path, self.path / "live", self.path / "mnt", datapath=self.datapath
        )


def write_and_signal(folder: Folder) -> None:
    """Write through the mount, then end it by SIGTERM."""
    with folder.serving() as mount:
        disk = os.open(mount.disk, os.O_RDWR)
        try:
            os.pwrite(disk, bytes(65536), 2 * 65536)
        finally:
            os.close(disk)
        assert mount.written() == {2}
        assert mount.live.read_bytes()[2 * 65536 : 3 * 65536] == bytes(65536)
        assert mount.terminate() == 0, mount.log.read_text()
        assert not mount.is_mounted()


def signal_while_open(folder: Folder) -> None:
    """End it by SIGTERM while a file is open: detached by fusermount3 -z."""
    with folder.serving() as mount:
        status = os.open(mount.mountpoint / "status", os.O_RDONLY)
        assert mount.terminate() == 0, mount.log.read_text()
        assert not mount.is_mounted()
        # close(2) closes it and says that its server is gone.
        with contextlib.suppress(OSError):
            os.close(status)


def unmount(folder: Folder) -> None:
    """End it from outside."""
    with folder.serving() as mount:
        subprocess.run(["fusermount3", "-u", mount.mountpoint], check=True)
        assert mount.end() == 0


def kill_the_session(folder: Folder) -> None:
    """What the killed session leaves, the keeper takes away."""
    with folder.serving() as mount:
        assert mount.disk.read_bytes() == mount.live.read_bytes()
        mount.process.kill()
        wait.until(lambda: not mount.is_mounted(), "nothing is mounted")
        mount.end()


def punch_a_hole(folder: Folder) -> None:
    """Make one, see it, free its space."""
    with native.serving(folder.path, keeper.program()) as it:
        with test_native_disk.opened(it.disk) as disk:
            mode = test_native_disk.PUNCH_HOLE | test_native_disk.KEEP_SIZE
            test_native_disk.fallocate(disk, mode, 256 << 10, 512 << 10)
            assert os.pread(disk, 512 << 10, 256 << 10) == bytes(512 << 10)
            assert os.lseek(disk, 0, os.SEEK_HOLE) == 256 << 10
            assert os.lseek(disk, 256 << 10, os.SEEK_DATA) == 768 << 10
        assert it.live.stat().st_blocks * 512 <= 512 << 10
        assert it.end() == set(range(4, 12))


def kill_everyone_in_turns(folder: Folder) -> None:
    """Under load: no error, no byte other than written, no segment missed."""
    reference = folder.path / "reference"
    reference.write_bytes((folder.path / "live").read_bytes())
    with native.serving(folder.path, keeper.program()) as it:
        assert it.facts()["locked"] == 1
        with test_native_deaths.load(it) as writers:
            for role in ["server", "keeper", "session"] * 2:
                test_native_deaths.go_on(writers)
                it.kill(role)
            test_native_deaths.go_on(writers)
        written = native.spread(native.read_map(it.folder))
    assert oracle.differing(folder.path / "live", reference, native.SEGMENT) <= written


def main() -> None:
    folder = Folder(pathlib.Path(sys.argv[1]), sys.argv[2])
    first = folder.spawn()
    try:
        line = first.line()
        if "refused" in line:
            print("refused:", line["refused"])
            return
        assert first.terminate() == 0
    finally:
        first.close()
    write_and_signal(folder)
    signal_while_open(folder)
    unmount(folder)
    if folder.datapath == "native":
        punch_a_hole(folder)
        kill_everyone_in_turns(folder)
    if folder.datapath == "forward":
        kill_the_session(folder)
    print("done")


if __name__ == "__main__":
    main()
