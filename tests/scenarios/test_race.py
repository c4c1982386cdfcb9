# SPDX-License-Identifier: Apache-2.0
"""Writes while the scan runs: before its cursor, in it, behind it.

Several processes write through the mount while a slowed scan goes over the disk; at the end the map must have every
segment in which the images differ, judged by a comparison that uses none of our code. The scan is let run to its
end only when the writers are done, so that each of them has met it.
"""

import os
import pathlib
import subprocess
import sys
from collections.abc import Mapping

import pytest

from dirtymap import state
from tests import builds, command, oracle, qemu
from tests.posthoc import images
from tests.posthoc.images import MIB

Path = pathlib.Path

WRITES = 700


def writer(
    disk: Path, size: int, seed: int, kind: str, writes: int = WRITES
) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [
            *[sys.executable, "-m", "tests.scenarios.harness"],
            *[str(disk), str(size), str(seed), str(writes), kind],
        ],
        env=command.environment(),
    )


@pytest.mark.parametrize("granularity", [512, 4096, 65536, 2 * MIB])
def test_no_segment_is_missed(
    tmp_path: Path, mountpoint: Path, datapath: str, granularity: int
) -> None:
    race(tmp_path, mountpoint, datapath, granularity)


@pytest.mark.parametrize(
    ("variant", "granularity"),
    [("faults", 512), ("faults", 65536), ("thread", 4096), ("address", 4096)],
)
def test_no_segment_is_missed_where_writes_linger(
    tmp_path: Path, mountpoint: Path, variant: str, granularity: int
) -> None:
    """Between mark and write, write and second mark, mark and answer, each long enough for the scan to meet it.

    No sanitizer has anything to report.
    """
    env = {
        "POSTHOC_DATAPATH": str(builds.datapath(variant)),
        "POSTHOC_FAULTS": "before-write=700,after-write=700,before-reply=700",
    }
    race(tmp_path, mountpoint, "native", granularity, env=env, writes=WRITES // 3)


def race(
    tmp_path: Path,
    mountpoint: Path,
    datapath: str,
    granularity: int,
    env: Mapping[str, str] | None = None,
    writes: int = WRITES,
) -> None:
    """Let writers loose on a mount while it is scanned, and judge the map of its end."""
    size = 24 * MIB + 4096 * 3 + 512
    live, reference = images.pair(tmp_path, size, changed=range(0, 380, 7))
    output = tmp_path / "map.qcow2"
    options = ["--granularity", str(granularity), "--rate", "12M", "--datapath", datapath]
    with command.mounted(
        live, reference, mountpoint, *options, "--output", output, env=env
    ) as mount:
        disk = mount / "disk"
        with qemu.loop_device(disk) as device:
            whole = size // 4096 * 4096
            writers = [
                writer(disk, size, 1, "pwrite", writes),
                writer(disk, whole, 2, "direct", writes),
                writer(device, whole, 3, "mmap", writes),
                # Not direct on the device as well: the kernel makes a page that is mapped there and written
                # around an EIO of the next fsync (dio_warn_stale_pagecache), with any disk below.
                writer(disk, whole, 4, "direct", writes),
            ]
            codes = [process.wait(120) for process in writers]
        assert codes == [0, 0, 0, 0]
        command.control(mount, "rate none")
        status = command.until_state(mount, "complete")
        assert status["written"] > 0
        builds.check(state.Folder(str(mount)).log.read_text())
    differing = oracle.differing(live, reference, granularity)
    missed = differing - qemu.dirty_segments(output, granularity)
    assert not missed
    assert len(differing) > 10


def test_writes_during_the_scan_are_not_all_skipped_nor_all_scanned(
    tmp_path: Path, mountpoint: Path
) -> None:
    """The race is a race: with a paused scan a half is written first, the rest behind the cursor."""
    live, reference = images.pair(tmp_path, 8 * MIB)
    with command.mounted(live, reference, mountpoint, "--paused") as mount:
        images.overwrite(mount / "disk", 0, os.urandom(4 * MIB))
        command.control(mount, "resume")
        status = command.until_state(mount, "complete")
        assert status["savings"]["written"] == 4 * MIB
        images.overwrite(mount / "disk", 6 * MIB, os.urandom(MIB))
        assert command.status(mount)["dirty"] == 5 * MIB
