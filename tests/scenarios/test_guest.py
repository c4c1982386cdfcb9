# SPDX-License-Identifier: Apache-2.0
"""A real guest boots from the mounted disk and writes while the scan goes on.

host    reference = ext4 with files; live = reference + changes nobody recorded
        posthoc mount --paused live reference MOUNT
guest                       boots from MOUNT/disk, mounts it, says "writing"
host    resume, slowly                      ...     writes, deletes, syncs
host                                                powers off
host    scan complete, map written; judged by QEMU's tools, fsck and the oracle
"""

import pathlib
import random

import pytest

from tests import command, oracle, qemu
from tests.vm import guest

KIB = 1024
MIB = 1 << 20
GRANULARITY = 64 * KIB
SIZE = 64 * MIB


@pytest.fixture
def images(workdir: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """A backed-up ext4 with 16 MiB of files, and the disk as it was changed after the backup."""
    reference, live, files = workdir / "reference", workdir / "live", workdir / "files"
    files.mkdir()
    numbers = random.Random(3)
    for number in range(16):
        (files / f"old {number}").write_bytes(numbers.randbytes(MIB))
    qemu.create(reference, SIZE)
    qemu.mkfs_ext4(reference, "-d", str(files))
    qemu.run("cp", "--sparse=always", reference, live)
    qemu.run("debugfs", "-w", "-R", "rm /old\\ 7", live)
    qemu.run("debugfs", "-w", "-f", "-", live, text=f'write "{files / "old 1"}" unrecorded\n')
    assert oracle.differing(live, reference, GRANULARITY)
    return live, reference


def allocated(path: pathlib.Path) -> int:
    return path.stat().st_blocks * 512


WRITES_FILES = """
set -e
mount -t ext4 /dev/vda /mnt
echo "guest: writing"
i=0
while [ $i -lt 16 ]; do
    dd if=/dev/urandom of=/mnt/new.$i bs=100k count=2 2>/dev/null
    sync
    i=$((i + 1))
done
rm "/mnt/old 2"
dd if=/dev/zero of="/mnt/old 3" bs=4k seek=100 count=10 conv=notrunc 2>/dev/null
sha256sum /mnt/new.* >/mnt/sums
umount /mnt
mount -t ext4 -o ro /dev/vda /mnt
sha256sum -c /mnt/sums | grep -v ': OK' && exit 1
umount /mnt
"""

MAKES_A_FILE_SYSTEM = """
set -e
echo "guest: writing"
/sbin/mke2fs -q -F -t ext4 -E nodiscard,lazy_itable_init=0 /dev/vda
mount -t ext4 /dev/vda /mnt
dd if=/dev/urandom of=/mnt/file bs=1M count=8 2>/dev/null
rm /mnt/file
echo kept >/mnt/kept
sync
echo "guest: trimming"
fstrim -v /mnt
umount /mnt
"""


@pytest.mark.parametrize(
    ("script", "programs"),
    [
        pytest.param(WRITES_FILES, [], id="writes-files"),
        pytest.param(MAKES_A_FILE_SYSTEM, ["mke2fs"], id="makes-a-file-system-and-trims-it"),
    ],
)
@pytest.mark.parametrize(
    ("datapath", "cache"),
    [("python", "writeback"), ("native", "writeback"), ("native", "none")],
    ids=["python", "native", "direct"],
)
def test_guest_writes_while_its_disk_is_scanned(
    images: tuple[pathlib.Path, pathlib.Path],
    mountpoint: pathlib.Path,
    datapath: str,
    cache: str,
    script: str,
    programs: list[str],
) -> None:
    """The guest's file system is sound, and the map has every segment that differs."""
    live, reference = images
    carrier = live.parent / "map.qcow2"
    options = [
        "--paused",
        "--rate",
        "16M",
        "--datapath",
        datapath,
        "--cache",
        cache,
        "--output",
        carrier,
    ]
    with command.mounted(live, reference, mountpoint, *options):
        if datapath == "python":
            # pyfuse3 knows no discards: fstrim is refused, without harm.
            script = script.replace("fstrim -v /mnt", "! fstrim /mnt")
        before = allocated(live)
        with guest.boot(mountpoint / "disk", script, programs=programs) as running:
            running.until("guest: writing")
            assert command.status(mountpoint)["state"] == "paused"
            command.control(mountpoint, "resume")
            running.wait()
        command.control(mountpoint, "rate 1G")
        status = command.until_state(mountpoint, "complete", "failed", "cancelled")
        assert status["datapath"].startswith(datapath)
        assert status["state"] == "complete"
        assert status["written"] > 0
    if "fstrim -v" in script:
        # The files' space is given back, those of the guest's and those of the backup; metadata and journal remain.
        assert allocated(live) < 12 * MIB < 16 * MIB < before
    qemu.fsck_ext4(live)
    qemu.check(carrier)
    dirty = qemu.dirty_segments(carrier, GRANULARITY)
    differing = oracle.differing(live, reference, GRANULARITY)
    assert differing <= dirty, f"missed: {sorted(differing - dirty)}"
    assert len(dirty - differing) * GRANULARITY <= status["written"]
    command.posthoc("verify", carrier, live, reference)
