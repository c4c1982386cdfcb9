# SPDX-License-Identifier: Apache-2.0
"""Pairs of images for the tests of the command."""

import os
import pathlib
import random
from collections.abc import Iterable

SEGMENT = 64 << 10
MIB = 1 << 20


def pair(
    folder: pathlib.Path, size: int = 4 * MIB, changed: Iterable[int] = ()
) -> tuple[pathlib.Path, pathlib.Path]:
    """Make a reference of random bytes, and a live disk that differs in one byte of each `changed` segment."""
    live, reference = folder / "live.raw", folder / "reference.raw"
    content = bytearray(random.Random(size).randbytes(size))
    reference.write_bytes(content)
    for segment in changed:
        content[min(segment * SEGMENT + 77, size - 1)] ^= 0xFF
    live.write_bytes(content)
    return live, reference


def overwrite(path: str | os.PathLike[str], start: int, data: bytes) -> None:
    """Write through an open of its own."""
    with open(path, "r+b", buffering=0) as stream:
        stream.seek(start)
        assert stream.write(data) == len(data)
