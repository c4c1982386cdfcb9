# SPDX-License-Identifier: Apache-2.0
"""`posthoc attach`: what it refuses, in one line, and what it says of what it did."""

import contextlib
import json
import os
import pathlib
import pty
import re
import subprocess

import pytest

from dirtymap import errors
from posthoc import cli
from posthoc.commands import attach
from tests import command, qemu
from tests.posthoc.qemu import running
from tests.scenarios import attaching


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--qmp", "s", "--node", "n"], "REFERENCE is missing"),
        (["--qmp", "s", "--disk", "n=r:b", "more"], "with --disk a reference is part of it"),
        (["--qmp", "s", "--disk", "n=r"], "is not of the form NODE=REFERENCE:BITMAP"),
        (["--qmp", "s", "--disk", "=r:b"], "is not of the form NODE=REFERENCE:BITMAP"),
        (["--qmp", "s", "--target", "vda", "r"], "--target goes with --domain"),
        (["--qmp", "s", "--node", "n", "--checkpoint", "r"], "--checkpoint goes with --domain"),
        (["--domain", "d", "--node", "n", "--checkpoint", "r"], "--checkpoint goes with --target"),
        (
            ["--domain", "d", "--disk", "vda=r:a", "--disk", "vdb=r:b", "--checkpoint"],
            "a checkpoint's bitmaps all have its name",
        ),
        (
            ["--domain", "d", "--target", "vda", "--bitmap", "a/b", "--checkpoint", "r"],
            "a/b: libvirt names no checkpoint so",
        ),
        (["--node", "n", "r"], "one of the arguments --qmp --domain is required"),
        (["--qmp", "s", "r"], "one of the arguments --node --device --target --disk is required"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_mistake_on_the_command_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A mistake is told before anything is touched."""
    with pytest.raises((errors.UserError, SystemExit)) as caught:
        attach.request(cli.parser().parse_args(["attach", *arguments]))
    assert said in f"{caught.value} {capsys.readouterr().err}"


def test_no_monitor_is_told() -> None:
    """A mistyped socket is one line and exit code 2."""
    words = ("attach", "--qmp", "/nowhere/s", "--node", "n", "r")
    result = command.posthoc(*words, status=2)
    assert result.stderr == (
        "posthoc: /nowhere/s: no QMP monitor there: No such file or directory\n"
    )


def test_no_virsh_is_told(tmp_path: pathlib.Path) -> None:
    """Where libvirt's client is missing, that is what is said."""
    missing = {"POSTHOC_VIRSH": str(tmp_path / "virsh")}
    result = command.posthoc(
        *("attach", "--domain", "d", "--target", "vda", "r"), status=2, env=missing
    )
    assert result.stderr == f"posthoc: {tmp_path}/virsh: No such file or directory\n"


def refused(vm: running.Qemu, disks: attaching.Pair, *options: str) -> str:
    """Attach, which has to be refused and to leave QEMU alone, and return the one line."""
    before = vm.state()
    result = attaching.attach(vm, disks, *options, status=2)
    assert vm.state() == before
    assert list(attaching.private(vm).iterdir()) == []
    (line,) = result.stderr.splitlines()
    return line


def test_names_that_are_not_there_are_refused_with_those_that_are(tmp_path: pathlib.Path) -> None:
    """A mistyped node or device is told with the ones to choose from."""
    disks = attaching.pair(tmp_path)
    with running.running(disks.live, system=True) as vm:
        words = ("attach", "--qmp", vm.qmp)
        for option, name in (("--node", "disk1"), ("--device", "vdx")):
            result = command.posthoc(*words, option, name, disks.reference, status=2)
            assert name in result.stderr
            assert "disk0" in result.stderr
        twice = [f"--disk=disk0={disks.reference}:{name}" for name in ("a", "b")]
        assert "named twice" in command.posthoc(*words, *twice, status=2).stderr
        result = command.posthoc(
            *words,
            "--node",
            "disk0",
            "--bitmap",
            "posthoc-01234567-copy",
            disks.reference,
            status=2,
        )
        assert "posthoc's own" in result.stderr
        result = command.posthoc(*words, "--node", "disk0", tmp_path / "absent", status=2)
        assert "absent" in result.stderr
        assert vm.bitmaps("disk0") == {}


def test_device_and_several_disks_as_json(tmp_path: pathlib.Path) -> None:
    """A device's top node is found; --json has the facts of every disk, in bytes."""
    first, second = (attaching.pair(tmp_path, node=name) for name in ("disk0", "disk1"))
    with running.running(first.live, second.live, system=True) as vm:
        result = command.posthoc(
            *("attach", "--qmp", vm.qmp, "--device", "dev-disk1", "--json", second.reference)
        )
        (facts,) = json.loads(result.stdout)["disks"]
        assert facts["node"] == "disk1"
        assert facts["bitmap"] == "posthoc"
        result = command.posthoc(
            *("attach", "--qmp", vm.qmp, "--json", "--granularity", "4K"),
            *("--disk", f"disk0={first.reference}:b", "--disk", f"disk1={second.reference}:c"),
        )
        disks = json.loads(result.stdout)["disks"]
    assert [(facts["node"], facts["bitmap"]) for facts in disks] == [("disk0", "b"), ("disk1", "c")]
    for facts in disks:
        assert facts["state"] == "complete"
        assert facts["scanned"] == facts["size"] == attaching.SIZE
        assert facts["dirty"] == facts["differing"] == 4 * 4096
        assert facts["errors"] == 0


def test_text_says_what_to_do_next(tmp_path: pathlib.Path) -> None:
    """A person is told the figures, that the bitmap is transient here, and how it is used."""
    disks = attaching.pair(tmp_path)
    with running.running(disks.live) as vm:
        result = attaching.attach(vm, disks)
    assert "state: complete\nnode: disk0\n" in result.stdout
    assert "dirty: 262144 (256.0 KiB)\n" in result.stdout
    assert '"sync": "incremental", "bitmap": "backup0"' in result.stdout
    assert "virsh backup-begin and virtnbdbackup go on from a checkpoint" in result.stdout
    assert "--checkpoint (virtnbdbackup: --bitmap virtnbdbackup.N, N the" in result.stdout
    assert result.stderr == (
        "posthoc: disk0 (raw) holds no persistent bitmap: this one is lost when QEMU ends\n"
    )


def test_progress_bar_on_a_terminal(tmp_path: pathlib.Path) -> None:
    """One bar at a time, for each disk, on stderr only; results are not mixed with it."""
    first, second = (attaching.pair(tmp_path, node=name) for name in ("disk0", "disk1"))
    with running.running(first.live, second.live) as vm:
        words = ("attach", "--qmp", vm.qmp, "--json", "--rate", "16M", "--directory", vm.folder)
        wishes = [f"--disk={disks.live.node}={disks.reference}:b" for disks in (first, second)]
        ours, theirs = pty.openpty()
        with subprocess.Popen(
            command.words(*words, *wishes),
            env=command.environment({"TERM": "xterm"}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=theirs,
        ) as process:
            os.close(theirs)
            shown = read_all(ours)
            assert process.stdout is not None
            facts = json.loads(process.stdout.read())
    assert process.returncode == 0
    assert [disk["node"] for disk in facts["disks"]] == ["disk0", "disk1"]
    assert re.search(r"scanning .*\d+\.\d/32\.0 MiB", shown)
    assert shown.count("complete") >= 2
    assert "disk1 (raw) holds no persistent bitmap" in shown


def read_all(terminal: int) -> str:
    """Read what is written to a terminal until nobody has it open any more, and close it."""
    parts = []
    with os.fdopen(terminal, "rb", buffering=0) as file:
        # Linux's answer to reading from a terminal that nobody has open: EIO.
        with contextlib.suppress(OSError):
            while part := file.read(1 << 16):
                parts.append(part)
    return b"".join(parts).decode()


@pytest.mark.parametrize("options", [[], ["--transient"]], ids=["persistent", "transient"])
def test_qcow2_keeps_the_bitmap_unless_told_not_to(
    tmp_path: pathlib.Path, options: list[str]
) -> None:
    """In a qcow2 the bitmap is stored when QEMU ends, with --transient it is not."""
    disks = attaching.pair(tmp_path, "qcow2")
    with running.running(disks.live) as vm:
        attaching.attach(vm, disks, *options)
    stored = [bitmap["name"] for bitmap in qemu.bitmaps(disks.live.path)]
    assert stored == ([] if options else ["backup0"])
    qemu.check(disks.live.path)


def test_old_qcow2_gets_a_transient_bitmap(tmp_path: pathlib.Path) -> None:
    """A qcow2 of version 2 holds no bitmaps, which is said and no reason to refuse."""
    disks = attaching.pair(tmp_path, "qcow2")
    qemu.img("amend", "-f", "qcow2", "-o", "compat=0.10", disks.live.path)
    with running.running(disks.live) as vm:
        result = attaching.attach(vm, disks)
        assert "holds no persistent bitmap" in result.stderr
        assert not vm.bitmaps("disk0")["backup0"]["persistent"]


def test_good_bitmap_is_merged_into_only_when_asked_for(tmp_path: pathlib.Path) -> None:
    """A bitmap that is there is left alone; --merge keeps its bits and adds the difference."""
    disks = attaching.pair(tmp_path, "qcow2")
    segment = attaching.GRANULARITY
    with running.running(disks.live, system=True) as vm:
        names = {"node": "disk0", "name": "backup0"}
        vm.client("block-dirty-bitmap-add", {**names, "persistent": True, "granularity": segment})
        vm.write("disk0", 200 * segment, 512, 5)
        assert "exists and is good: --merge" in refused(vm, disks)
        assert "exists and is good" in refused(vm, disks, "--replace")
        vm.client("block-dirty-bitmap-disable", names)
        assert "does not record" in refused(vm, disks, "--merge")
        vm.client("block-dirty-bitmap-enable", names)
        attaching.attach(vm, disks, "--merge")
        merged = vm.bitmaps("disk0")["backup0"]
        assert merged["count"] == 5 * segment
        assert merged["persistent"]
        assert merged["recording"]
        assert attaching.agree(vm, disks)


@pytest.mark.parametrize("granularity", [4 << 10, 2 << 20, 4 << 20], ids=["4K", "2M", "4M"])
def test_bitmap_that_is_merged_into_keeps_its_granularity(
    tmp_path: pathlib.Path, granularity: int
) -> None:
    """What is shown is the bitmap's own, another is refused, and the dirty bytes are of it."""
    disks = attaching.pair(tmp_path)
    with running.running(disks.live) as vm:
        names = {"node": "disk0", "name": "backup0", "granularity": granularity}
        vm.client("block-dirty-bitmap-add", names)
        told = refused(vm, disks, "--merge", "--granularity", "64K")
        assert f"has a granularity of {granularity}: leave --granularity out" in told
        result = attaching.attach(vm, disks, "--merge", "--json")
        (facts,) = json.loads(result.stdout)["disks"]
        bitmap = vm.bitmaps("disk0")["backup0"]
        assert (facts["granularity"], facts["dirty"]) == (granularity, bitmap["count"])
        assert attaching.agree(vm, disks)


def test_filter_above_a_qcow2_costs_persistence_which_is_said(tmp_path: pathlib.Path) -> None:
    """The guest's node is the throttle; the qcow2 below it could hold a persistent bitmap."""
    disks = attaching.pair(tmp_path, "qcow2")
    words = ["-object", "throttle-group,id=tg0"]
    words += ["-blockdev", json.dumps(disks.live.blockdev())]
    words += ["-blockdev", "driver=throttle,node-name=thr,throttle-group=tg0,file=disk0"]
    words += ["-device", "virtio-blk-pci,drive=thr,id=vda"]
    with running.running(system=True, arguments=words) as vm:
        result = command.posthoc("attach", "--qmp", vm.qmp, "--device", "vda", disks.reference)
        assert "thr (throttle) holds no persistent bitmap" in result.stderr
        assert "disk0 below it can (--node disk0)" in result.stderr


def test_inconsistent_bitmap_is_named_so_and_replaced_when_asked_for(
    tmp_path: pathlib.Path,
) -> None:
    """What a crash of QEMU leaves is refused as worthless, and --replace makes it anew."""
    disks = attaching.pair(tmp_path, "qcow2")
    with running.running(disks.live) as vm:
        attaching.attach(vm, disks)
    with running.running(disks.live) as vm:
        assert vm.bitmaps("disk0")["backup0"]["recording"]
        vm.kill()
    with running.running(disks.live) as vm:
        assert vm.bitmaps("disk0")["backup0"]["inconsistent"]
        assert "is inconsistent" in refused(vm, disks)
        assert "is inconsistent" in refused(vm, disks, "--merge")
        attaching.attach(vm, disks, "--replace")
        bitmap = vm.bitmaps("disk0")["backup0"]
        assert bitmap["recording"]
        assert bitmap["persistent"]
        assert attaching.agree(vm, disks)
    dirty = qemu.dirty_segments(disks.live.path, attaching.GRANULARITY, "backup0")
    assert dirty == attaching.CHANGED


def test_bitmap_in_use_is_refused(tmp_path: pathlib.Path) -> None:
    """A bitmap that an export or a job holds cannot be merged into, which is said beforehand."""
    disks = attaching.pair(tmp_path)
    with running.running(disks.live) as vm:
        names = {"node": "disk0", "name": "backup0"}
        vm.client("block-dirty-bitmap-add", {**names})
        export = {"type": "nbd", "id": "e", "node-name": "disk0", "bitmaps": ["backup0"]}
        # Writable, since a recording bitmap is not exported read-only.
        assert vm.server
        vm.client("block-export-add", {**export, "writable": True})
        result = attaching.attach(vm, disks, "--merge", *attaching.server(vm), status=2)
        assert "is in use (a job, an export): end that first" in result.stderr


def test_server_of_somebody_else_is_left_alone_or_shared(tmp_path: pathlib.Path) -> None:
    """QEMU has one NBD server: where it runs already, posthoc has to be told where, and leaves it."""
    disks = attaching.pair(tmp_path)
    with running.running(disks.live) as vm:
        where = str(vm.server)
        export = {"type": "nbd", "id": "theirs", "node-name": "disk0"}
        vm.client("block-export-add", export)
        result = attaching.attach(vm, disks, status=2)
        assert "say where it listens with --nbd-server" in result.stderr
        attaching.attach(vm, disks, "--nbd-server", where)
        assert [entry["id"] for entry in vm.client("query-block-exports")] == ["theirs"]
        assert qemu.run("nbdinfo", "--size", qemu.uri(where, "disk0")) == f"{attaching.SIZE}\n"
        assert attaching.agree(vm, disks)


@pytest.mark.parametrize(
    ("length", "options", "said"),
    [
        (attaching.SIZE - (1 << 20), [], "the rest is compared with zeros"),
        (attaching.SIZE + (1 << 20), ["--allow-shrunk"], "disk0 is 1048576 (1.0 MiB) shorter"),
    ],
    ids=["shorter-reference", "longer-reference"],
)
def test_reference_of_another_size(
    tmp_path: pathlib.Path, length: int, options: list[str], said: str
) -> None:
    """A shorter reference has zeros beyond its end; a longer one is compared only when asked for."""
    disks = attaching.pair(tmp_path)
    with disks.reference.open("r+b") as file:
        file.truncate(length)
    with running.running(disks.live) as vm:
        if options:
            assert "--allow-shrunk compares what it has" in refused(vm, disks)
        result = attaching.attach(vm, disks, *options)
        assert said in result.stderr
        assert vm.bitmaps("disk0")["backup0"]["count"] == 4 * attaching.GRANULARITY
        if not options:
            assert attaching.agree(vm, disks)


@pytest.mark.parametrize("hashed", [False, True], ids=["vpc", "digest-of-a-vpc"])
def test_reference_that_is_longer_by_its_format_s_rounding(
    tmp_path: pathlib.Path, hashed: bool
) -> None:
    """A vpc has whole cylinders: its zeros beyond the disk are no reason for --allow-shrunk, and are told."""
    disks = attaching.pair(tmp_path)
    qemu.convert(disks.reference, tmp_path / "full.vpc", "vpc")
    reference = f"vpc:{tmp_path}/full.vpc"
    if hashed:
        command.posthoc("digest", reference, "-o", tmp_path / "full.digest")
        reference = str(tmp_path / "full.digest")
    with running.running(disks.live) as vm:
        words = ("attach", "--qmp", vm.qmp, "--node", "disk0", "--bitmap", "backup0")
        result = command.posthoc(*words, reference)
        assert f"{reference} is 8192 (8.0 KiB) longer than the live disk" in result.stderr
        assert "rounded up" in result.stderr
        assert vm.bitmaps("disk0")["backup0"]["count"] == 4 * attaching.GRANULARITY
        assert attaching.agree(vm, disks)


def test_disk_that_is_no_multiple_of_a_sector(tmp_path: pathlib.Path) -> None:
    """QEMU rounds a raw disk up to whole sectors, and the map with it, to the last byte."""
    disks = attaching.pair(tmp_path)
    for path in (disks.live.path, disks.reference):
        with path.open("r+b") as file:
            file.truncate(attaching.SIZE - 100)
    with disks.live.path.open("r+b") as file:
        file.seek(attaching.SIZE - 101)
        file.write(b"x")
    with running.running(disks.live) as vm:
        attaching.attach(vm, disks)
        assert vm.bitmaps("disk0")["backup0"]["count"] == 4 * attaching.GRANULARITY
        vm.client("block-dirty-bitmap-remove", {"node": "disk0", "name": "backup0"})
        attaching.attach(vm, disks, "--reference-side-only")
        assert vm.bitmaps("disk0")["backup0"]["count"] == 4 * attaching.GRANULARITY


def test_unreadable_part_of_the_reference_is_dirty(tmp_path: pathlib.Path) -> None:
    """The bitmap is made, valid, and the exit code says that something could not be read."""
    disks = attaching.pair(tmp_path)
    with (
        running.running(disks.live) as vm,
        qemu.nbdkit("file", disks.reference, "error-pread-rate=100%", filters=["error"]) as uri,
    ):
        words = ("attach", "--qmp", vm.qmp, "--node", "disk0", "--bitmap", "backup0")
        result = command.posthoc(*words, uri, status=3)
        assert "could not be read: they count as dirty" in result.stderr
        assert vm.bitmaps("disk0")["backup0"]["count"] >= 4 * attaching.GRANULARITY
        assert attaching.agree(vm, disks)


def test_disk_s_own_file_is_no_reference(tmp_path: pathlib.Path) -> None:
    """Comparing a disk with itself would call it clean, and no lock of QEMU's forbids it here."""
    disks = attaching.pair(tmp_path)
    link = tmp_path / "link"
    link.symlink_to(disks.live.path)
    itself = attaching.Pair(disks.live, link)
    with running.running(disks.live) as vm:
        assert "is a file that QEMU has open for writing" in refused(vm, itself)


def test_qcow2_is_not_read_beside_its_qemu(tmp_path: pathlib.Path) -> None:
    """Its metadata are QEMU's, and change: only a raw disk's file can be read directly."""
    disks = attaching.pair(tmp_path, "qcow2")
    with running.running(disks.live) as vm:
        assert "only a raw disk can be read" in refused(vm, disks, "--reference-side-only")


def test_folder_that_is_too_deep_or_absent(tmp_path: pathlib.Path) -> None:
    """A socket's path has 107 bytes: that is said before QEMU is asked, as is a missing folder."""
    disks = attaching.pair(tmp_path)
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    with running.running(disks.live) as vm:
        words = ("attach", "--qmp", vm.qmp, "--node", "disk0", disks.reference)
        for folder, said in ((deep, "--directory"), (pathlib.Path("/nowhere"), "No such file")):
            result = command.posthoc(*words, "--directory", folder, status=2)
            assert said in result.stderr
        assert vm.bitmaps("disk0") == {}


def test_qemu_that_has_changed_its_user_reaches_its_socket(tmp_path: pathlib.Path) -> None:
    """-runas comes after the monitor was made: what counts is who QEMU is now. Only root can try that."""
    disks = attaching.pair(tmp_path)
    user = ["-runas", "nobody"] if os.geteuid() == 0 else []
    with running.running(disks.live, system=True, arguments=user) as vm:
        words = ("attach", "--qmp", vm.qmp, "--node", "disk0", "--bitmap", "backup0")
        command.posthoc(*words, disks.reference)
        assert vm.bitmaps("disk0")["backup0"]["count"] == 4 * attaching.GRANULARITY


def test_node_below_the_guest_s_is_noted(tmp_path: pathlib.Path) -> None:
    """A node that no device uses may see only part of the writes: that is said."""
    first, second = (attaching.pair(tmp_path, node=name) for name in ("disk0", "disk1"))
    with running.running(first.live, system=True) as vm:
        vm.client("blockdev-add", second.live.blockdev())
        result = attaching.attach(vm, second)
        assert "disk1 is not the node that a device of the guest uses" in result.stderr
