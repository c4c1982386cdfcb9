# SPDX-License-Identifier: Apache-2.0
"""qemu-img: what an image's own header says. Only its JSON is read; its text changed in 10.0."""

from __future__ import annotations

import json
import os
import subprocess
from typing import Any, cast

from dirtymap import errors


def command() -> str:
    """Return the name or path of qemu-img, which POSTHOC_QEMU_IMG overrides."""
    return os.environ.get("POSTHOC_QEMU_IMG", "qemu-img")


def info(path: str, driver: str) -> dict[str, Any]:
    """Return what `qemu-img info` says of the image at `path` (absolute), without opening its backing file.

    No lock is taken (-U): whoever opens the image for its contents finds out who holds it. Raises
    ToolError with qemu-img's own words.
    """
    arguments = [command(), "info", "-U", "-f", driver, "--output=json", path]
    try:
        result = subprocess.run(
            arguments, stdin=subprocess.DEVNULL, capture_output=True, check=False
        )
    except OSError:
        raise errors.ToolError(arguments, "is not installed or not in PATH") from None
    if result.returncode != 0:
        raise errors.ToolError(arguments, complaint(os.fsdecode(result.stderr), path))
    return cast("dict[str, Any]", json.loads(os.fsdecode(result.stdout)))


def complaint(stderr: str, path: str) -> str:
    """Return the last line of what a QEMU tool wrote, without its own name and the image's in it."""
    lines = stderr.strip().splitlines() or ["gave no reason"]
    if "Is another process using the image" in lines[-1]:
        return "is in use by another process, perhaps a VM"
    text = lines[-1]
    for prefix in ("qemu-img: ", "qemu-nbd: ", "Could not open ", "Failed to blk_new_open "):
        text = text.removeprefix(prefix)
    return text.removeprefix(f"'{path}'").removeprefix(": ")
