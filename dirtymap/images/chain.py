# SPDX-License-Identifier: Apache-2.0
"""The files that an image consists of: itself, its backing file, that one's, and so on.

    layers[0]  overlay.qcow2   what the user named, of the format the user named
    layers[1]  middle.qcow2    named, with its format, by the header of the one above
    layers[2]  base.raw

A format that no header states would be probed by QEMU, and a raw backing file's bytes are a guest's: it
could name any file of the host as its own backing file. Such a chain is refused, and so is one of which not
every layer's file is known (backing.py).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dirtymap import errors
from dirtymap.images import backing as backings
from dirtymap.images import qemu_img

# Deeper than any chain in use; a chain that refers to itself ends here.
_DEEPEST = 200

Identity = tuple[str, int, int]


@dataclass(frozen=True)
class Layer:
    """One file of a chain. `path` and `identity` are None where it is not a plain file or device."""

    path: str | None
    driver: str
    size: int
    encrypted: bool
    identity: Identity | None
    data_files: tuple[str, ...] = ()
    """Where its data is, if not in itself (qcow2's external data file, a vmdk's extents)."""
    cluster: int | None = None
    """Bytes in which it allocates, where it does."""

    def is_same(self, other: Layer) -> bool:
        """Return whether both are the same file, read in the same way."""
        return (
            self.identity is not None
            and self.identity == other.identity
            and self.driver == other.driver
        )


def identity(path: str) -> Identity | None:
    """Return what all names of the file or block device at `path` have in common."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    if stat.S_ISBLK(status.st_mode):
        return ("device", status.st_rdev, 0)
    return ("file", status.st_dev, status.st_ino)


def layers(name: str, path: str, driver: str) -> list[Layer]:
    """Return the chain of the image at `path`, top first. Raises ImageError about `name`."""
    found: list[Layer] = []
    next_path: str | None = os.path.abspath(path)
    while next_path is not None:
        if len(found) == _DEEPEST:
            raise errors.ImageError(name, f"has a chain of more than {_DEEPEST} backing files")
        information = _information(name, next_path, driver)
        found.append(
            Layer(
                next_path,
                driver,
                information["virtual-size"],
                bool(information.get("encrypted")) or driver == "luks",
                identity(next_path),
                data_files=_data_files(information),
                cluster=information.get("cluster-size"),
            )
        )
        below = _below(name, next_path, driver, information)
        if below is None:
            break
        next_path, driver = below
        if next_path is None:
            found.append(Layer(None, driver, found[-1].size, encrypted=False, identity=None))
    return found


def _information(name: str, path: str, driver: str) -> dict[str, Any]:
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        return qemu_img.info(path, driver)
    except OSError as error:
        at = "" if path == os.path.abspath(name.partition(":")[2]) else f"its backing file {path} "
        reason = errors.reason(error)
        raise errors.ImageError(name, f"{at}cannot be opened: {reason}") from None
    except errors.ToolError as error:
        if error.reason.startswith("is not installed"):
            raise
        raise errors.ImageError(name, error.reason) from None


def _data_files(information: dict[str, Any]) -> tuple[str, ...]:
    details = information.get("format-specific", {}).get("data", {})
    names = [extent["filename"] for extent in details.get("extents", ())]
    if "data-file" in details:
        names.append(details["data-file"])
    # Unlike a backing file's, a relative name is looked for in the current folder (bdrv_open_child()).
    return tuple(os.path.abspath(name) for name in names if name != information["filename"])


def _below(
    name: str, path: str, driver: str, information: dict[str, Any]
) -> tuple[str | None, str] | None:
    """Return (path, driver) of the backing file, None without one; path None where its bytes are elsewhere."""
    backing = information.get("full-backing-filename") or information.get("backing-filename")
    if not backing:
        return None
    try:
        # A vmdk's parent is a vmdk, though its header does not say so (VMware's format, "parentFileNameHint").
        below = (
            information.get("backing-filename-format")
            or ("vmdk" if driver == "vmdk" else None)
            or backings.stated_format(backing)
        )
        if below is not None:
            return backings.locate(backing, below), below
    except ValueError:
        raise errors.ImageError(
            name,
            f"{path} names the backing file {backing} in a way that does not tell what is below it: "
            f"name it by its path with qemu-img rebase -u -b PATH -F FORMAT {path}",
        ) from None
    raise errors.ImageError(
        name,
        f"{path} names the backing file {backing} without its format, which is never guessed: "
        f"state it with qemu-img rebase -u -b {backing} -F FORMAT {path}",
    )


def image_options(chain: Sequence[Layer], secrets: Sequence[str]) -> str:
    """Return QEMU's image options for `chain`: every layer's driver, every encrypted one's secret's id.

    `secrets` are the ids for the encrypted layers from the top down; the last stands for all further ones.
    """
    ids = list(secrets)
    options = [f"file.filename={escape(chain[0].path or '')}"]
    for depth, layer in enumerate(chain):
        if layer.path is None:
            break  # what it is, its own name says
        prefix = "backing." * depth
        options.append(f"{prefix}driver={layer.driver}")
        if layer.encrypted and ids:
            key = "key-secret" if layer.driver == "luks" else "encrypt.key-secret"
            options.append(f"{prefix}{key}={ids.pop(0) if len(ids) > 1 else ids[0]}")
    return ",".join(options)


def escape(text: str) -> str:
    """Return `text` as a value in QEMU's key=value lists."""
    return text.replace(",", ",,")
