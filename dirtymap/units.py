# SPDX-License-Identifier: Apache-2.0
"""Sizes as people write and read them: 64K, 100M, 1T, in powers of 1024."""

import re

from dirtymap import errors

KIB, MIB, GIB, TIB = (1 << bits for bits in (10, 20, 30, 40))

# A segment's size: QEMU's bitmaps begin at a sector; above 2 MiB a map says too little to be useful.
SMALLEST_GRANULARITY = 512
LARGEST_GRANULARITY = 2 * MIB
DEFAULT_GRANULARITY = 64 * KIB

_SUFFIXES = "KMGTPE"
_SIZE = re.compile(r"(\d{1,20})(?:([KMGTPE])(?:i?B)?)?", re.IGNORECASE | re.ASCII)


def parse_size(text: str) -> int:
    """Return the bytes that `text` names: digits, then K, M, G, T, P or E (1024), or nothing."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise errors.UserError(
            f"{text!r} is not a size: write bytes, or a number with K, M, G or T"
        )
    digits, suffix = match.groups()
    size = int(digits) << (10 * (_SUFFIXES.index(suffix.upper()) + 1) if suffix else 0)
    if size >= 1 << 63:
        raise errors.UserError(f"{text!r} is more than a disk can hold")
    return size


def check_granularity(granularity: int) -> int:
    """Return `granularity` if it is a power of two from 512 bytes to 2 MiB, else raise UserError."""
    within = SMALLEST_GRANULARITY <= granularity <= LARGEST_GRANULARITY
    if not within or granularity & (granularity - 1):
        raise errors.UserError(
            f"a granularity of {granularity} is not possible: it is a power of two, 512 to 2M"
        )
    return granularity


def human(size: float) -> str:
    """Return `size` bytes as people read it: '512 B', '64.0 KiB', '1.5 TiB'."""
    if size < KIB:
        return f"{size:.0f} B"
    for suffix in _SUFFIXES:
        size /= 1024
        # 1023.95 would be shown as 1024.0 of the smaller unit.
        if size < 1023.95 or suffix == _SUFFIXES[-1]:
            return f"{size:.1f} {suffix}iB"
    raise AssertionError("the last suffix always returns")


def describe(size: int) -> str:
    """Return `size` in bytes with the human form behind it: '65536 (64.0 KiB)'."""
    return f"{size} ({human(size)})"
