# SPDX-License-Identifier: Apache-2.0
"""What goes wrong: one clear line, a documented exit code, nothing mounted, nothing half-written."""

import errno
import os
import pathlib
import signal
import subprocess
import sys

import pytest

from dirtymap import state
from tests import command, qemu
from tests.posthoc import images
from tests.posthoc.images import MIB, SEGMENT

Path = pathlib.Path

BAD = 20 * SEGMENT + 4096


def refused(*arguments: str | Path, mountpoint: Path, env: dict[str, str] | None = None) -> str:
    """Run a mount that must fail as a user's mistake, and return its one line."""
    result = command.posthoc("mount", *arguments, mountpoint, status=2, env=env)
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("posthoc: ")
    assert not command.is_mounted(mountpoint)
    return lines[0]


def with_bad_sector(image: Path) -> list[str]:
    """An nbdkit plugin in shell: `image` as it is, but one sector answers EIO."""
    hit = f"[ $4 -lt {BAD + 512} -a $(( $4 + $3 )) -gt {BAD} ] && {{ echo EIO >&2; exit 1; }}"
    skip = "iflag=skip_bytes,count_bytes"
    return [
        "eval",
        f"get_size=stat -c %s {image}",
        f"pread={hit}; dd if={image} skip=$4 count=$3 {skip} status=none",
        f"pwrite={hit}; dd of={image} seek=$4 conv=notrunc oflag=seek_bytes status=none",
        "can_write=exit 0",
        "can_flush=exit 0",
        "flush=exit 0",
        "thread_model=echo serialize_all_requests",
    ]


def test_a_bad_sector_of_the_reference_is_dirty_and_named(tmp_path: Path, mountpoint: Path) -> None:
    live, reference = images.pair(tmp_path, changed=[2])
    served = tmp_path / "served"
    output = tmp_path / "map.qcow2"
    with qemu.nbdkit(*with_bad_sector(reference)) as address:
        with qemu.nbdfuse(address, served) as file:
            command.posthoc("mount", live, file, mountpoint, "--output", output)
            waited = command.posthoc("wait", mountpoint, status=3)
            assert "could not be read" in waited.stderr
            status = command.status(mountpoint)
            assert status["state"] == "complete"
            assert status["errors"] == 1
            assert status["dirty"] == 2 * SEGMENT
            assert "reference" in status["error_list"][0]
            assert "Input/output error" in (mountpoint / "status").read_text()
            ended = command.posthoc("umount", mountpoint, status=3)
            assert "could not be read" in ended.stderr
    assert qemu.dirty_segments(output, SEGMENT) == {2, 20}


def test_a_bad_sector_of_the_live_disk_fails_its_own_requests_only(
    tmp_path: Path, mountpoint: Path, datapath: str
) -> None:
    live, reference = images.pair(tmp_path, changed=[2])
    served = tmp_path / "served"
    with qemu.nbdkit(*with_bad_sector(live)) as address:
        with qemu.nbdfuse(address, served) as file:
            command.posthoc("mount", file, reference, mountpoint, "--datapath", datapath)
            assert command.until_state(mountpoint, "complete")["errors"] == 1
            disk = os.open(mountpoint / "disk", os.O_RDWR)
            try:
                with pytest.raises(OSError) as caught:
                    os.pread(disk, 512, BAD)
                assert caught.value.errno == errno.EIO
                assert (
                    os.pread(disk, 512, BAD + SEGMENT) == live.read_bytes()[BAD + SEGMENT :][:512]
                )
                os.pwrite(disk, b"fine", 30 * SEGMENT)
                os.fsync(disk)
            finally:
                os.close(disk)
            status = command.status(mountpoint)
            assert status["dirty"] == 3 * SEGMENT
            assert "live" in status["error_list"][0]
            command.posthoc("umount", mountpoint, status=3)
    assert live.read_bytes()[30 * SEGMENT :][:4] == b"fine"


def test_missing_images(tmp_path: Path, mountpoint: Path) -> None:
    live, reference = images.pair(tmp_path)
    gone = tmp_path / "gone.raw"
    assert f"{gone}: cannot be opened" in refused(live, gone, mountpoint=mountpoint)
    assert f"{gone}: cannot be opened" in refused(gone, reference, mountpoint=mountpoint)


