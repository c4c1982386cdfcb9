# SPDX-License-Identifier: Apache-2.0
"""Which data path serves a mount, what is told of it, and what happens where the native one does not work."""

import os
import pathlib
import signal
import time

import pytest

from tests import builds, command, qemu, wait
from tests.posthoc import images
from tests.posthoc.images import SEGMENT
from tests.scenarios import killing

Path = pathlib.Path

FALLS_BACK = "posthoc: the python data path serves the disk (native: "


def script(path: Path, body: str) -> str:
    """Write a program that stands in for posthoc-datapath."""
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


def falls_back(tmp_path: Path, mountpoint: Path, reason: str, env: dict[str, str]) -> None:
    """Mount, be told why the python data path serves, and find that it does."""
    live, reference = images.pair(tmp_path, changed=[3])
    done = command.posthoc("mount", live, reference, mountpoint, env=env)
    try:
        assert f"{FALLS_BACK}{reason}" in done.stderr
        assert command.until_state(mountpoint, "complete")["differing"] == SEGMENT
        assert command.status(mountpoint)["datapath"].startswith("python, 4 threads (native: ")
        images.overwrite(mountpoint / "disk", 0, b"served")
    finally:
        command.posthoc("umount", mountpoint)
    assert not command.is_mounted(mountpoint)


def test_a_program_that_never_serves_is_ended(tmp_path: Path, mountpoint: Path) -> None:
    """It is not waited for: what it would do after a minute is of no interest."""
    program = script(tmp_path / "program", "exec sleep 60")
    began = time.monotonic()
    reason = f"{program} does not serve within 5 s"
    falls_back(tmp_path, mountpoint, reason, {"POSTHOC_DATAPATH": program})
    assert time.monotonic() - began < 45


def test_a_session_that_is_not_heard(tmp_path: Path, mountpoint: Path) -> None:
    """A server that reads requests but does not bring the session's answers: nothing would ever work."""
    env = {
        "POSTHOC_DATAPATH": str(builds.datapath("faults")),
        "POSTHOC_FAULTS": "no-init-answer",
    }
    falls_back(tmp_path, mountpoint, "INIT is not answered within 5 s", env)


def test_a_libfuse_that_takes_no_descriptor(tmp_path: Path, mountpoint: Path) -> None:
    hook = tmp_path / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(
        "import sys\n"
        "if '--ready-fd' in sys.argv:\n"
        "    import pyfuse3\n"
        "    init = pyfuse3.init\n"
        "    def elsewhere(operations, device, *rest):\n"
        "        init(operations, device.replace('/dev/fd/', '/dev/fd/999'), *rest)\n"
        "    pyfuse3.init = elsewhere\n"
    )
    env = {"PYTHONPATH": f"{hook}:{command.ROOT}"}
    falls_back(tmp_path, mountpoint, "libfuse does not take its descriptor", env)


def test_a_bug_in_a_session_leaves_the_disk_to_the_next(tmp_path: Path, mountpoint: Path) -> None:
    """pyfuse3's loop breaks while a guest writes: no error, nothing forgotten, another session answers."""
    hook, bug = tmp_path / "hook", tmp_path / "bug"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if '--ready-fd' in sys.argv or '--adopt' in sys.argv:\n"
        "    import pyfuse3, trio\n"
        "    main = pyfuse3.main\n"
        "    async def watch():\n"
        f"        while not os.path.exists({str(bug)!r}):\n"
        "            await trio.sleep(0.01)\n"
        f"        os.unlink({str(bug)!r})\n"
        "        raise RuntimeError('a bug')\n"
        "    async def breaking(*arguments):\n"
        "        async with trio.open_nursery() as nursery:\n"
        "            nursery.start_soon(watch)\n"
        "            await main(*arguments)\n"
        "            nursery.cancel_scope.cancel()\n"
        "    pyfuse3.main = breaking\n"
    )
    live, reference = images.pair(tmp_path, changed=[3])
    output = tmp_path / "map.qcow2"
    command.posthoc(
        *("mount", "--datapath", "native", "--output", output, live, reference, mountpoint),
        env={"PYTHONPATH": f"{hook}:{command.ROOT}"},
    )
    first = command.until_state(mountpoint, "complete")["pid"]
    with open(mountpoint / "disk", "r+b", buffering=0) as disk:
        for segment in (10, 20):
            bug.touch()
            wait.until(lambda: not bug.exists(), "the session has met its bug")
            os.pwrite(disk.fileno(), b"goes on", segment * SEGMENT)
        os.fsync(disk.fileno())
    assert command.until_state(mountpoint, "complete")["pid"] != first
    command.posthoc("umount", mountpoint)
    assert qemu.dirty_segments(output, SEGMENT) == {3, 10, 20}


