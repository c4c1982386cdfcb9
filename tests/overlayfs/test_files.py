# SPDX-License-Identifier: Apache-2.0
"""The mount's folder and its virtual files through a real kernel mount."""

import errno
import os
import pathlib
import subprocess
from collections.abc import Callable

import pytest

from tests import wait
from tests.overlayfs import conftest, mounted, serve
from tests.overlayfs.conftest import in_python

NAMES = {"disk": 2, "status": 3, "dirty.qcow2": 5, "control": 6}


def refused(call: Callable[..., object], *arguments: object) -> int | None:
    """Return the errno that `call` fails with."""
    with pytest.raises(OSError) as error:
        call(*arguments)
    return error.value.errno


# The folder


def test_names_and_inodes(shared: mounted.Mounted) -> None:
    """The folder lists what it has, under the numbers that a restarted session relies on."""
    found = {entry.name: entry.inode() for entry in os.scandir(shared.mountpoint)}
    assert found == NAMES
    assert shared.mountpoint.stat().st_ino == 1


def test_modes_and_sizes(shared: mounted.Mounted) -> None:
    """Only the owner may use the disk; status is for reading, control for writing."""
    modes = {name: (shared.mountpoint / name).stat().st_mode & 0o777 for name in NAMES}
    assert modes == {"disk": 0o600, "status": 0o444, "dirty.qcow2": 0o444, "control": 0o200}
    sizes = [(shared.mountpoint / name).stat().st_size for name in ("disk", "dirty.qcow2")]
    assert sizes == [conftest.SIZE, serve.Large.size]
    assert shared.disk.stat().st_blocks == -(-conftest.SIZE // 512)


def test_dots(shared: mounted.Mounted) -> None:
    """`.` and `..` lead where they lead everywhere."""
    assert (shared.mountpoint / "." / ".." / shared.mountpoint.name / "disk").exists()


def test_a_name_that_is_not_there(shared: mounted.Mounted) -> None:
    """ENOENT, also beneath a file ENOTDIR."""
    assert refused(os.stat, shared.mountpoint / "nothing") == errno.ENOENT
    assert refused(os.stat, shared.disk / "beneath") == errno.ENOTDIR


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda root: (root / "new").touch(), id="create"),
        pytest.param(lambda root: (root / "new").mkdir(), id="mkdir"),
        pytest.param(lambda root: os.mknod(root / "new"), id="mknod"),
        pytest.param(lambda root: (root / "disk").unlink(), id="unlink"),
        pytest.param(lambda root: (root / "disk").rename(root / "new"), id="rename"),
        pytest.param(lambda root: (root / "new").symlink_to("disk"), id="symlink"),
        pytest.param(lambda root: (root / "new").hardlink_to(root / "disk"), id="link"),
        pytest.param(lambda root: os.mkfifo(root / "new"), id="mkfifo"),
    ],
)
def test_the_set_of_files_is_fixed(
    shared: mounted.Mounted, change: Callable[[pathlib.Path], None]
) -> None:
    """Nothing can be made, removed or renamed, and all is there afterwards."""
    assert refused(change, shared.mountpoint) == errno.EPERM
    assert {path.name for path in shared.mountpoint.iterdir()} == set(NAMES)