def test_live_and_reference_the_same(tmp_path: Path, mountpoint: Path) -> None:
    live, _ = images.pair(tmp_path)
    link = tmp_path / "link.raw"
    link.symlink_to(live)
    hard = tmp_path / "hard.raw"
    os.link(live, hard)
    for other in (live, link, hard):
        assert "the same disk" in refused(live, other, mountpoint=mountpoint)
    with qemu.loop_device(live) as device:
        assert "the same disk" in refused(device, live, mountpoint=mountpoint)
        with qemu.loop_device(device) as above:
            assert "the same disk" in refused(above, live, mountpoint=mountpoint)


@pytest.mark.parametrize("name", ["base.raw", "qcow2:middle.qcow2"])
def test_live_is_a_file_below_the_reference(tmp_path: Path, mountpoint: Path, name: str) -> None:
    """What the guest would write there is the backup: `mount` served it, and destroyed the reference."""
    live, _ = images.pair(tmp_path)
    live.rename(tmp_path / "base.raw")
    qemu.create(tmp_path / "middle.qcow2", 4 * MIB, "qcow2", backing=("base.raw", "raw"))
    qemu.create(tmp_path / "top.qcow2", 4 * MIB, "qcow2", backing=("middle.qcow2", "qcow2"))
    reference = f"qcow2:{tmp_path}/top.qcow2"
    scheme, _, path = name.rpartition(":")
    file = tmp_path / path
    spec = f"{scheme}:{file}" if scheme else str(file)
    told = f"{reference} stands on it"
    assert f"{spec}: {told}" in refused(spec, reference, mountpoint=mountpoint)
    if not scheme:
        with qemu.loop_device(file) as device:
            assert f"{device}: {told}" in refused(device, reference, mountpoint=mountpoint)
    # Reading both is what an incremental backup's size is estimated by.
    command.posthoc("diff", spec, reference, status=0)


def test_a_data_file_is_shared_with_the_reference(tmp_path: Path, mountpoint: Path) -> None:
    """Each has a header of its own, and both the same bytes."""
    live, reference = (f"qcow2:{tmp_path}/{name}.qcow2" for name in ("live", "reference"))
    data = tmp_path / "data"
    for name in ("live", "reference"):
        qemu.create(tmp_path / f"{name}.qcow2", 4 * MIB, "qcow2", options=f"data_file={data}")
    told = f"{reference} stands on it: writing it would destroy the reference"
    assert f"{live}'s data file {data}: {told}" in refused(live, reference, mountpoint=mountpoint)
    assert f"{data}: {told}" in refused(data, reference, mountpoint=mountpoint)
    assert f"{data} stands on it" in refused(live, data, mountpoint=mountpoint)
    flat = tmp_path / "live-flat.vmdk"
    qemu.create(tmp_path / "live.vmdk", 4 * MIB, "vmdk", options="subformat=monolithicFlat")
    told = f"vmdk:{tmp_path}/live.vmdk's data file {flat}: {flat} stands on it"
    assert told in refused(f"vmdk:{tmp_path}/live.vmdk", flat, mountpoint=mountpoint)


def test_live_may_stand_on_the_reference(tmp_path: Path, mountpoint: Path) -> None:
    live, _ = images.pair(tmp_path)
    live.rename(tmp_path / "base.raw")
    qemu.create(tmp_path / "top.qcow2", 4 * MIB, "qcow2", backing=("base.raw", "raw"))
    with command.mounted(f"qcow2:{tmp_path}/top.qcow2", tmp_path / "base.raw", mountpoint):
        images.overwrite(mountpoint / "disk", 0, b"new")
        assert command.until_state(mountpoint, "complete")["dirty"] == SEGMENT


def test_a_mountpoint_that_is_not_fit(tmp_path: Path, mountpoint: Path) -> None:
    live, reference = images.pair(tmp_path)
    missing = tmp_path / "missing"
    assert "no such directory" in refused(live, reference, mountpoint=missing)
    assert "not a directory" in refused(live, reference, mountpoint=live)
    (mountpoint / "file").touch()
    assert "not empty" in refused(live, reference, mountpoint=mountpoint)


