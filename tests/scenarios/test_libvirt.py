# SPDX-License-Identifier: Apache-2.0
"""`posthoc attach --domain` on a real libvirtd: its checkpoint, its incremental backup, its refusals."""

import json
import os
import pathlib
import signal
import subprocess
import threading
from collections.abc import Iterator

import pytest

from tests import command, qemu, wait
from tests.scenarios import attaching, libvirtd

_BACKUP = """
<domainbackup>
  <incremental>{name}</incremental>
  <disks>
    <disk name='vda' type='file' backup='yes'>
      <driver type='qcow2'/>
      <target file='{path}'/>
    </disk>
    <disk name='vdb' backup='no'/>
  </disks>
</domainbackup>
"""


@pytest.fixture(scope="module")
def libvirt() -> Iterator[libvirtd.Libvirt]:
    """One libvirtd for all: it takes some seconds to look at the QEMU that is there."""
    with libvirtd.serving() as serving:
        yield serving


@pytest.fixture
def disks(libvirt: libvirtd.Libvirt) -> tuple[attaching.Pair, attaching.Pair]:
    """vda, a qcow2, and vdb, raw."""
    return (
        attaching.pair(libvirt.folder, "qcow2", node="vda"),
        attaching.pair(libvirt.folder, "raw", node="vdb"),
    )


@pytest.fixture
def domain(
    libvirt: libvirtd.Libvirt, disks: tuple[attaching.Pair, attaching.Pair]
) -> Iterator[libvirtd.Domain]:
    with libvirtd.domain(libvirt, "vm1", *(pair.live for pair in disks)) as running:
        yield running


def attach(
    domain: libvirtd.Domain, *options: str | pathlib.Path, status: int = 0
) -> subprocess.CompletedProcess[str]:
    words = ("attach", "--connect", domain.libvirt.uri, "--domain", domain.name)
    return command.posthoc(*words, *options, status=status)


def private_folders(domain: libvirtd.Domain) -> list[pathlib.Path]:
    """What is left where files for the domain's QEMU are put: the folder libvirt made for it."""
    return sorted((domain.libvirt.folder / "home").glob("**/posthoc-attach-*"))


def posthoc_names(domain: libvirtd.Domain) -> list[str]:
    """What of ours QEMU has."""
    nodes = domain.qmp("query-named-block-nodes", {"flat": True})
    names = [node["node-name"] for node in nodes]
    names += [bitmap["name"] for node in nodes for bitmap in node.get("dirty-bitmaps", [])]
    names += [export["id"] for export in domain.qmp("query-block-exports")]
    return [name for name in names if name.startswith("posthoc-")]


def test_checkpoint_gives_libvirt_s_own_incremental_backup(
    domain: libvirtd.Domain, disks: tuple[attaching.Pair, attaching.Pair]
) -> None:
    """With writes all the while: `virsh backup-begin` over the checkpoint is the disk, to the byte."""
    vda, _ = disks
    ending = threading.Event()
    written = []

    def write() -> None:
        number = 0
        while not ending.is_set():
            domain.write(0, (number * 37 % 512) * attaching.GRANULARITY, 4096, 1 + number % 255)
            number += 1
            written.append(number)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        wait.until(lambda: written, "the first write")
        before = len(written)
        options = ("--target", "vda", "--bitmap", "backup0", "--checkpoint", "--rate", "32M")
        said = attach(domain, *options, vda.reference).stdout
        assert "  virsh backup-begin with <incremental>backup0</incremental>\n" in said
        assert (
            "  virtnbdbackup goes on from its own checkpoint only: --bitmap virtnbdbackup.N" in said
        )
        assert len(written) > before
        during = len(written)
        wait.until(lambda: len(written) > during + 3, "writes after it is done")
    finally:
        ending.set()
        writer.join(wait.DEADLINE)
    assert domain.virsh("checkpoint-list", "--name").split() == ["backup0"]
    assert private_folders(domain) == []
    assert posthoc_names(domain) == []
    incremental = domain.libvirt.folder / "home" / "incremental.qcow2"
    xml = domain.libvirt.folder / "backup.xml"
    xml.write_text(_BACKUP.format(name="backup0", path=incremental))
    domain.virsh("backup-begin", xml)
    wait.until(
        lambda: "Completed" in domain.virsh("domjobinfo", "--completed", "--keep-completed"),
        "libvirt's backup is done",
    )
    domain.virsh("destroy", "--graceful")
    qemu.img("rebase", "-u", "-f", "qcow2", "-b", vda.reference, "-F", "raw", incremental)
    assert qemu.identical(vda.live.path, incremental, ("qcow2", "qcow2"))
    assert [bitmap["name"] for bitmap in qemu.bitmaps(vda.live.path)] == ["backup0"]


