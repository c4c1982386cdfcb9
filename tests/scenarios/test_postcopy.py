# SPDX-License-Identifier: Apache-2.0
"""A bitmap lost in a migration: rebuilt on the destination, where backups go on incrementally.

Post-copy cannot carry a raw disk's bitmap at all, and other migrations do so only with the capability
dirty-bitmaps. What is left is the last backup; `attach` compares the disk with it.
"""

import pathlib

from tests import oracle, qemu, wait
from tests.posthoc.qemu import running
from tests.scenarios import attaching

NAMES = {"node": "disk0", "name": "backup0"}


def test_bitmap_lost_in_post_copy_is_rebuilt_on_the_destination(tmp_path: pathlib.Path) -> None:
    """Full backup and bitmap, writes, migration without the bitmap, writes, attach: the incremental is right.

    Nothing written before, during or after the migration is missed; the bitmap that was lost would have
    had the same segments and those written with what was there before.
    """
    live = running.Disk("disk0", tmp_path / "disk.raw")
    qemu.create(live.path, attaching.SIZE)
    qemu.io(live.path, "write -P 1 0 8M")
    with running.running(live, system=True) as source:
        full = source.new_target("full", attaching.SIZE)
        source.client("block-dirty-bitmap-add", NAMES)
        source.backup("full", device="disk0", sync="full")
        source.client("blockdev-del", {"node-name": "full"})
        reference = tmp_path / "reference.qcow2"
        full.rename(reference)
        source.write("disk0", 5 * attaching.GRANULARITY, 4096, 2)
        source.write("disk0", 300 * attaching.GRANULARITY, 4096, 2)
        lost = source.bitmaps("disk0")["backup0"]["count"]
        incoming = ("-incoming", "defer")
        with running.running(live, system=True, arguments=incoming) as destination:
            migrate(source, destination)
            assert destination.bitmaps("disk0") == {}
            source.client("quit")
            # From 10.0 on a stopped destination does not take its disks over before it has run.
            for verb in ("cont", "stop"):
                destination.client(verb)
            destination.write("disk0", 400 * attaching.GRANULARITY, 4096, 3)
            disks = attaching.Pair(live, reference)
            with running.writing(destination, "disk0", attaching.SIZE // 2):
                attach(destination, disks)
            assert destination.bitmaps("disk0")["backup0"]["count"] > lost
            assert destination.backups_agree(
                "disk0", "backup0", (reference, "qcow2"), attaching.SIZE
            )
    flat = tmp_path / "reference.raw"
    qemu.convert(reference, flat, "raw", "qcow2")
    differing = oracle.differing(live.path, flat, attaching.GRANULARITY)
    assert {5, 300, 400} <= differing


def attach(vm: running.Qemu, disks: attaching.Pair) -> None:
    reference = pathlib.Path(f"qcow2:{disks.reference}")
    attaching.attach(vm, attaching.Pair(disks.live, reference), "--rate", attaching.RATE)


def migrate(source: running.Qemu, destination: running.Qemu) -> None:
    """Migrate by post-copy; AssertionError where that is not what happened."""
    post_copy = {"capabilities": [{"capability": "postcopy-ram", "state": True}]}
    allowed = destination.client.ask("migrate-set-capabilities", post_copy)
    assert "return" in allowed, f"no post-copy without userfaultfd (root may use it): {allowed}"
    source.client("migrate-set-capabilities", post_copy)
    # Slow, so that it is still under way when it is switched over, and when that is looked at.
    slow = {"max-bandwidth": 4096, "max-postcopy-bandwidth": 4096}
    source.client("migrate-set-parameters", slow)
    address = f"unix:{destination.folder / 'migration'}"
    destination.client("migrate-incoming", {"uri": address})
    source.client("migrate", {"uri": address})
    wait.until(lambda: status(source) == "active", "the migration is under way")
    source.client("migrate-start-postcopy")
    wait.until(lambda: status(source) == "postcopy-active", "it goes on as post-copy")
    source.client("migrate-set-parameters", dict.fromkeys(slow, 1 << 30))
    wait.until(lambda: status(source) == "completed", "the source has sent everything")
    wait.until(lambda: status(destination) == "completed", "the destination has everything")
    assert source.client("query-migrate")["ram"]["postcopy-bytes"] > 0


def status(vm: running.Qemu) -> str:
    found: str = vm.client("query-migrate").get("status", "none")
    assert found not in ("failed", "cancelled"), vm.client("query-migrate")
    return found
