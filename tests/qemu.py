# SPDX-License-Identifier: Apache-2.0
"""The tools the tests judge by: one function each, all of them lists, none through a shell.

Servers are context managers: they answer when the block begins and are gone when it ends.
"""

import contextlib
import json
import os
import pathlib
import shutil
import socket
import subprocess
import tempfile
import urllib.parse
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from tests import wait

Path = str | os.PathLike[str]

# Only a tool that hangs reaches it.
TIMEOUT = 300.0


class ToolFailedError(AssertionError):
    """A tool ended with a status nobody asked for; the text has all it printed."""

    def __init__(self, result: subprocess.CompletedProcess[str]) -> None:
        self.result = result
        super().__init__(
            f"{' '.join(result.args)}\nstatus {result.returncode}\n{result.stdout}{result.stderr}"
        )


def run(*command: Path, status: int = 0, text: str | None = None) -> str:
    """Run a tool to its end and return its stdout; ToolFailedError if it ends otherwise."""
    result = subprocess.run(
        [os.fspath(word) for word in command],
        input=text,
        stdin=subprocess.DEVNULL if text is None else None,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    if result.returncode != status:
        raise ToolFailedError(result)
    return result.stdout


# -- qemu-img and qemu-io ----------------------------------------------------------------------


def img(verb: str, *arguments: Path, status: int = 0) -> str:
    """Run `qemu-img VERB ...`."""
    return run("qemu-img", verb, *arguments, status=status)


def create(
    path: Path,
    size: int,
    format: str = "raw",  # noqa: A002 (qemu-img's own word)
    options: str | None = None,
    backing: tuple[Path, str] | None = None,
) -> None:
    """Create an image of `size` bytes; `options` as for -o, `backing` as (path, format)."""
    extra: list[Path] = [] if options is None else ["-o", options]
    if backing is not None:
        extra += ["-b", backing[0], "-F", backing[1]]
    img("create", "-q", "-f", format, *extra, path, str(size))


def create_encrypted(path: Path, size: int, secret: str, format: str = "luks") -> None:  # noqa: A002
    """Create a LUKS image ("luks", or "qcow2" with LUKS inside) that opens with `secret`.

    Its key derivation times itself, and on a busy machine sometimes sees no CPU time pass at all:
    then it is made again.
    """
    prefix = "" if format == "luks" else "encrypt."
    options = f"{prefix}key-secret=key,{prefix}iter-time=10"
    if format != "luks":
        options += ",encrypt.format=luks"
    key = f"secret,id=key,data={secret}"
    for attempt in range(20):
        try:
            img("create", "-q", "--object", key, "-f", format, "-o", options, path, str(size))
        except ToolFailedError as error:
            if "Unable to get accurate CPU usage" not in str(error) or attempt == 19:
                raise
        else:
            return


def check(path: Path, format: str = "qcow2") -> dict[str, Any]:  # noqa: A002
    """Return `qemu-img check` of a sound image; leaks and corruptions raise."""
    report: dict[str, Any] = json.loads(img("check", "--output=json", "-f", format, path))
    assert not report.get("leaks"), report
    assert not report.get("corruptions"), report
    assert not report.get("check-errors"), report
    return report


def info(path: Path, format: str | None = None) -> dict[str, Any]:  # noqa: A002
    """Return `qemu-img info` as JSON: its text changes between versions."""
    named = [] if format is None else ["-f", format]
    result: dict[str, Any] = json.loads(img("info", "--output=json", *named, path))
    return result


def bitmaps(path: Path) -> list[dict[str, Any]]:
    """Return the persistent bitmaps of a qcow2 as `qemu-img info` lists them."""
    details = info(path, "qcow2").get("format-specific", {}).get("data", {})
    return list(details.get("bitmaps", []))


def convert(
    source: Path,
    target: Path,
    format: str,  # noqa: A002
    source_format: str = "raw",
    options: str | None = None,
) -> None:
    """Write the contents of `source` as a new image."""
    extra = [] if options is None else ["-o", options]
    img("convert", "-f", source_format, "-O", format, *extra, source, target)


def identical(one: Path, other: Path, formats: tuple[str, str] = ("raw", "raw")) -> bool:
    """Return what `qemu-img compare` says of two images' contents (sizes may differ by zeros)."""
    command = ["qemu-img", "compare", "-f", formats[0], "-F", formats[1], str(one), str(other)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    if result.returncode not in (0, 1):
        raise ToolFailedError(result)
    return result.returncode == 0


def io(path: Path, *commands: str, format: str = "raw", options: Sequence[str] = ()) -> str:  # noqa: A002
    """Run qemu-io commands ("write -P 1 0 64k"); it exits 0 after a failed one, we do not."""
    words: list[Path] = ["qemu-io", "-f", format, *options]
    for command in commands:
        words += ["-c", command]
    printed = run(*words, path)
    for sign in ("failed", "Pattern verification", "Input/output error"):
        assert sign not in printed, printed
    return printed


# -- NBD ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def _socket_folder() -> Iterator[pathlib.Path]:
    """A folder of a short name: a socket's path has at most 107 bytes, pytest's may have more."""
    with tempfile.TemporaryDirectory(prefix="posthoc-nbd-", dir="/tmp") as folder:
        yield pathlib.Path(folder)


def uri(path: Path, export: str = "") -> str:
    """Return the NBD URI of a Unix socket."""
    return f"nbd+unix:///{export}?socket={urllib.parse.quote(os.fspath(path))}"


def socket_of(address: str) -> str:
    """Return the socket's path of what uri() made."""
    return urllib.parse.parse_qs(urllib.parse.urlsplit(address).query)["socket"][0]


@contextlib.contextmanager
def _server(command: Sequence[Path], address: pathlib.Path) -> Iterator[subprocess.Popen[str]]:
    """Run a server in the foreground; it listens on `address` when the block begins."""
    words = [os.fspath(word) for word in command]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, text=True
        )

        def listens() -> bool:
            if process.poll() is not None:
                log.seek(0)
                raise AssertionError(f"{' '.join(words)}\nended: {log.read()}")
            # The greeting, not the connection: qemu-nbd 7.2 listens before its main loop runs, and
            # forgets a SIGTERM that comes in between.
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(wait.DEADLINE)
                if client.connect_ex(os.fspath(address)) != 0:
                    return False
                return client.recv(8) == b"NBDMAGIC"

        try:
            wait.until(listens, f"{words[0]} listens on {address}")
            yield process
        finally:
            process.terminate()
            try:
                process.wait(wait.DEADLINE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextlib.contextmanager
def nbd_server(
    path: Path,
    format: str = "raw",  # noqa: A002
    *,
    writable: bool = False,
    bitmap: str | None = None,
    options: Sequence[str] = (),
) -> Iterator[str]:
    """Serve an image by qemu-nbd and yield its URI; `bitmap` adds that dirty bitmap's context."""
    with _socket_folder() as folder:
        address = folder / "s"
        command: list[Path] = ["qemu-nbd", "-t", "--shared=16", "-f", format, "-k", address]
        if not writable:
            command.append("-r")
        if bitmap is not None:
            command += ["-B", bitmap]
        with _server([*command, *options, path], address):
            yield uri(address)


@contextlib.contextmanager
def nbdkit(*arguments: Path, filters: Sequence[str] = ()) -> Iterator[str]:
    """Serve by nbdkit (`nbdkit("file", path, "error-rate=100%", filters=["error"])`); yield the URI."""
    with _socket_folder() as folder:
        address = folder / "s"
        names = [f"--filter={name}" for name in filters]
        with _server(["nbdkit", "-f", "-U", address, *names, *arguments], address):
            yield uri(address)


@contextlib.contextmanager
def nbdfuse(address: str, folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Show an NBD export as a file and yield its path, which lies in `folder` (made here).

    With nbdkit's error filter behind it, that is a file with a bad sector.
    """
    folder.mkdir()
    file = folder / "nbd"
    process = subprocess.Popen(
        ["nbdfuse", str(file), address], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )

    def mounted() -> bool:
        assert process.poll() is None, f"nbdfuse ended with {process.returncode}"
        return os.path.ismount(folder) and file.exists()

    try:
        wait.until(mounted, f"nbdfuse has mounted {folder}")
        yield file
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=False, capture_output=True)
        try:
            process.wait(wait.DEADLINE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def block_status(address: str, context: str = "base:allocation") -> list[dict[str, Any]]:
    """Return the extents of a meta context as nbdinfo prints them: offset, length, type, ..."""
    printed = run("nbdinfo", "--json", f"--map={context}", address)
    result: list[dict[str, Any]] = json.loads(printed)
    return result


def dirty_extents(carrier: Path, name: str = "posthoc") -> list[tuple[int, int]]:
    """Return the (start, length) of the set bits of a qcow2's bitmap, neighbours joined.

    QEMU itself reads the file: qemu-nbd exports the bitmap, nbdinfo shows it.
    """
    extents: list[tuple[int, int]] = []
    with nbd_server(carrier, "qcow2", bitmap=name) as address:
        for row in block_status(address, f"qemu:dirty-bitmap:{name}"):
            if row["type"] & 1:
                start, length = row["offset"], row["length"]
                if extents and sum(extents[-1]) == start:
                    start, length = extents[-1][0], extents.pop()[1] + length
                extents.append((start, length))
    return extents


def dirty_segments(carrier: Path, granularity: int, name: str = "posthoc") -> set[int]:
    """Return the segments that a carrier names, as QEMU reads it."""
    found: set[int] = set()
    for start, length in dirty_extents(carrier, name):
        assert start % granularity == 0
        found.update(range(start // granularity, -(-(start + length) // granularity)))
    return found


# -- block devices and file systems ------------------------------------------------------------


@contextlib.contextmanager
def loop_device(
    path: Path, *, direct: bool = False, read_only: bool = False
) -> Iterator[pathlib.Path]:
    """A block device over a file, which nobody holds any more when the block has ended."""
    if os.geteuid() != 0:
        pytest.skip("a loop device needs root")
    options = ["--direct-io=on"] if direct else []
    if read_only:
        options.append("--read-only")
    device = run("losetup", "--find", "--show", *options, path).strip()
    backing = pathlib.Path("/sys/block", pathlib.Path(device).name, "loop", "backing_file")

    def detached() -> bool:
        # Where udev still looks at it, the kernel detaches it later.
        try:
            return backing.read_text().strip() != os.path.realpath(path)
        except OSError:
            return True

    try:
        yield pathlib.Path(device)
    finally:
        run("losetup", "--detach", device)
        wait.until(detached, f"{device} is detached from {path}")


@contextlib.contextmanager
def mounted(device: Path, folder: pathlib.Path, options: str = "") -> Iterator[pathlib.Path]:
    """Mount a file system on `folder` (made here)."""
    if os.geteuid() != 0:
        pytest.skip("mounting a file system needs root")
    folder.mkdir(exist_ok=True)
    extra = ["-o", options] if options else []
    run("mount", *extra, device, folder)
    try:
        yield folder
    finally:
        run("umount", folder)


@contextlib.contextmanager
def reflinks(folder: pathlib.Path, kind: str = "xfs") -> Iterator[pathlib.Path]:
    """A new file system with reflinks ("xfs" or "btrfs") in `folder` (made here); yield where it is mounted."""
    folder.mkdir(exist_ok=True)
    with open(folder / "disk", "wb") as stream:
        stream.truncate(400 << 20)
    {"xfs": mkfs_xfs, "btrfs": mkfs_btrfs}[kind](folder / "disk")
    with loop_device(folder / "disk") as device, mounted(device, folder / "mnt") as mountpoint:
        yield mountpoint


def reflink(source: Path, target: Path) -> None:
    """Make `target` a copy that shares the source's places."""
    run("cp", "--reflink=always", source, target)


def mkfs_ext4(path: Path, *options: str) -> None:
    """Make an ext4 that is written at once and discards nothing, for the same bytes every time."""
    extended = "nodiscard,lazy_itable_init=0,lazy_journal_init=0"
    run(_sbin("mkfs.ext4"), "-q", "-F", "-E", extended, *options, path)


def fsck_ext4(path: Path) -> None:
    """Check an ext4 and change nothing; any finding raises."""
    run(_sbin("e2fsck"), "-f", "-n", path)


def mkfs_xfs(path: Path, *options: str) -> None:
    run(_sbin("mkfs.xfs"), "-q", "-f", "-K", *options, path)


def mkfs_btrfs(path: Path, *options: str) -> None:
    run(_sbin("mkfs.btrfs"), "-q", "-f", "-K", *options, path)


def _sbin(name: str) -> str:
    """Find a tool that a user's PATH does not show."""
    return shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin") or name
