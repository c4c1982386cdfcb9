# SPDX-License-Identifier: Apache-2.0
"""The files that a QEMU has open, and reading a raw disk's beside it.

A name that QEMU tells is one of its own: it may have been started in another folder and see other mounts,
the file may have been renamed since and another be in its place. What it writes is what it has open
(proc(5), /proc/PID/fd), and that is the same file under whatever name.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import stat
from collections.abc import Iterator
from dataclasses import dataclass

from dirtymap import errors
from dirtymap.images import base, export, file
from dirtymap.qcow2 import carrier
from posthoc.qemu import qmp, survey

Identity = tuple[int, int, int]


@dataclass(frozen=True)
class Opened:
    """An open file: `path` opens it again, whatever became of its name."""

    path: str
    identity: Identity
    writable: bool


def files(peer: qmp.Peer | None) -> list[Opened]:
    """Return the files and block devices that QEMU has open; UserError where that cannot be seen."""
    if peer is None:
        raise errors.UserError(
            "QEMU's process cannot be seen from here: it runs on another host or in another container"
        )
    process = pathlib.Path(f"/proc/{peer.pid}")
    try:
        numbers = os.listdir(process / "fd")
    except OSError as error:
        raise errors.UserError(
            f"the files of QEMU (process {peer.pid}) cannot be seen: {errors.reason(error)}"
        ) from error
    found = (_opened(process, number) for number in numbers)
    return [opened for opened in found if opened is not None]


def _opened(process: pathlib.Path, number: str) -> Opened | None:
    """Return an open file; None for what is none, or is closed at this moment."""
    path = str(process / "fd" / number)
    with contextlib.suppress(OSError):
        mode = os.stat(path).st_mode
        if stat.S_ISREG(mode) or stat.S_ISBLK(mode):
            return Opened(path, _identity(path), _is_writable(process / "fdinfo" / number))
    return None


def _is_writable(path: pathlib.Path) -> bool:
    fields = (line.split() for line in path.read_text().splitlines())
    flags = next(int(field[1], 8) for field in fields if field[0] == "flags:")
    return flags & os.O_ACCMODE != os.O_RDONLY


def _identity(path: str) -> Identity:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        return file.identity(descriptor)
    finally:
        os.close(descriptor)


def writes(peer: qmp.Peer | None, image: base.Image) -> bool:
    """Return whether QEMU has a file of `image` open for writing; UserError where that cannot be seen."""
    written = {opened.identity for opened in files(peer) if opened.writable}
    return not written.isdisjoint(_files_of(image))


def _files_of(image: base.Image) -> Iterator[Identity]:
    if isinstance(image, file.FileImage):
        yield file.identity(image.fd)
    elif isinstance(image, export.NbdImage) and image.server is not None:
        for layer in image.server.layers:
            if layer.path is not None:
                with contextlib.suppress(OSError):
                    yield _identity(layer.path)


def open_raw(node: survey.Node, peer: qmp.Peer | None) -> file.FileImage:
    """Open the raw file or device that is `node` for reading; the caller closes it. Raises UserError.

    Without QEMU's locks, which would refuse: that QEMU writes is known, and recorded.
    """
    if node.driver not in ("raw", "file", "host_device"):
        raise errors.UserError(
            f"{node.name} is {node.driver}: only a raw disk can be read beside its QEMU"
        )
    path = _path_of(node, peer)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise errors.ImageError(
            node.filename, f"cannot be read beside QEMU: {errors.reason(error)}"
        ) from error
    size = os.lseek(descriptor, 0, os.SEEK_END)
    if carrier.virtual_size(size) != node.size:
        os.close(descriptor)
        raise errors.UserError(
            f"{node.name} is not the whole of {node.filename} (an offset or a size is set): it cannot be "
            "read beside its QEMU"
        )
    return file.FileImage(node.filename, descriptor, size, writable=False)


def _path_of(node: survey.Node, peer: qmp.Peer | None) -> str:
    """Return what opens the file that QEMU has open for `node`, whose name is looked up as QEMU would."""
    seen = files(peer)
    assert peer is not None
    start = "root" if os.path.isabs(node.filename) else "cwd"
    with contextlib.suppress(OSError):
        meant = _identity(f"/proc/{peer.pid}/{start}/{node.filename}")
        for opened in seen:
            if opened.identity == meant:
                return opened.path
    raise errors.UserError(
        f"{node.name}: {node.filename} is not a file that QEMU has open (process {peer.pid}): it was "
        "renamed or replaced, or another program stands before QEMU's monitor"
    )
