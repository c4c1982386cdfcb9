# SPDX-License-Identifier: Apache-2.0
"""The map at --output: valid when it says all, marked as in use when it does not, whoever dies when."""

import os
import pathlib
import signal

from tests import command, qemu, wait
from tests.posthoc import images
from tests.posthoc.images import MIB, SEGMENT

Path = pathlib.Path


def flags(output: Path) -> list[str]:
    """The flags of a map's bitmap, as qemu-img shows them."""
    found: list[str] = qemu.bitmaps(output)[0]["flags"]
    return found


def outgrown(output: Path) -> None:
    """Wait until the map is marked as one that lacks something."""
    wait.until(lambda: flags(output) == ["in-use"], "the map is marked as in use")


def kill_everything(mountpoint: Path) -> None:
    """Kill -9 the session of a mount over the python data path, and take the dead mount away."""
    os.kill(command.status(mountpoint)["pid"], signal.SIGKILL)
    command.posthoc("umount", mountpoint, status=2)


def refusals(output: Path, live: Path, reference: Path) -> list[str]:
    """What every verb that reads a map says of this one."""
    disk = output.parent / "disk.qcow2"
    qemu.create(disk, 4 * MIB, "qcow2")
    verbs: list[list[command.Path]] = [
        ["map", output],
        ["merge", output, output, "-o", output.parent / "merged.qcow2"],
        ["verify", output, live, reference],
        ["install", output, f"qcow2:{disk}", "--bitmap", "b"],
    ]
    return [command.posthoc(*verb, status=2).stderr for verb in verbs]


def test_a_killed_session_leaves_no_map_that_looks_valid(tmp_path: Path, mountpoint: Path) -> None:
    """The guest wrote after the scan was complete, then everything died: the map lacks that and says so."""
    live, reference = images.pair(tmp_path, changed=[3])
    output = tmp_path / "map.qcow2"
    command.posthoc(
        "mount", "--datapath", "python", "--output", output, live, reference, mountpoint
    )
    command.until_state(mountpoint, "complete")
    wait.until(output.exists, "the map is written")
    assert qemu.dirty_segments(output, SEGMENT) == {3}
    images.overwrite(mountpoint / "disk", 10 * SEGMENT, b"late")
    outgrown(output)
    kill_everything(mountpoint)
    for said in refusals(output, live, reference):
        assert len(said.splitlines()) == 1
        assert said.startswith(f"posthoc: {output}: ")
        assert "MOUNTPOINT/dirty.qcow2" in said
        assert "posthoc umount" in said
        assert "compare again" in said


def test_the_map_is_valid_again_at_the_end(tmp_path: Path, mountpoint: Path, datapath: str) -> None:
    """Valid at completion, in use once the guest has written, valid at the end; the status says which."""
    live, reference = images.pair(tmp_path, changed=[3])
    output = tmp_path / "map.qcow2"
    with command.mounted(
        live, reference, mountpoint, "--datapath", datapath, "--output", output
    ) as mount:
        assert not output.exists() or flags(output) == []
        command.posthoc("wait", mount)
        wait.until(lambda: command.status(mount)["output"] == f"{output} (written)", "written")
        assert qemu.dirty_segments(output, SEGMENT) == {3}
        images.overwrite(mount / "disk", 10 * SEGMENT, b"late")
        outgrown(output)
        said = f"{output} (in use: it lacks what came after it; written again at the end)"
        wait.until(lambda: command.status(mount)["output"] == said, "the status says so")
        # A map that already lacks something is not written anew for every further write.
        before = output.stat().st_ino
        images.overwrite(mount / "disk", 20 * SEGMENT, b"later")
        assert output.stat().st_ino == before
        qemu.check(output)
    assert flags(output) == []
    assert qemu.dirty_segments(output, SEGMENT) == {3, 10, 20}


def test_writes_where_the_map_is_dirty_already_leave_it_valid(
    tmp_path: Path, mountpoint: Path
) -> None:
    """What it says is still all that there is."""
    live, reference = images.pair(tmp_path, changed=[3, 40])
    output = tmp_path / "map.qcow2"
    with command.mounted(live, reference, mountpoint, "--output", output) as mount:
        command.posthoc("wait", mount)
        wait.until(output.exists, "the map is written")
        images.overwrite(mount / "disk", 3 * SEGMENT, b"again")
        written = output.stat().st_ino
        images.overwrite(mount / "disk", 9 * SEGMENT, b"elsewhere")
        # Looked at once a second: had the first write outgrown it, it would have been marked by now as well.
        outgrown(output)
        assert output.stat().st_ino != written
    assert qemu.dirty_segments(output, SEGMENT) == {3, 9, 40}


def test_a_rescan_outgrows_the_map_and_completes_it_again(tmp_path: Path, mountpoint: Path) -> None:
    """Who forgets what was found has no map until it is found again."""
    live, reference = images.pair(tmp_path, changed=[3])
    output = tmp_path / "map.qcow2"
    with command.mounted(live, reference, mountpoint, "--output", output) as mount:
        command.posthoc("wait", mount)
        wait.until(output.exists, "the map is written")
        command.control(mount, "pause\nrescan")
        outgrown(output)
        command.control(mount, "resume")
        wait.until(lambda: flags(output) == [], "the map is written again")
        assert qemu.dirty_segments(output, SEGMENT) == {3}


def test_an_older_map_does_not_look_like_this_mounts(tmp_path: Path, mountpoint: Path) -> None:
    """What stands at --output is replaced when the mount stands, at first by a map that is in use."""
    live, reference = images.pair(tmp_path, changed=[3])
    output = tmp_path / "map.qcow2"
    command.posthoc("diff", live, reference, "-o", output, status=1)
    images.overwrite(live, 50 * SEGMENT, b"since")
    command.posthoc(
        "mount", "--datapath", "python", "--paused", "--output", output, live, reference, mountpoint
    )
    assert flags(output) == ["in-use"]
    assert "not written yet" in command.status(mountpoint)["output"]
    kill_everything(mountpoint)
    assert "in use" in command.posthoc("map", output, status=2).stderr


def test_an_older_map_is_left_alone_by_a_mount_that_fails(tmp_path: Path, mountpoint: Path) -> None:
    """Who was refused has replaced nothing."""
    live, reference = images.pair(tmp_path, changed=[3])
    output = tmp_path / "map.qcow2"
    command.posthoc("diff", live, reference, "-o", output, status=1)
    before = output.read_bytes()
    (mountpoint / "file").touch()
    command.posthoc("mount", "--output", output, live, reference, mountpoint, status=2)
    assert output.read_bytes() == before


def test_a_next_session_does_not_trust_the_map_of_a_dead_one(
    tmp_path: Path, mountpoint: Path
) -> None:
    """Written valid, then the session was killed and the guest wrote: the next one writes it valid again, with all."""
    live, reference = images.pair(tmp_path, changed=[3])
    output = tmp_path / "map.qcow2"
    options = ["--datapath", "native", "--output", output]
    with command.mounted(live, reference, mountpoint, *options) as mount:
        command.posthoc("wait", mount)
        wait.until(output.exists, "the map is written")
        with open(mount / "disk", "r+b", buffering=0) as disk:
            pid = command.status(mount)["pid"]
            os.kill(pid, signal.SIGKILL)
            disk.seek(10 * SEGMENT)
            disk.write(b"orphaned")
            wait.until(lambda: command.status(mount)["pid"] != pid, "the next session answers")
        wait.until(lambda: "(written)" in command.status(mount)["output"], "written again")
        assert qemu.dirty_segments(output, SEGMENT) == {3, 10}
