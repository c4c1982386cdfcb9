# SPDX-License-Identifier: Apache-2.0
"""Processes that write to a mounted disk, as a test harness of a user's would: `python -m tests.scenarios.harness`.

    harness.py DISK SIZE SEED COUNT KIND        KIND: pwrite, direct, mmap

Every write lands somewhere random, most small, some large, some of what is there already.
"""

import mmap
import os
import random
import sys

_PAGE = 4096


def offsets(rng: random.Random, size: int, align: int) -> tuple[int, int]:
    """Return a random (start, length) within the disk, both multiples of `align`."""
    longest = rng.choice([align, 2 * align, 8192, 65536, 300_000])
    length = max(align, rng.randrange(1, longest + 1) // align * align)
    start = rng.randrange(0, size - length + 1) // align * align
    return start, length


def write(disk: str, size: int, seed: int, count: int, kind: str) -> None:
    """Make `count` writes; an error ends the process with a traceback."""
    rng = random.Random(seed)
    flags = os.O_RDWR | (os.O_DIRECT if kind == "direct" else 0)
    fd = os.open(disk, flags)
    aligned = mmap.mmap(-1, 1 << 20)
    mapped = mmap.mmap(fd, size) if kind == "mmap" else None
    for _ in range(count):
        start, length = offsets(rng, size, _PAGE if kind == "direct" else 1)
        data = rng.randbytes(length)
        if mapped is not None:
            mapped[start : start + length] = data
        elif kind == "direct":
            aligned[:length] = data
            done = os.pwritev(fd, [memoryview(aligned)[:length]], start)
            assert done == length
        else:
            assert os.pwrite(fd, data, start) == length
    if mapped is not None:
        mapped.flush()
        mapped.close()
    os.fsync(fd)
    os.close(fd)


if __name__ == "__main__":
    name, size, seed, count, kind = sys.argv[1:]
    write(name, int(size), int(seed), int(count), kind)
