# SPDX-License-Identifier: Apache-2.0
"""Images by their name on the command line.

    PATH                        a raw file or a block device
    qcow2:PATH  vmdk: vdi: ...  that format
    nbd://HOST/EXPORT           an NBD export; nbds:// with TLS, nbd+unix:///EXPORT?socket=PATH

A format is what the user says it is and never guessed: a raw disk's bytes are the guest's, who could
otherwise make itself read any file of the host by writing a header that names it as its backing file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass

from dirtymap import errors
from dirtymap.images import base, chain, digest, export, fidx, file, nbd, qemu_nbd


@dataclass(frozen=True)
class Options:
    """How to reach images: secrets, connections, TLS; the same for both sides."""

    secrets: tuple[str, ...] = ()
    connections: int | None = None
    read_all: bool = False
    tls_certificates: str | None = None
    tls_psk: str | None = None
    tls_user: str | None = None


DEFAULTS = Options()

Opener = Callable[[str, bool, Options], base.Image]

_SCHEME = re.compile(r"([a-z][a-z0-9+]*):(.*)", re.DOTALL)


def _open_raw(spec: str, writable: bool, _: Options) -> base.Image:
    return file.open_file(split(spec)[1], writable=writable)


def _open_export(spec: str, writable: bool, options: Options) -> base.Image:
    address = nbd.Address.of(spec, options)
    return export.open_export(spec, address, writable=writable, connections=options.connections)


def _open_format(spec: str, writable: bool, options: Options) -> base.Image:
    driver, path = split(spec)
    return qemu_nbd.open_image(spec, driver, path, writable=writable, options=options)


FORMATS = ("qcow2", "vmdk", "vdi", "vhdx", "vpc", "luks")
EXPORTS = ("nbd", "nbds", "nbd+unix", "nbds+unix")

# scheme -> what opens the whole specification, for reading or for writing.
OPENERS: dict[str, Opener] = {
    "raw": _open_raw,
    **dict.fromkeys(FORMATS, _open_format),
    **dict.fromkeys(EXPORTS, _open_export),
}

# Ending of the name -> what opens a reference of which only hashes are left.
HASHES: dict[str, Callable[[str], base.Image]] = {
    digest.SUFFIX: digest.open_digest,
    fidx.SUFFIX: fidx.open_index,
}


def split(spec: str) -> tuple[str, str]:
    """Return (scheme, rest) of an image's name; a name without a scheme is a raw image's path.

    A path with a colon is written with a slash before it (./a:b), as everywhere.
    """
    match = _SCHEME.fullmatch(spec)
    if match is None:
        return "raw", spec
    scheme, rest = match.groups()
    if scheme not in OPENERS:
        known = ", ".join(f"{name}:" for name in sorted(OPENERS))
        raise errors.ImageError(
            spec, f"{scheme}: is no image format known here ({known}); a file is written ./{spec}"
        )
    return scheme, rest


def open(  # noqa: A001 (read as images.open)
    spec: str, *, writable: bool = False, options: Options = DEFAULTS
) -> base.Image:
    """Open the image that `spec` names; the caller closes it. Raises ImageError."""
    if "\0" in spec:
        raise errors.ImageError(repr(spec), "is no name of a file")
    scheme, _ = split(spec)
    return OPENERS[scheme](spec, writable, options)


def open_reference(spec: str, *, options: Options = DEFAULTS) -> base.Image:
    """Open what stands as a reference: any image, or the hashes of one. The caller closes it.

    PATH.digest is a manifest (posthoc digest), PATH.fidx an index of Proxmox Backup Server; a raw disk of such
    a name is written raw:PATH. Raises ImageError.
    """
    for suffix, opener in HASHES.items():
        if spec.endswith(suffix) and not _SCHEME.fullmatch(spec):
            return opener(spec)
    return open(spec, options=options)


def path(spec: str) -> str | None:
    """Return the absolute path of the file that `spec` names, or None where it names none."""
    scheme, rest = split(spec)
    return None if scheme.startswith("nbd") else os.path.abspath(rest)


def layers(spec: str) -> list[chain.Layer]:
    """Return the chain of the image of a format that `spec` names, top first; none for others.

    Raises ImageError.
    """
    scheme, rest = split(spec)
    return chain.layers(spec, rest, scheme) if scheme in FORMATS else []


def same_file(one: str, other: str) -> bool:
    """Return whether two names surely or possibly mean bytes of one file, also behind loop devices.

    What cannot be opened here is told as such by `open`.
    """
    paths = path(one), path(other)
    fds: list[int] = []
    try:
        for where in paths:
            if where is None:
                return False
            fds.append(os.open(where, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
        return file.identity(fds[0]) == file.identity(fds[1])
    except OSError:
        return False
    finally:
        for fd in fds:
            os.close(fd)
