# SPDX-License-Identifier: Apache-2.0
"""A kernel and a static busybox, unpacked from Debian or Ubuntu packages; nothing is installed.

They are kept in .venv/vm, so that only the first run downloads.
"""

import dataclasses
import fcntl
import os
import pathlib
import re
import subprocess
import tempfile
import time

HOME = pathlib.Path(__file__).resolve().parents[2] / ".venv" / "vm"

# Debian's kernel for clouds is the smallest; Ubuntu's usual one has virtio and ext4 built in.
_KERNELS = (r"^linux-image-[0-9][^ ]*-cloud-amd64$", r"^linux-image-[0-9][^ ]*-generic$")

_ATTEMPTS = 3


@dataclasses.dataclass(frozen=True)
class Parts:
    """Where the unpacked pieces are."""

    root: pathlib.Path

    @property
    def kernel(self) -> pathlib.Path:
        return next(self.root.glob("boot/vmlinuz-*"))

    @property
    def modules(self) -> pathlib.Path:
        """The kernel's folder of modules; /lib may be /usr/lib in newer packages."""
        return next(
            folder for lib in ("lib", "usr/lib") for folder in self.root.glob(f"{lib}/modules/*")
        )

    @property
    def busybox(self) -> pathlib.Path:
        places = [self.root / "bin" / "busybox", self.root / "usr" / "bin" / "busybox"]
        return next(path for path in places if path.exists())


def fetch() -> Parts:
    """Return the pieces, downloaded when they are not there yet; RuntimeError if that fails."""
    HOME.mkdir(parents=True, exist_ok=True)
    with (HOME / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        root = HOME / "root"
        if not root.exists():
            _unpack(root)
    return Parts(root)


def _unpack(root: pathlib.Path) -> None:
    """Download and unpack beside `root`, then rename: what is there is whole."""
    with tempfile.TemporaryDirectory(dir=HOME) as scratch:
        folder = pathlib.Path(scratch)
        _download(folder)
        for package in sorted(folder.glob("*.deb")):
            subprocess.run(["dpkg-deb", "--extract", package, folder / "root"], check=True)
        (folder / "root").rename(root)


def _download(folder: pathlib.Path) -> None:
    """Run `apt-get download`, and renew package lists that are missing or old between attempts.

    Old lists name packages that the archive has no more, and then other names are the newest.
    """
    for attempt in range(_ATTEMPTS):
        try:
            command = ["apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", *_names()]
            subprocess.run(command, cwd=folder, check=True)
        except (RuntimeError, subprocess.CalledProcessError):
            if attempt == _ATTEMPTS - 1:
                raise
            time.sleep(5 * attempt)
            administrator = [] if os.geteuid() == 0 else ["sudo"]
            subprocess.run([*administrator, "apt-get", "-qq", "update"], check=False)
        else:
            return


def _names() -> list[str]:
    """Return the packages to download; Ubuntu has its modules in one of their own."""
    kernel = newest_kernel()
    modules = kernel.replace("linux-image-", "linux-modules-")
    return [kernel, "busybox-static", *_search(f"^{re.escape(modules)}$")]


def newest_kernel() -> str:
    """Return the name of the newest kernel package for a virtual machine that apt knows."""
    for pattern in _KERNELS:
        if found := _search(pattern):
            return max(found, key=_numbers)
    raise RuntimeError("apt knows no kernel package for a guest")


def _search(pattern: str) -> list[str]:
    listing = subprocess.run(
        ["apt-cache", "search", "--names-only", pattern], check=True, capture_output=True, text=True
    ).stdout
    return [line.split()[0] for line in listing.splitlines()]


def _numbers(name: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", name)]
