# SPDX-License-Identifier: Apache-2.0
"""Backing files' names as headers have them: where the file is that one means.

    /images/base.raw                                            a path
    file:/images/base.raw   host_device:/dev/vg/base            the same, with QEMU's protocol before it
    json:{"driver": "qcow2", "file": {"driver": "file", "filename": "/images/base.qcow2"}}
    nbd://host/export   json:{"driver": "raw", "file": {"driver": "nbd", ...}}      bytes from elsewhere

A name that is not understood to its last word is refused: behind it QEMU might look for a format, or find
another backing file than the one that was looked at.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

# Protocols of local files, and QEMU's names for what they make of a file's bytes.
_LOCAL = ("file", "host_device")
# Protocols of bytes elsewhere: no format is looked for in those, and nothing is below.
_REMOTE = (
    *("nbd", "ssh", "http", "https", "ftp", "ftps", "iscsi", "rbd", "nfs", "gluster"),
    *("null-co", "null-aio"),
)
# Formats that lie in one file, and whose header alone says what is below.
_FORMATS = (
    *("raw", *_LOCAL),
    *("qcow2", "qcow", "qed", "vmdk", "vdi", "vhdx", "vpc", "luks", "parallels"),
)
# Options of QEMU's that do not change which bytes are read; each also as an option of the file.
_HARMLESS = (
    *("node-name", "read-only", "auto-read-only", "discard", "detect-zeroes"),
    *("cache.direct", "cache.no-flush", "aio"),
)


def stated_format(name: str) -> str | None:
    """Return the format that a backing file's `name` itself states. Raises ValueError as `locate` does."""
    stated = _options(name).get("driver")
    if not isinstance(stated, str | None):
        raise ValueError(name)
    return stated


def locate(name: str, driver: str) -> str | None:
    """Return the absolute path of the backing file `name`, read as the format `driver`.

    None where its bytes come from elsewhere and nothing can be below them. Raises ValueError where what is
    below cannot be told.
    """
    if driver in _REMOTE:
        return None
    options = _options(name)
    if driver in _LOCAL and "filename" in options:
        # The file itself is described, without a format around it.
        options = {f"file.{key}": value for key, value in options.items()}
    protocol, path = options.get("file.driver"), options.get("file.filename")
    if driver == "raw" and protocol in _REMOTE:
        return None
    understood = {"driver", "file.driver", "file.filename"}
    understood.update(_HARMLESS, (f"file.{word}" for word in _HARMLESS))
    if (
        driver in _FORMATS
        and protocol in (None, *_LOCAL)
        and options.keys() <= understood
        and isinstance(path, str)
        # What QEMU would look for in its current folder, which changes.
        and path.startswith("/")
    ):
        return os.path.abspath(path)
    raise ValueError(name)


def _options(name: str) -> dict[str, Any]:
    """Return what `name` says, as QEMU's options with dots between a node's name and its own."""
    scheme, colon, rest = name.partition(":")
    if scheme == "json" and colon:
        described = json.loads(rest)
        if not isinstance(described, dict):
            raise ValueError(name)
        return dict(_flat(described))
    if name.startswith("/"):
        return {"file.filename": name}
    if scheme in _LOCAL:
        return {"file.driver": scheme, "file.filename": rest}
    # nbd+unix and gluster+tcp are nbd and gluster.
    return {"file.driver": scheme.partition("+")[0]}


def _flat(options: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in options.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