def test_a_mountpoint_that_is_mounted_already(tmp_path: Path, mountpoint: Path) -> None:
    live, reference = images.pair(tmp_path)
    other, old = images.pair(tmp_path, 2 * MIB)[0].rename(tmp_path / "other"), reference
    live, reference = images.pair(tmp_path)
    with command.mounted(live, reference, mountpoint):
        second = command.posthoc("mount", other, old, mountpoint, status=2)
        assert "another posthoc session" in second.stderr
        assert (mountpoint / "disk").stat().st_size == 4 * MIB
    (tmp_path / "elsewhere").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", str(tmp_path / "elsewhere")], check=True)
    try:
        occupied = command.posthoc("mount", live, reference, tmp_path / "elsewhere", status=2)
        assert "mounted here already" in occupied.stderr
    finally:
        subprocess.run(["umount", str(tmp_path / "elsewhere")], check=True)


def test_a_live_disk_that_qemu_uses(tmp_path: Path, mountpoint: Path) -> None:
    live, reference = images.pair(tmp_path)
    with qemu.nbd_server(live, "raw", writable=True):
        assert "in use by another program" in refused(live, reference, mountpoint=mountpoint)


def test_a_live_disk_in_use_by_another_name(tmp_path: Path, mountpoint: Path) -> None:
    """Two mounts wrote one disk, each blind to the other; a file system on a loop device did the same."""
    live, reference = images.pair(tmp_path)
    second = new_folder(tmp_path, "second")
    with command.mounted(live, reference, mountpoint):
        with qemu.loop_device(live) as device:
            assert "in use by another program" in refused(device, reference, mountpoint=second)
    with qemu.loop_device(live) as device:
        words = f"can be written through {device}"
        assert words in refused(live, reference, mountpoint=mountpoint)
        with command.mounted(device, reference, mountpoint) as mount:
            assert "in use by another program" in refused(live, reference, mountpoint=second)
            assert command.until_state(mount, "complete")["dirty"] == 0
            with qemu.loop_device(mount / "disk") as above:
                images.overwrite(above, 0, b"through a device above the mount")
            assert command.status(mount)["written"] == SEGMENT


def test_a_live_disk_that_takes_no_writes(tmp_path: Path, mountpoint: Path) -> None:
    live, reference = images.pair(tmp_path)
    with qemu.loop_device(live, read_only=True) as device:
        assert "is a read-only device" in refused(device, reference, mountpoint=mountpoint)
        with command.mounted(device, reference, mountpoint, "--read-only") as mount:
            assert command.until_state(mount, "complete")["dirty"] == 0


def test_qemu_cannot_use_the_disk_beside_the_mount(tmp_path: Path, mountpoint: Path) -> None:
    live, reference = images.pair(tmp_path)
    with command.mounted(live, reference, mountpoint):
        beside = subprocess.run(
            ["qemu-io", "-f", "raw", "-c", "write 0 512", str(live)], capture_output=True, text=True
        )
        assert "lock" in beside.stderr
        assert "another program" in refused(
            live, reference, mountpoint=new_folder(tmp_path, "second")
        )


def new_folder(tmp_path: Path, name: str) -> Path:
    folder = tmp_path / name
    folder.mkdir()
    return folder


def test_a_format_that_is_not_known(tmp_path: Path, mountpoint: Path) -> None:
    live, _ = images.pair(tmp_path)
    assert "floppy" in refused(live, f"floppy:{live}", mountpoint=mountpoint)


@pytest.mark.parametrize("output", ["missing/map.qcow2", ".", "live.raw", "fifo", "mnt/m"])
def test_an_output_that_could_not_be_written(tmp_path: Path, mountpoint: Path, output: str) -> None:
    live, reference = images.pair(tmp_path)
    os.mkfifo(tmp_path / "fifo")
    refused("--output", tmp_path / output, live, reference, mountpoint=mountpoint)


def test_a_full_output_disk(
    tmp_path: Path, mountpoint: Path, full_disk: Path, datapath: str
) -> None:
    """The mount goes on, the status says it, umount exits with 2, and nothing half-written stays."""
    live, reference = images.pair(tmp_path, changed=[1])
    output = full_disk / "map.qcow2"
    command.posthoc(
        "mount", "--datapath", datapath, live, reference, mountpoint, "--output", output
    )
    assert command.until_state(mountpoint, "complete")["dirty"] == SEGMENT
    assert qemu.dirty_segments(mountpoint / "dirty.qcow2", SEGMENT) == {1}
    ended = command.posthoc("umount", mountpoint, status=2)
    assert "No space left" in ended.stderr
    assert len(ended.stderr.splitlines()) == 1
    assert [file.name for file in full_disk.iterdir()] == ["filler"]


