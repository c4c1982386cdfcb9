# SPDX-License-Identifier: Apache-2.0
"""A kernel and a static busybox, unpacked from Debian or Ubuntu packages; nothing is installed.

They are kept in .venv/vm, so that only the first run downloads.
"""

import dataclasses
import fcntl
import pathlib
import re
import shutil
import subprocess
import tempfile
import time

HOME = pathlib.Path(__file__).resolve().parents[2] / ".venv" / "vm"

# Debian's kernel for clouds is the smallest; Ubuntu's usual one has virtio and ext4 built in.
_KERNELS = (r"^linux-image-[0-9][^ ]*-cloud-amd64$", r"^linux-image-[0-9][^ ]*-generic$")


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
    kernel = newest_kernel()
    names = [kernel, "busybox-static"]
    modules = kernel.replace("linux-image-", "linux-modules-")
    if _search(f"^{re.escape(modules)}$"):
        names.append(modules)
    # Where apt's own user may write, or it complains of every file.
    with tempfile.TemporaryDirectory(dir=HOME) as scratch:
        folder = pathlib.Path(scratch)
        folder.chmod(0o755)
        _download(names, folder)
        for package in sorted(folder.glob("*.deb")):
            subprocess.run(["dpkg-deb", "--extract", package, folder / "root"], check=True)
        (folder / "root").rename(root)


def newest_kernel() -> str:
    """Return the name of the newest kernel package for a virtual machine that apt knows."""
    for pattern in _KERNELS:
        if found := _search(pattern):
            return max(found, key=_numbers)
    raise RuntimeError("apt knows no kernel package: run apt-get update")


def _search(pattern: str) -> list[str]:
    listing = subprocess.run(
        ["apt-cache", "search", "--names-only", pattern], check=True, capture_output=True, text=True
    ).stdout
    return [line.split()[0] for line in listing.splitlines()]


def _numbers(name: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", name)]


def _download(names: list[str], folder: pathlib.Path) -> None:
    """Run `apt-get download`; package lists that are old or missing are renewed between attempts."""
    for attempt in range(3):
        command = ["apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", *names]
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if result.returncode == 0:
            return
        time.sleep(5 * attempt)
        update = [*([] if not shutil.which("sudo") else ["sudo"]), "apt-get", "-qq", "update"]
        subprocess.run(update, check=False, capture_output=True)
    raise RuntimeError(f"{' '.join(command)}: {result.stderr.strip()}")