def test_who_asked_for_the_native_data_path_gets_no_other(tmp_path: Path, mountpoint: Path) -> None:
    live, reference = images.pair(tmp_path)
    env = {"POSTHOC_DATAPATH": "/nonexistent"}
    for options in (["--datapath", "native"], ["--cache", "none"]):
        refused = command.posthoc("mount", *options, live, reference, mountpoint, status=2, env=env)
        assert refused.stderr == (
            "posthoc: the native data path cannot be used: /nonexistent was not built\n"
        )
        assert not command.is_mounted(mountpoint)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--datapath", "python", "--cache", "none"], "--cache none is the native data path's"),
        (["--threads", "0"], "argument --threads: '0' threads: a number from 1 to 16"),
        (["--threads", "17"], "argument --threads: '17' threads: a number from 1 to 16"),
        (["--workers", "65"], "argument --workers: '65' workers: a number from 1 to 64"),
    ],
)
def test_options_that_cannot_be_had_are_refused(
    tmp_path: Path, mountpoint: Path, options: list[str], said: str
) -> None:
    live, reference = images.pair(tmp_path)
    refused = command.posthoc("mount", *options, live, reference, mountpoint, status=2)
    assert len(refused.stderr.splitlines()) == 1
    assert said in refused.stderr


@pytest.mark.parametrize(
    ("datapath", "options"),
    [("python", []), ("native", []), ("native", ["--cache", "none"])],
    ids=["python", "native", "direct"],
)
@pytest.mark.parametrize("count", [1, 3, 16])
def test_threads(
    workdir: Path, mountpoint: Path, datapath: str, options: list[str], count: int
) -> None:
    live, reference = images.pair(workdir)
    options = [*options, "--threads", str(count), "--datapath", datapath]
    with command.mounted(live, reference, mountpoint, *options) as mount:
        expected = f"{datapath}, {count} thread{'s' * (count != 1)}"
        assert command.status(mount)["datapath"] == expected
        assert (mount / "disk").read_bytes() == live.read_bytes()
        images.overwrite(mount / "disk", SEGMENT, b"written")
        assert command.until_state(mount, "complete")["dirty"] == SEGMENT


def descriptors(pid: int, path: Path) -> list[int]:
    """The flags of a process's descriptors of a file."""
    folder = Path(f"/proc/{pid}")
    found = [entry.name for entry in (folder / "fd").iterdir() if entry.readlink() == path]
    lines = [(folder / "fdinfo" / name).read_text().splitlines() for name in found]
    return [int(line.split()[1], 8) for text in lines for line in text if "flags:" in line]


@pytest.mark.parametrize("cache", ["none", "writeback"])
def test_cache(workdir: Path, mountpoint: Path, cache: str) -> None:
    """The server has the disk open around the page cache too, and a guest's aligned requests go that way."""
    live, reference = images.pair(workdir)
    with command.mounted(live, reference, mountpoint, "--paused", "--cache", cache) as mount:
        flags = [descriptors(pid, live) for pid in killing.natives(mount)]
        assert len(flags) == 3
        assert all(
            (os.O_DIRECT in [f & os.O_DIRECT for f in one]) == (cache == "none") for one in flags
        )
        qemu.run("dd", f"of={live}", "oflag=nocache", "conv=notrunc,fdatasync", "count=0")
        qemu.io(mount / "disk", "write -P 5 0 1M", "read -P 5 0 1M", options=["-t", "none"])
        cached = qemu.run("fincore", "--bytes", "--noheadings", "--output=RES", live)
        assert (int(cached) == 0) == (cache == "none")
        assert command.status(mount)["written"] == 16 * SEGMENT


def test_a_stopped_keeper_does_not_hold_up_the_end(tmp_path: Path, mountpoint: Path) -> None:
    """It is to say that the mount is gone; the session sees that as well, and ends what is stuck."""
    live, reference = images.pair(tmp_path, changed=[3])
    output = tmp_path / "map.qcow2"
    command.posthoc(
        "mount", "--datapath", "native", "--output", output, live, reference, mountpoint
    )
    command.until_state(mountpoint, "complete")
    images.overwrite(mountpoint / "disk", 0, b"new")
    processes = killing.natives(mountpoint)
    keeper = min(processes)
    os.kill(keeper, signal.SIGSTOP)
    began = time.monotonic()
    command.posthoc("umount", mountpoint)
    assert time.monotonic() - began < 30
    assert qemu.dirty_segments(output, SEGMENT) == {0, 3}
    wait.until(lambda: not killing.natives(mountpoint), "nothing is left")
    # The disk is free for others.
    qemu.io(live, "read 0 512")


def test_a_stopped_keeper_does_not_hold_up_a_signal(tmp_path: Path, mountpoint: Path) -> None:
    live, reference = images.pair(tmp_path)
    native = ("--datapath", "native")
    with command.in_foreground(live, reference, mountpoint, *native) as (session, _):
        os.kill(min(killing.natives(mountpoint)), signal.SIGSTOP)
        session.terminate()
        assert session.wait(30) == 0
        assert not command.is_mounted(mountpoint)
        assert not killing.natives(mountpoint)
