# SPDX-License-Identifier: Apache-2.0
"""Images of every format QEMU knows, through a qemu-nbd of ours that dies with us.

    open_image ── chain ── qemu-nbd -k FOLDER/nbd ── export.NbdImage
                           in a folder of mode 0700, so that nobody else reads the guest's disk

Every layer's driver is said on its command line (chain.py): nothing is probed. QEMU's own image locks
hold: an image in use by a VM is refused, with QEMU's words. A raw backing file it leaves to writers, as one
who exports it can share it; that one is locked here (lock.py).
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dirtymap import errors
from dirtymap.images import chain, child, export, lock, mapped, nbd, private, qemu_img

if TYPE_CHECKING:
    from dirtymap import images

# Seconds until it answers, and until it has ended: a writable image's metadata has to be written then.
_START_PATIENCE = 60.0
_STOP_PATIENCE = 10.0
_STOP_PATIENCE_WRITABLE = 120.0
# Connections it accepts: ours, and those that are lost but not yet noticed by it.
_SHARED = 64
# Layers whose bytes are the disk's: without metadata, which QEMU would lock for its own sake.
_PLAIN = ("raw", "file", "host_device")


class Server:
    """A running qemu-nbd that exports one chain of files. The caller stops it."""

    def __init__(
        self, layers: Sequence[chain.Layer], secrets: Sequence[str], *, writable: bool
    ) -> None:
        self.layers = tuple(layers)
        self._writable = writable
        self._locks = contextlib.ExitStack()
        self._folder = private.Folder()
        try:
            for layer in layers:
                if layer.path is not None and layer.driver in _PLAIN:
                    self._locks.callback(os.close, lock.hold(layer.path))
            socket = os.path.join(self._folder.path, "nbd")
            self.uri = nbd.uri(socket)
            # One that is written to is told to end, and writes its metadata first.
            death = signal.SIGTERM if writable else signal.SIGKILL
            self.child = child.Child(
                _command(socket, layers, secrets, writable=writable),
                os.path.join(self._folder.path, "stderr"),
                death,
            )
        except BaseException:
            self._locks.close()
            self._folder.remove()
            raise

    def is_alive(self) -> bool:
        """Whether it still runs."""
        return not self.child.has_ended()

    def stop(self) -> None:
        """End it, cleanly where it writes, and remove its folder. May be called more than once."""
        self.child.stop(_STOP_PATIENCE_WRITABLE if self._writable else _STOP_PATIENCE)
        self._locks.close()
        self._folder.remove()


def open_image(
    spec: str, driver: str, path: str, *, writable: bool, options: images.Options
) -> export.NbdImage:
    """Open the image at `path` of the format `driver`; the caller closes it. Raises ImageError."""
    nbd.require_binding()
    layers = chain.layers(spec, path, driver)
    choices = _secrets(spec, sum(layer.encrypted for layer in layers), options.secrets)
    for last, secrets in enumerate(choices, 1 - len(choices)):
        try:
            return _open(spec, path, layers, secrets, writable=writable, options=options)
        except errors.ImageError as error:
            # QEMU's words for a passphrase that opens none of the key slots.
            if last == 0 or "Invalid password" not in error.reason:
                raise
    raise AssertionError("the last choice returns or raises")


def _secrets(spec: str, encrypted: int, secrets: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Return what to try, each the secrets of the encrypted layers from the top down.

    One for each layer where there are as many, else each for all of them.
    """
    if not encrypted:
        return [()]
    if not secrets:
        raise errors.ImageError(spec, "is encrypted: name the file with its passphrase (--secret)")
    for path in secrets:
        if not os.access(path, os.R_OK):
            raise errors.ImageError(spec, f"the secret's file {path} is missing or not readable")
    each: list[tuple[str, ...]] = [(path,) for path in secrets]
    return [secrets, *each] if len(secrets) == encrypted > 1 else each


def _open(
    spec: str,
    path: str,
    layers: Sequence[chain.Layer],
    secrets: tuple[str, ...],
    *,
    writable: bool,
    options: images.Options,
) -> export.NbdImage:
    server = Server(layers, secrets, writable=writable)
    try:
        address = nbd.Address(server.uri, contexts=(nbd.BASE_ALLOCATION, nbd.ALLOCATION_DEPTH))
        _wait_until_ready(spec, path, server, address)
        image = export.open_export(
            spec,
            address,
            writable=writable,
            connections=options.connections,
            kind=None if writable else mapped.MappedImage,
        )
        image.server = server
        if isinstance(image, mapped.MappedImage) and not options.read_all:
            image.use_map(layers)
    except BaseException:
        server.stop()
        raise
    return image


def _wait_until_ready(spec: str, path: str, server: Server, address: nbd.Address) -> None:
    deadline = time.monotonic() + _START_PATIENCE
    while True:
        try:
            nbd.Connection(address).close()
            return
        except nbd.LostError as error:
            if server.child.has_ended(0.01):
                reason = qemu_img.complaint(server.child.complaint(), os.path.abspath(path))
                raise errors.ImageError(spec, reason) from None
            if time.monotonic() >= deadline:
                raise errors.ImageError(spec, f"qemu-nbd does not answer: {error}") from None


def _command(
    socket: str, layers: Sequence[chain.Layer], secrets: Sequence[str], *, writable: bool
) -> list[str]:
    program = os.environ.get("POSTHOC_QEMU_NBD", "qemu-nbd")
    ids = [f"secret{number}" for number in range(len(secrets))]
    command = [program, "-k", socket, "-t", f"--shared={_SHARED}", "--allocation-depth"]
    for identifier, path in zip(ids, secrets, strict=True):
        file = chain.escape(os.path.abspath(path))
        command += ["--object", f"secret,id={identifier},file={file}"]
    if writable:
        # What the guest discards is discarded; what it writes is written, zeros too.
        command += ["--cache=writeback", "--discard=unmap", "--detect-zeroes=off"]
    else:
        command.append("--read-only")
    return [*command, "--image-opts", chain.image_options(layers, ids)]
