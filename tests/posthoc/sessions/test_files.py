# SPDX-License-Identifier: Apache-2.0
"""The files beside the disk: what an opener costs the session."""

import pytest
import trio

from dirtymap import bitmap
from dirtymap.qcow2 import carrier
from posthoc.sessions import files


async def test_an_opener_takes_one_snapshot_and_a_look_takes_none() -> None:
    """Every stat(2) of the status made all of it anew, bitmaps and all."""
    made = 0

    async def make() -> str:
        nonlocal made
        made += 1
        return "state: complete\n" * made

    report = files.Report("status", make)
    assert report.length() > 0
    assert made == 0
    content = await report.open()
    assert report.length() == content.length == 16
    assert made == 1
    assert content.read(0, 100) == b"state: complete\n"
    await report.open()
    assert content.read(0, 100) == b"state: complete\n"


async def test_a_map_is_made_beside_the_event_loop() -> None:
    """The guest's requests are answered while a large map is copied."""
    held, asked = trio.Event(), trio.Event()

    def make() -> carrier.Carrier:
        trio.from_thread.run_sync(asked.set)
        trio.from_thread.run(held.wait)
        return carrier.Carrier(carrier.layout(1 << 20, 512), bitmap.Bitmap(1 << 20, 512).data)

    dirty = files.DirtyMap(make, 1000)
    assert dirty.length() == 1000
    async with trio.open_nursery() as nursery:
        nursery.start_soon(dirty.open)
        await asked.wait()
        held.set()


async def test_both_are_for_reading() -> None:
    async def make() -> str:
        return ""

    for file in (files.Report("status", make), files.DirtyMap(lambda: None, 1)):  # type: ignore[arg-type, return-value]
        with pytest.raises(OSError, match="reading only"):
            file.write(b"x")
