# SPDX-License-Identifier: Apache-2.0
"""qemu-img, where QEMU itself has to write: one function a verb. POSTHOC_QEMU_IMG names another.

Formats are always named, never probed. Paths are made absolute: qemu-img reads a relative "a:b" as a
protocol. Only JSON is parsed: its text changed in version 10.0.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dirtymap import errors

_CORRUPT, _LEAKS = 2, 3  # exit codes of `qemu-img check` that come with a report


@dataclass(frozen=True)
class Info:
    """What `qemu-img info` says of an image."""

    virtual_size: int  # bytes
    cluster_size: int  # bytes; 0 for a raw image
    details: dict[str, Any]  # what is particular to the format

    @property
    def bitmaps(self) -> list[str]:
        """The names of the persistent bitmaps, inconsistent ones included."""
        return [bitmap["name"] for bitmap in self.details.get("bitmaps", [])]

    @property
    def holds_bitmaps(self) -> bool:
        """Whether the image can hold persistent bitmaps: a qcow2 of version 3."""
        return bool(self.details.get("compat", "0.10") != "0.10")


@dataclass(frozen=True)
class Check:
    """What `qemu-img check` found."""

    corruptions: int
    end: int  # bytes of the image's file in use


def info(path: str, image_format: str) -> Info:
    """Ask for an image's size and bitmaps. Raises ToolError, also when a running QEMU has it."""
    found = json.loads(_run("info", "--output=json", "-f", image_format, os.path.abspath(path)))
    details = found.get("format-specific", {}).get("data", {})
    return Info(found["virtual-size"], found.get("cluster-size", 0), details)


def check(path: str) -> Check:
    """Check a qcow2's metadata, which reads all of them. Raises ToolError."""
    words = ("check", "--output=json", "-f", "qcow2", os.path.abspath(path))
    found = json.loads(_run(*words, accepted=(0, _CORRUPT, _LEAKS)))
    bad = found.get("corruptions", 0) + found.get("check-errors", 0)
    return Check(bad, found.get("image-end-offset", 0))


def bitmap(path: str, name: str, *actions: str) -> None:
    """Change the bitmap `name` of a qcow2; the actions happen in their order. Raises ToolError.

    QEMU 7.2 exits 0 although it could not save the bitmaps: the caller looks at what is there.
    Killed while it has the image open it would leave all of them inconsistent: it never is.
    """
    with _interrupts_held_back():
        _run("bitmap", "-f", "qcow2", *actions, "--", os.path.abspath(path), name)


def create(path: str, size: int, options: dict[str, str]) -> None:
    """Make a qcow2. Raises ToolError."""
    _run("create", "-q", "-f", "qcow2", "-o", _joined(options), os.path.abspath(path), str(size))


def amend(path: str, options: dict[str, str]) -> None:
    """Change a qcow2's options. Raises ToolError."""
    _run("amend", "-q", "-f", "qcow2", "-o", _joined(options), os.path.abspath(path))


def _joined(options: dict[str, str]) -> str:
    """Options as -o takes them: a comma within a value is written twice."""
    return ",".join(f"{key}={value.replace(',', ',,')}" for key, value in options.items())


def _run(*arguments: str, accepted: tuple[int, ...] = (0,)) -> str:
    """Run qemu-img to its end and return its stdout."""
    command = [os.environ.get("POSTHOC_QEMU_IMG", "qemu-img"), *arguments]
    try:
        result = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            encoding="utf-8",
            errors="replace",
            env={**os.environ, "LC_ALL": "C"},
            process_group=0,  # a Ctrl-C in the terminal is ours to deal with
        )
    except FileNotFoundError:
        raise errors.ToolError(command, "is not installed (Debian: qemu-utils)") from None
    except (OSError, ValueError) as error:
        raise errors.ToolError(command, errors.reason(error)) from error
    if result.returncode not in accepted:
        raise errors.ToolError(command, _one_line(result.stderr, result.returncode))
    return result.stdout


@contextlib.contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Let a Ctrl-C wait for the block's end; then it is the KeyboardInterrupt that it would be.

    Handlers run in the main thread whichever thread gets the signal, so there is none in others.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: arrived.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if arrived:
            raise KeyboardInterrupt


def _one_line(complaint: str, status: int) -> str:
    lines = [line.strip().removeprefix("qemu-img: ") for line in complaint.splitlines()]
    said = "; ".join(line for line in lines if line) or f"exit code {status}"
    if "lock" in said and "Is another process using" in said:
        return f"the image is in use, by a running QEMU or another program ({said})"
    return said
