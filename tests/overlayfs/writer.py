# SPDX-License-Identifier: Apache-2.0
"""A guest of the race tests: `python writer.py KIND PATH SEED COUNT` writes COUNT times at random.

KIND: `buffered` any offset and length, `direct` whole pages with O_DIRECT, `mapped` through a shared
writable mapping (of a loop device). Stands alone, so that it starts quickly.
"""

import mmap
import os
import random
import sys

PAGE = 4096
LONGEST = 100_000


def main() -> None:
    kind, path, seed, count = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    numbers = random.Random(seed)
    disk = os.open(path, os.O_RDWR | (os.O_DIRECT if kind == "direct" else 0))
    size = os.lseek(disk, 0, os.SEEK_END)
    if kind == "mapped":
        mapping = mmap.mmap(disk, size)
    else:
        buffer = mmap.mmap(-1, 1 << 17)
    for _ in range(count):
        length = numbers.choice([1, 100, 512, PAGE, numbers.randrange(1, LONGEST)])
        start = numbers.randrange(size - length)
        data = numbers.randbytes(length)
        if kind == "mapped":
            mapping[start : start + length] = data
            continue
        if kind == "direct":
            start, length = start // PAGE * PAGE, -(-length // PAGE) * PAGE
            length = min(length, size // PAGE * PAGE - start)
        buffer[: len(data)] = data
        done = os.pwritev(disk, [memoryview(buffer)[:length]], start)
        assert done == length, (start, length, done)
    if kind == "mapped":
        mapping.flush()
    os.fsync(disk)


if __name__ == "__main__":
    main()
