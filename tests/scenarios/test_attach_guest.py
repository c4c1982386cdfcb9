# SPDX-License-Identifier: Apache-2.0
"""`posthoc attach` while a real guest makes a file system, writes files and trims."""

import json
import pathlib
import subprocess

import pytest

from tests import command, qemu
from tests.posthoc.qemu import running
from tests.vm import guest

SIZE = 128 << 20

_SCRIPT = """
echo begin
/sbin/mke2fs -q -t ext4 /dev/vda
mount -t ext4 /dev/vda /mnt
i=0
while [ $i -lt 12 ]; do
    dd if=/dev/urandom of=/mnt/file$i bs=64k count=16 2>/dev/null
    [ $((i % 3)) = 0 ] && rm /mnt/file$i
    [ $((i % 4)) = 3 ] && sync && fstrim /mnt
    i=$((i + 1))
done
umount /mnt
echo all done
sleep 1000
"""


@pytest.mark.parametrize("iothread", [False, True], ids=["main-thread", "iothread"])
def test_guest_that_makes_a_file_system_writes_and_trims(
    workdir: pathlib.Path, iothread: bool
) -> None:
    """The chain restored from the incremental is the guest's disk to the byte, and its ext4 is sound."""
    disk, reference, restored = (
        workdir / f"{name}.raw" for name in ("disk", "reference", "restored")
    )
    qemu.create(disk, SIZE)
    qemu.io(disk, "write -P 3 100M 1M")
    qemu.convert(disk, reference, "raw")
    with running.folder() as folder:
        arguments = _arguments(running.Disk("disk0", disk), folder, iothread)
        with guest.boot(None, _SCRIPT, programs=["mke2fs"], arguments=arguments) as booted:
            booted.until("begin")
            attaching = _attach(folder, reference, iothread)
            try:
                booted.until("all done")
                assert attaching.wait(command.TIMEOUT) == 0
            finally:
                attaching.kill()
                attaching.wait()
            vm = running.Qemu(None, folder, True, iothread)
            # Nothing writes now, so that the backup's instant is the disk as it stays.
            vm.client("stop")
            incremental = vm.new_target("incremental", SIZE, (reference, "raw"))
            vm.backup("incremental", device="disk0", sync="incremental", bitmap="backup0")
            vm.client("blockdev-del", {"node-name": "incremental"})
            vm.client.close()
        assert qemu.identical(disk, incremental, ("raw", "qcow2"))
        qemu.convert(incremental, restored, "raw", "qcow2")
    qemu.fsck_ext4(restored)


def _arguments(disk: running.Disk, folder: pathlib.Path, iothread: bool) -> list[str]:
    device = "virtio-blk-pci,drive=disk0,id=vda"
    words = ["-object", "iothread,id=io0"] if iothread else []
    words += ["-blockdev", json.dumps(disk.blockdev())]
    words += ["-device", device + (",iothread=io0" if iothread else "")]
    return [*words, *running.monitors(folder)]


def _attach(
    folder: pathlib.Path, reference: pathlib.Path, iothread: bool
) -> "subprocess.Popen[bytes]":
    """Start an attach that takes about as long as the guest."""
    words = command.words(
        *("attach", "--qmp", folder / "qmp", "--device", "vda", "--bitmap", "backup0"),
        *("--rate", "24M", *(["--accept-iothread-risk"] if iothread else []), reference),
    )
    return subprocess.Popen(words, env=command.environment(), stdin=subprocess.DEVNULL)