def test_statfs(shared: mounted.Mounted) -> None:
    """A full file system of the disk's size with pages as blocks, as a loop device asks for."""
    facts = os.statvfs(shared.mountpoint)
    assert (facts.f_bsize, facts.f_frsize) == (4096, 4096)
    assert facts.f_blocks == -(-conftest.SIZE // 4096)
    assert (facts.f_bfree, facts.f_bavail, facts.f_ffree) == (0, 0, 0)


def test_extended_attributes_are_not_supported(shared: mounted.Mounted) -> None:
    """Asking, listing and setting say so, each time."""
    for _ in range(2):
        assert refused(os.getxattr, shared.disk, "user.x") == errno.EOPNOTSUPP
        assert refused(os.listxattr, shared.disk) == errno.EOPNOTSUPP
        assert refused(os.setxattr, shared.disk, "user.x", b"1") == errno.EOPNOTSUPP
        assert refused(os.removexattr, shared.disk, "user.x") == errno.EOPNOTSUPP


def test_mount_table_names_it(shared: mounted.Mounted) -> None:
    """findmnt shows the source and the type, and that the kernel checks permissions."""
    command = ["findmnt", "--noheadings", "--output=SOURCE,FSTYPE,OPTIONS", shared.mountpoint]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    source, kind, options = done.stdout.split()
    assert (source, kind) == ("posthoc", "fuse.posthoc")
    assert {"default_permissions", "nosuid", "nodev"} <= set(options.split(","))
    assert "allow_other" not in options


# Virtual files


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(["cat"], id="cat"),
        pytest.param(["head", "--bytes=100000"], id="head"),
        pytest.param(["tail", "--lines=+1"], id="tail"),
        pytest.param(["dd", "bs=7", "status=none"], id="dd-in-pieces"),
        pytest.param(
            ["python3", "-c", "import sys; print(open(sys.argv[1]).read(), end='')"], id="python"
        ),
    ],
)
def test_tools_read_status_whole(mount: mounted.Mounted, command: list[str]) -> None:
    """Every way of reading gives the contents of one opening, from the first line to the last."""
    path = mount.mountpoint / "status"
    argument = f"if={path}" if command[0] == "dd" else str(path)
    done = subprocess.run([*command, argument], check=True, capture_output=True, text=True)
    opening = mount.facts()["status_opened"] - 1
    assert done.stdout == "".join(f"line {i} of opening {opening}\n" for i in range(200))


