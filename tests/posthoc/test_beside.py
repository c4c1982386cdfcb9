# SPDX-License-Identifier: Apache-2.0
"""`--reference-side-only`: what is read is the file that QEMU has open, whatever that is called."""

import contextlib
import json
import os
import pathlib
import shutil
import subprocess
from collections.abc import Iterator, Sequence

from tests import command, qemu
from tests.posthoc.qemu import running
from tests.scenarios import attaching

FOUR_SEGMENTS = 4 * attaching.GRANULARITY


@contextlib.contextmanager
def started(
    filename: str, cwd: pathlib.Path, prelude: Sequence[str] = (), direct: bool = False
) -> Iterator[running.Qemu]:
    """Run a QEMU that is told `filename`, in the folder `cwd`; `prelude` is what starts it."""
    disk = running.Disk("disk0", pathlib.Path(filename), direct=direct)
    with running.folder() as folder:
        words = [*prelude, *running._system(folder), "-blockdev", json.dumps(disk.blockdev())]
        words += ["-device", "virtio-blk-pci,drive=disk0,id=vda"]
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                words, cwd=cwd, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        vm = running.Qemu(process, folder, True, False)
        try:
            yield vm
        finally:
            vm.stop()


def attach(
    vm: running.Qemu, reference: pathlib.Path | str, cwd: pathlib.Path, *, status: int = 0
) -> "subprocess.CompletedProcess[str]":
    words = ("attach", "--qmp", vm.qmp, "--node", "disk0", "--bitmap", "backup0")
    return command.posthoc(*words, "--reference-side-only", reference, cwd=cwd, status=status)


def test_relative_name_is_QEMU_s_own(tmp_path: pathlib.Path) -> None:  # noqa: N802
    """A backup of the same name in posthoc's folder is not taken for the disk, which was called clean then."""
    disks = attaching.pair(tmp_path)
    here = tmp_path / "backups"
    here.mkdir()
    disks.reference.rename(here / "disk0.raw")
    with started("disk0.raw", tmp_path) as vm:
        attach(vm, "disk0.raw", here)
        assert vm.bitmaps("disk0")["backup0"]["count"] == FOUR_SEGMENTS


def test_file_replaced_under_a_running_qemu_is_refused(tmp_path: pathlib.Path) -> None:
    """QEMU goes on writing the one that was renamed; the new one has none of it."""
    disks = attaching.pair(tmp_path)
    with started(str(disks.live.path), tmp_path) as vm:
        disks.live.path.rename(tmp_path / "old.raw")
        shutil.copy(disks.reference, disks.live.path)
        (line,) = attach(vm, disks.reference, tmp_path, status=2).stderr.splitlines()
        assert "is not a file that QEMU has open" in line
        assert vm.bitmaps("disk0") == {}


def test_name_in_another_mount_namespace(tmp_path: pathlib.Path) -> None:
    """Where QEMU sees other mounts, its name for the disk is read as QEMU means it."""
    disks = attaching.pair(tmp_path)
    shown = tmp_path / "shown.raw"
    shutil.copy(disks.reference, shown)
    unshare = ["unshare", "--mount", *(["--map-root-user"] if os.geteuid() else [])]
    mount = f'mount --bind {disks.live.path} {shown} && exec "$@"'
    with started(str(shown), tmp_path, [*unshare, "sh", "-c", mount, "sh"]) as vm:
        attach(vm, disks.reference, tmp_path)
        assert vm.bitmaps("disk0")["backup0"]["count"] == FOUR_SEGMENTS


def test_disk_itself_under_another_name_is_no_reference(tmp_path: pathlib.Path) -> None:
    """A hard link to the disk, which QEMU knows by a relative name: no name tells that they are one."""
    disks = attaching.pair(tmp_path)
    link = tmp_path / "backup.raw"
    os.link(disks.live.path, link)
    here = tmp_path / "elsewhere"
    here.mkdir()
    words = ["qemu-storage-daemon", "--blockdev"]
    with running.folder() as folder:
        words = [*running._storage_daemon(folder), "--blockdev"]
        words.append(json.dumps(running.Disk("disk0", pathlib.Path("disk0.raw")).blockdev()))
        process = subprocess.Popen(words, cwd=tmp_path, stdin=subprocess.DEVNULL)
        vm = running.Qemu(process, folder, False, False)
        try:
            for options in ([], ["--reference-side-only"]):
                result = command.posthoc(
                    *("attach", "--qmp", vm.qmp, "--node", "disk0", *options, link),
                    cwd=here,
                    status=2,
                )
                assert "is a file that QEMU has open for writing" in result.stderr
            qcow2 = tmp_path / "overlay.qcow2"
            qemu.create(qcow2, attaching.SIZE, "qcow2", backing=(disks.live.path, "raw"))
            words = ["attach", "--qmp", vm.qmp, "--node", "disk0", f"qcow2:{qcow2}"]
            assert "open for writing" in command.posthoc(*words, status=2).stderr
        finally:
            vm.stop()