def test_both_disks_as_one_checkpoint_need_persistent_bitmaps(
    domain: libvirtd.Domain, disks: tuple[attaching.Pair, attaching.Pair]
) -> None:
    """A raw disk cannot be part of a checkpoint, which is said before anything is done; without it works."""
    words = []
    for target, pair in zip(("vda", "vdb"), disks, strict=True):
        words += ["--disk", f"{target}={pair.reference}:backup0"]
    result = attach(domain, *words, "--checkpoint", status=2)
    assert "cannot hold a persistent bitmap, which a checkpoint needs" in result.stderr
    assert posthoc_names(domain) == []
    facts = json.loads(attach(domain, *words, "--json").stdout)["disks"]
    assert [disk["dirty"] for disk in facts] == [4 * attaching.GRANULARITY] * 2
    assert [disk["persistent"] for disk in facts] == [True, False]


def test_transient_bitmap_becomes_no_checkpoint(
    domain: libvirtd.Domain, disks: tuple[attaching.Pair, attaching.Pair]
) -> None:
    """One that --merge would add to ends with QEMU, which is said before anything is done."""
    vda, _ = disks
    (node,) = [
        node["node-name"]
        for node in domain.qmp("query-named-block-nodes", {"flat": True})
        if node["drv"] == "qcow2"
    ]
    domain.qmp("block-dirty-bitmap-add", {"node": node, "name": "backup0"})
    words = ("--target", "vda", "--bitmap", "backup0", "--merge", "--checkpoint", vda.reference)
    assert "is not persistent, which a checkpoint needs" in attach(domain, *words, status=2).stderr
    assert posthoc_names(domain) == []
    assert domain.virsh("checkpoint-list", "--name").split() == []


def bitmaps(domain: libvirtd.Domain) -> list[tuple[str, int]]:
    """Name and count of every bitmap in QEMU."""
    nodes = domain.qmp("query-named-block-nodes", {"flat": True})
    return [(found["name"], found["count"]) for n in nodes for found in n.get("dirty-bitmaps", [])]


def test_checkpoint_of_other_disks_is_not_taken_for_this_one(libvirt: libvirtd.Libvirt) -> None:
    """libvirt keeps one checkpoint of a name and says nothing when it is redefined: vda's would be lost."""
    vda, vdb = (attaching.pair(libvirt.folder, "qcow2", node=name) for name in ("vda", "vdb"))
    with libvirtd.domain(libvirt, "vm2", vda.live, vdb.live) as domain:
        specs = ("--diskspec", "vda,checkpoint=bitmap", "--diskspec", "vdb,checkpoint=no")
        domain.virsh("checkpoint-create-as", "ck0", *specs)
        before = domain.virsh("checkpoint-dumpxml", "ck0", "--no-domain")
        words = ("--target", "vdb", "--bitmap", "ck0", "--checkpoint", vdb.reference)
        said = (
            "posthoc: domain vm2 has a checkpoint ck0 already, of vda: name another, or give that one up "
            "(virsh checkpoint-delete; --metadata where its bitmap is lost)\n"
        )
        assert attach(domain, *words, status=2).stderr == said
        assert bitmaps(domain) == [("ck0", 0)]
        # Nor is it where the bitmap is there and added to.
        node = next(
            block["inserted"]["node-name"]
            for block in domain.qmp("query-block")
            if "virtio-disk1" in block["qdev"]
        )
        added = {"node": node, "name": "ck0", "persistent": True}
        domain.qmp("block-dirty-bitmap-add", added)
        assert "has a checkpoint ck0" in attach(domain, "--merge", *words, status=2).stderr
        assert domain.virsh("checkpoint-dumpxml", "ck0", "--no-domain") == before
        # Of the same disk it is, and the checkpoint stays what it was.
        words = ("--target", "vda", "--bitmap", "ck0", "--checkpoint", vda.reference)
        attach(domain, "--merge", *words)
        assert domain.virsh("checkpoint-dumpxml", "ck0", "--no-domain") == before
        assert sorted(bitmaps(domain)) == [("ck0", 0), ("ck0", 4 * attaching.GRANULARITY)]


