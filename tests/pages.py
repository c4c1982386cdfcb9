# SPDX-License-Identifier: Apache-2.0
"""Which pages of a file are in the page cache, as mincore(2) says."""

import mmap
import pathlib

from dirtymap.images import pagecache


def resident(path: pathlib.Path) -> set[int]:
    """Return the numbers of the pages of `path` that are cached."""
    with open(path, "rb") as stream:
        residency = pagecache._Residency(stream.fileno())
        pages = residency.pages(0, -(-path.stat().st_size // mmap.PAGESIZE))
        residency.close()
    return {number for number, page in enumerate(pages) if page & 1}
