# SPDX-License-Identifier: Apache-2.0
"""What a user who is not root does with a mount of his own: `python -m tests.overlayfs.as_user FOLDER`."""

import contextlib
import os
import pathlib
import subprocess
import sys

from tests import wait
from tests.overlayfs import mounted


def write_and_signal(folder: pathlib.Path) -> None:
    """Write through the mount, then end it by SIGTERM."""
    with mounted.serving(folder, folder / "live", folder / "mnt") as mount:
        disk = os.open(mount.disk, os.O_RDWR)
        try:
            os.pwrite(disk, bytes(65536), 2 * 65536)
        finally:
            os.close(disk)
        assert mount.written() == {2}
        assert mount.live.read_bytes()[2 * 65536 : 3 * 65536] == bytes(65536)
        assert mount.terminate() == 0, mount.log.read_text()
        assert not mount.is_mounted()


def signal_while_open(folder: pathlib.Path) -> None:
    """End it by SIGTERM while a file is open: detached by fusermount3 -z."""
    with mounted.serving(folder, folder / "live", folder / "mnt") as mount:
        status = os.open(mount.mountpoint / "status", os.O_RDONLY)
        assert mount.terminate() == 0, mount.log.read_text()
        assert not mount.is_mounted()
        # close(2) closes it and says that its server is gone.
        with contextlib.suppress(OSError):
            os.close(status)


def unmount(folder: pathlib.Path) -> None:
    """End it from outside."""
    with mounted.serving(folder, folder / "live", folder / "mnt") as mount:
        subprocess.run(["fusermount3", "-u", mount.mountpoint], check=True)
        assert mount.end() == 0


def kill_the_session(folder: pathlib.Path) -> None:
    """Served behind the native program: what the killed session leaves, the keeper takes away."""
    with mounted.serving(folder, folder / "live", folder / "mnt", datapath="forward") as mount:
        assert mount.disk.read_bytes() == mount.live.read_bytes()
        mount.process.kill()
        wait.until(lambda: not mount.is_mounted(), "nothing is mounted")
        mount.end()


def main() -> None:
    folder = pathlib.Path(sys.argv[1])
    first = mounted.spawn(folder, folder / "live", folder / "mnt")
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
    kill_the_session(folder)
    print("done")


if __name__ == "__main__":
    main()