def test_state_that_cannot_be_kept(tmp_path: Path, mountpoint: Path) -> None:
    """A runtime folder that somebody else could have prepared is refused."""
    live, reference = images.pair(tmp_path)
    run = new_folder(tmp_path, "run")
    (run / "posthoc").mkdir(mode=0o777)
    (run / "posthoc").chmod(0o777)
    for path in (live, reference, mountpoint, run, run / "posthoc"):
        os.chown(path, 65534, 65534)
    for parent in (tmp_path, *tmp_path.parents):
        if parent not in (Path("/"), Path("/tmp")):
            parent.chmod(parent.stat().st_mode | 0o011)
    result = subprocess.run(
        [
            *["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"],
            *command.words("mount", live, reference, mountpoint),
        ],
        env=command.environment({"XDG_RUNTIME_DIR": str(run), "HOME": str(tmp_path)}),
        cwd="/",
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2, result.stderr
    assert "private folder" in result.stderr
    assert not command.is_mounted(mountpoint)


def test_a_failing_start_leaves_nothing(tmp_path: Path, mountpoint: Path) -> None:
    """No lock, no session: the next try works."""
    live, reference = images.pair(tmp_path)
    refused(live, tmp_path / "gone", mountpoint=mountpoint)
    with command.mounted(live, reference, mountpoint) as mount:
        assert command.until_state(mount, "complete")["dirty"] == 0


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_an_interrupted_mount_command_leaves_nothing(
    tmp_path: Path, mountpoint: Path, number: signal.Signals, code: int
) -> None:
    """Ctrl-C while the command waits: the session it has started takes down what it set up.

    SIGTERM ended the command alone: its session went on starting, unseen.
    """
    live, reference = images.pair(tmp_path)
    fifo = tmp_path / "slow"
    script = (
        "import os, signal, sys\n"
        "from posthoc.sessions import mounted\n"
        "def slow(*_, **__):\n"
        f"    open({str(fifo)!r}, 'w').write(str(os.getpid()))\n"
        "    signal.pause()\n"
        "mounted.run = slow\n"
    )
    os.mkfifo(fifo)
    hook = new_folder(tmp_path, "hook")
    (hook / "sitecustomize.py").write_text(
        f"import sys\nif '--ready-fd' in sys.argv:\n    exec({script!r})\n"
    )
    env = command.environment()
    env["PYTHONPATH"] = f"{hook}:{env['PYTHONPATH']}"
    # As in a terminal: what is started in the background of a shell script ignores SIGINT.
    terminal = ["env", "--default-signal=INT"]
    starting = subprocess.Popen(
        [*terminal, *command.words("mount", live, reference, mountpoint)],
        env=env,
        stderr=subprocess.PIPE,
    )
    session = int(fifo.read_text())
    starting.send_signal(number)
    assert starting.wait(60) == code
    starting.communicate()
    assert not Path(f"/proc/{session}").exists()
    assert not command.is_mounted(mountpoint)


def test_a_session_ended_while_it_starts_leaves_nothing(tmp_path: Path, mountpoint: Path) -> None:
    """SIGTERM between the lock and the mount, while a reference is slow to open."""
    live, reference = images.pair(tmp_path)
    fifo = tmp_path / "slow"
    os.mkfifo(fifo)
    script = (
        "import signal, sys\n"
        "from dirtymap import images\n"
        "from posthoc import cli\n"
        "def slow(*_, **__):\n"
        f"    open({str(fifo)!r}, 'w').close()\n"
        "    signal.pause()\n"
        "images.open_reference = slow\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    words = [sys.executable, "-c", script, "mount", "--foreground", live, reference, mountpoint]
    starting = subprocess.Popen(words, env=command.environment(), stderr=subprocess.PIPE)
    fifo.read_text()
    folder = state.Folder(str(mountpoint))
    assert folder.is_served()
    starting.terminate()
    assert starting.wait(60) == 143
    assert starting.communicate()[1] == b""
    assert not folder.path.exists()
    assert not command.is_mounted(mountpoint)