@pytest.mark.parametrize("how", ["--lines=1", "--bytes=24"])
def test_tail_finds_the_end(mount: mounted.Mounted, how: str) -> None:
    """The size that fstat tells an opener is that of its contents."""
    command = ["tail", how, mount.mountpoint / "status"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "line 199 of opening 0\n".endswith(done.stdout[-10:])
    assert len(done.stdout) == (24 if how == "--bytes=24" else 22)


def test_contents_are_fixed_for_their_opener(shared: mounted.Mounted) -> None:
    """Two openers of one file read what stood there when each opened it, in any order and offset."""
    path = shared.mountpoint / "dirty.qcow2"
    with path.open("rb", buffering=0) as first, path.open("rb", buffering=0) as second:
        begin = first.read(1)
        assert second.read(1) != begin
        for page in (700, 3, 0, 500):
            ours, theirs = (os.pread(f.fileno(), 1, page * 4096)[0] for f in (first, second))
            assert ours == (begin[0] + page) % 256
            assert theirs == (ours + 1) % 256


def test_large_virtual_file_reads_whole_and_ends(shared: mounted.Mounted) -> None:
    """Offsets within, across and beyond the end give what a file gives."""
    path = shared.mountpoint / "dirty.qcow2"
    with path.open("rb", buffering=0) as file:
        assert len(file.readall()) == serve.Large.size
        assert len(os.pread(file.fileno(), 100, serve.Large.size - 10)) == 10
        assert os.pread(file.fileno(), 100, serve.Large.size) == b""
        assert os.lseek(file.fileno(), 0, os.SEEK_END) == serve.Large.size


def test_qemu_img_reads_a_virtual_file(shared: mounted.Mounted, tmp_path: pathlib.Path) -> None:
    """A program that maps no pages and trusts the size copies it byte for byte."""
    copy = tmp_path / "copy"
    source = shared.mountpoint / "dirty.qcow2"
    convert = ["qemu-img", "convert", "-f", "raw", "-O", "raw", source, copy]
    subprocess.run(convert, check=True)
    first = copy.read_bytes()[0]
    assert copy.read_bytes()[4096 * 5] == (first + 5) % 256
    assert copy.stat().st_size // 512 == -(-serve.Large.size // 512)


@pytest.mark.parametrize("name", ["status", "dirty.qcow2"])
def test_files_for_reading_cannot_be_written(shared: mounted.Mounted, name: str) -> None:
    """Root has no more rights than the mode says."""
    path = shared.mountpoint / name
    assert refused(os.open, path, os.O_WRONLY) == errno.EACCES
    assert refused(os.open, path, os.O_RDWR) == errno.EACCES
    assert refused(os.truncate, path, 0) == errno.EPERM


def test_control_cannot_be_read(shared: mounted.Mounted) -> None:
    """There is nothing to read in it."""
    path = shared.mountpoint / "control"
    assert refused(os.open, path, os.O_RDONLY) == errno.EACCES
    assert refused(os.open, path, os.O_RDWR) == errno.EACCES


# control


@pytest.mark.parametrize("redirect", [">", ">>"])
def test_shell_writes_commands(mount: mounted.Mounted, redirect: str) -> None:
    """`echo pause > control` is what people type."""
    script = f"echo pause {redirect} control && printf 'rate 1M\\nworkers 2\\n' {redirect} control"
    subprocess.run(["sh", "-c", script], check=True, cwd=mount.mountpoint)
    assert mount.facts()["control"] == ["pause", "rate 1M", "workers 2"]


def test_each_write_is_commands_of_its_own(mount: mounted.Mounted) -> None:
    """An opener may write again and again; the offset says nothing."""
    with (mount.mountpoint / "control").open("wb", buffering=0) as control:
        for command in (b"pause\n", b"resume\n", b"cancel\n"):
            assert control.write(command) == len(command)
    assert mount.facts()["control"] == ["pause", "resume", "cancel"]


@pytest.mark.parametrize(
    ("command", "number"),
    [
        pytest.param("bad", errno.EINVAL, id="unknown-command"),
        pytest.param("busy", errno.EBUSY, id="the-handler's-errno"),
        pytest.param("x" * 4097, errno.EMSGSIZE, id="longer-than-4-KiB"),
        pytest.param("x" * 1_000_000, errno.EMSGSIZE, id="huge"),
        pytest.param("bug", errno.EIO, id="a-bug-in-the-handler"),
    ],
)
def test_refused_command(mount: mounted.Mounted, command: str, number: int) -> None:
    """Whoever wrote it is told by errno, and the next command is taken."""
    with (mount.mountpoint / "control").open("wb", buffering=0) as control:
        assert refused(control.write, command.encode()) == number
        control.write(b"pause")
    assert mount.facts()["control"] == ["pause"]


def test_longest_command_is_taken(mount: mounted.Mounted) -> None:
    """4096 bytes are not too many."""
    (mount.mountpoint / "control").write_text("x" * 4096)
    assert mount.facts()["control"] == ["x" * 4096]


def test_a_bug_in_a_handler_is_logged_once_and_the_mount_goes_on(mount: mounted.Mounted) -> None:
    """EIO to whoever asked, one traceback in the log, and the disk works."""
    for _ in range(3):
        with (mount.mountpoint / "control").open("wb", buffering=0) as control:
            assert refused(control.write, b"bug") == errno.EIO
    assert mount.disk.read_bytes() == mount.live.read_bytes()
    assert mount.terminate() == 0
    log = mount.log.read_text()
    assert log.count("Traceback") == 1
    assert "KeyError: 'a bug in a command'" in log


# While the guest is busy


@in_python
def test_status_answers_while_every_thread_is_stuck(mount: mounted.Mounted) -> None:
    """Requests that hang, more than there are threads, delay no status, no control and no listing."""
    mount.ask("close_gate", "read")
    read = ["dd", f"if={mount.disk}", "of=/dev/null", "bs=4K", "count=1", "iflag=direct"]
    readers = [subprocess.Popen([*read, f"skip={number}", "status=none"]) for number in range(12)]
    try:
        mount.wait_until_waiting("read", 4)
        wait.until(lambda: mount.facts()["depth"] == 12, "12 requests are being worked on")
        assert (mount.mountpoint / "status").read_text().startswith("line 0")
        (mount.mountpoint / "control").write_text("pause\n")
        assert {path.name for path in mount.mountpoint.iterdir()} == set(NAMES)
    finally:
        mount.ask("open_gate", "read")
        statuses = [reader.wait(wait.DEADLINE) for reader in readers]
    assert statuses == [0] * 12
    assert mount.facts()["most_at_once"] == 4
    assert mount.facts()["depth"] == 0