def test_bitmap_that_libvirt_does_not_take_is_removed_again(
    domain: libvirtd.Domain,
    disks: tuple[attaching.Pair, attaching.Pair],
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What failed is told in one line, and can be done again: no bitmap stands in its way, unless wanted."""
    vda, _ = disks
    virsh = tmp_path / "virsh"
    no = 'case "$*" in *checkpoint-create*) echo "error: no space" >&2; exit 1;; esac'
    virsh.write_text(f'#!/bin/bash\n{no}\nexec virsh "$@"\n')
    virsh.chmod(0o755)
    name = "virtnbdbackup.0"
    words = ("--target", "vda", "--bitmap", name, "--checkpoint", vda.reference)
    with monkeypatch.context() as patch:
        patch.setenv("POSTHOC_VIRSH", str(virsh))
        result = attach(domain, *words, status=2)
        assert result.stdout == ""
        assert result.stderr == (
            f"posthoc: libvirt did not take {name} as a checkpoint: virsh checkpoint-create vm1: no space\n"
        )
        assert bitmaps(domain) == []
        assert private_folders(domain) == []
        kept = attach(domain, "--keep-on-failure", *words, status=2)
        assert "is kept, and is right" in kept.stderr
        assert bitmaps(domain) == [(name, 4 * attaching.GRANULARITY)]
    said = attach(domain, "--merge", *words).stdout
    assert f"  virtnbdbackup -d vm1 -l inc -o FOLDER, where {name} was its last backup\n" in said
    assert domain.virsh("checkpoint-list", "--name").split() == [name]
    assert posthoc_names(domain) == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--target", "vdx", "r"], "vdx: domain vm1 has no such disk (it has: vda, vdb)"),
        (["--node", "nope", "r"], "nope: vm1 has no such node"),
    ],
    ids=["target", "node"],
)
def test_disk_that_is_not_there(domain: libvirtd.Domain, options: list[str], said: str) -> None:
    """A mistyped disk is told with those that are there."""
    assert said in attach(domain, *options, status=2).stderr


def test_domain_that_is_not_there(libvirt: libvirtd.Libvirt) -> None:
    """What virsh says of a domain that it does not know is passed on in one line."""
    result = attach(libvirtd.Domain(libvirt, "absent"), "--target", "vda", "r", status=2)
    (line,) = result.stderr.splitlines()
    assert "failed to get domain 'absent'" in line


def test_killed_posthoc_is_cleaned_up_after(
    domain: libvirtd.Domain, disks: tuple[attaching.Pair, attaching.Pair]
) -> None:
    """kill -9 in the middle of the scan: the next attach finds what is left, in QEMU and on disk."""
    _, vdb = disks
    words = command.words(
        *("attach", "--connect", domain.libvirt.uri, "--domain", domain.name),
        *("--target", "vdb", "--bitmap", "backup0", "--rate", "1M", vdb.reference),
    )
    with subprocess.Popen(words, env=command.environment(), stdin=subprocess.DEVNULL) as process:
        wait.until(
            lambda: [name for name in posthoc_names(domain) if "-live-" in name], "the export"
        )
        process.kill()
    assert posthoc_names(domain) != []
    assert len(private_folders(domain)) == 1
    attach(domain, "--target", "vdb", "--bitmap", "backup0", vdb.reference)
    assert posthoc_names(domain) == []
    assert private_folders(domain) == []


def test_ctrl_c_does_not_reach_virsh(
    domain: libvirtd.Domain,
    disks: tuple[attaching.Pair, attaching.Pair],
    tmp_path: pathlib.Path,
) -> None:
    """A terminal's Ctrl-C goes to the whole process group: what virsh takes back is not cut short."""
    _, vdb = disks
    virsh = tmp_path / "virsh"
    again = 'case "$*" in *block-export-del*) kill -INT -- -$PPID;; esac'
    virsh.write_text(f'#!/bin/bash\n{again}\nexec virsh "$@"\n')
    virsh.chmod(0o755)
    words = command.words(
        *("attach", "--connect", domain.libvirt.uri, "--domain", domain.name),
        *("--target", "vdb", "--rate", "1M", vdb.reference),
    )
    with subprocess.Popen(
        words,
        env=command.environment({"POSTHOC_VIRSH": str(virsh)}),
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        wait.until(
            lambda: [name for name in posthoc_names(domain) if "-live-" in name], "the export"
        )
        os.killpg(process.pid, signal.SIGINT)
        _, stderr = process.communicate(timeout=command.TIMEOUT)
    assert process.returncode == 130, stderr
    assert stderr.splitlines()[-1] == "posthoc: interrupted: QEMU is left as it was found"
    assert posthoc_names(domain) == []
    assert private_folders(domain) == []


def test_qemu_killed_is_one_clear_line(
    domain: libvirtd.Domain, disks: tuple[attaching.Pair, attaching.Pair]
) -> None:
    """When the domain's QEMU is killed, posthoc says that it does not run, and removes its files."""
    _, vdb = disks
    words = command.words(
        *("attach", "--connect", domain.libvirt.uri, "--domain", domain.name),
        *("--target", "vdb", "--rate", "1M", vdb.reference),
    )
    process = subprocess.Popen(
        words,
        env=command.environment(),
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        wait.until(
            lambda: [name for name in posthoc_names(domain) if "-live-" in name], "the export"
        )
        os.kill(domain.pid, signal.SIGKILL)
        _, stderr = process.communicate(timeout=command.TIMEOUT)
    assert process.returncode == 2
    (line,) = stderr.splitlines()
    assert line.startswith("posthoc: domain vm1: ")
    assert private_folders(domain) == []
