#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What a guest gets of its disk through the mount: fio over each data path, their peers and the file itself.

The contenders take turns at each job and the medians are compared: read the ratios, not the figures. `cpu` is what
the serving processes used for each request. QEMU's export has a dirty bitmap on its node; nbdfuse has none.

    scripts/bench/guest_io.py [--folder DIR] [--cache writeback|none] [--seconds 2] [--rounds 3]
                              [--only native,qemu] [--jobs randread-1,...] [--threads N] [--storage-daemon PATH]
                              [--newer PATH]

--newer names a second, newer qemu-storage-daemon to be measured in the same run. A folder on tmpfs shows what the data
path itself costs, one on a disk with --cache none what is left of a device.
Targets: 2 x qemu-storage-daemon 7.2 at depth 1, 2.5 x at depth 16 (version 10: 1.6 x and 2 x); 0.8 of the raw
device with O_DIRECT.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pathlib
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from dirtymap import state, units

ROOT = pathlib.Path(__file__).resolve().parents[2]

# fio's pattern, block size and depth.
JOBS = {
    "randread-1": ("randread", "4k", 1),
    "randwrite-1": ("randwrite", "4k", 1),
    "randread-16": ("randread", "4k", 16),
    "randwrite-16": ("randwrite", "4k", 16),
    "read-128k": ("read", "128k", 4),
    "write-128k": ("write", "128k", 4),
    "read-1m": ("read", "1m", 4),
    "write-1m": ("write", "1m", 4),
}
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
PATIENCE = 30.0


@dataclass
class Disk:
    """Where the guest's disk is, and what finds the processes that serve it."""

    path: pathlib.Path
    marks: tuple[str, ...] = ()

    def cpu(self) -> float:
        """Return the seconds of processor time that its processes have used."""
        ticks = 0
        for entry in pathlib.Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            with contextlib.suppress(OSError):
                command = (entry / "cmdline").read_bytes().decode(errors="replace")
                if any(mark in command for mark in self.marks):
                    fields = (entry / "stat").read_text().rpartition(")")[2].split()
                    ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")


def until(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > end:
            raise SystemExit(f"not within {PATIENCE:.0f} s: {what}")
        time.sleep(0.02)


@contextlib.contextmanager
def itself(folder: pathlib.Path, arguments: argparse.Namespace) -> Iterator[Disk]:
    yield Disk(folder / "live")


@contextlib.contextmanager
def posthoc(folder: pathlib.Path, arguments: argparse.Namespace, way: str) -> Iterator[Disk]:
    mountpoint = folder / way
    mountpoint.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "posthoc"]
    options = ["--paused", "--datapath", way]
    if way == "native":
        options += ["--cache", arguments.cache]
        options += ["--threads", str(arguments.threads)] if arguments.threads else []
    images = [folder / "live", folder / "reference", mountpoint]
    subprocess.run([*command, "mount", *options, *images], check=True, env=ENVIRONMENT)
    try:
        session = json.loads((mountpoint / "status.json").read_bytes())
        assert session["datapath"].startswith(way), session["datapath"]
        yield Disk(mountpoint / "disk", (str(state.Folder(str(mountpoint)).path), str(mountpoint)))
    finally:
        subprocess.run([*command, "umount", mountpoint], check=True, env=ENVIRONMENT)


@contextlib.contextmanager
def storage_daemon(
    folder: pathlib.Path, arguments: argparse.Namespace, program: str
) -> Iterator[Disk]:
    target, monitor = folder / "qsd", folder / "qsd.monitor"
    target.touch()
    direct = "on" if arguments.cache == "none" else "off"
    command = [program]
    command += [
        "--blockdev",
        f"driver=file,node-name=f,filename={folder}/live,cache.direct={direct}",
    ]
    command += ["--blockdev", "driver=raw,node-name=disk,file=f"]
    command += [
        "--chardev",
        f"socket,id=c,path={monitor},server=on,wait=off",
        "--monitor",
        "chardev=c",
    ]
    command += ["--export", f"type=fuse,id=e,node-name=disk,mountpoint={target},writable=on"]
    with subprocess.Popen(command) as daemon:
        try:
            until(lambda: target.stat().st_size > 0, "the export is there")
            add_bitmap(monitor)
            yield Disk(target, (str(monitor),))
        finally:
            daemon.terminate()


def add_bitmap(monitor: pathlib.Path) -> None:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(monitor))
        stream = connection.makefile("rw")
        stream.readline()
        arguments = {"node": "disk", "name": "b", "granularity": 65536}
        for command in (
            {"execute": "qmp_capabilities"},
            {"execute": "block-dirty-bitmap-add", "arguments": arguments},
        ):
            stream.write(json.dumps(command) + "\n")
            stream.flush()
            answer = json.loads(stream.readline())
            assert "return" in answer, answer


@contextlib.contextmanager
def nbdfuse(folder: pathlib.Path, arguments: argparse.Namespace) -> Iterator[Disk]:
    mountpoint = folder / "nbdfuse"
    mountpoint.mkdir(exist_ok=True)
    server = ["nbdkit", "--exit-with-parent", "--foreground", "file", str(folder / "live")]
    with subprocess.Popen(["nbdfuse", str(mountpoint), "[", *server, "]"]) as fuse:
        try:
            until((mountpoint / "nbd").exists, "nbdfuse serves")
            yield Disk(mountpoint / "nbd", (str(folder),))
        finally:
            subprocess.run(["fusermount3", "-u", mountpoint], check=True)
            fuse.wait()


CONTENDERS: dict[
    str, Callable[[pathlib.Path, argparse.Namespace], contextlib.AbstractContextManager[Disk]]
] = {
    "native": lambda folder, arguments: posthoc(folder, arguments, "native"),
    "python": lambda folder, arguments: posthoc(folder, arguments, "python"),
    "qemu": lambda folder, arguments: storage_daemon(folder, arguments, arguments.storage_daemon),
    "newer": lambda folder, arguments: storage_daemon(folder, arguments, arguments.newer),
    "nbdfuse": nbdfuse,
    "file": itself,
}


@dataclass(frozen=True)
class Result:
    """Of one run: requests a second, bytes a second, microseconds of the servers' time a request."""

    requests: float
    speed: float
    cpu: float


def fio(disk: Disk, job: str, arguments: argparse.Namespace) -> Result:
    pattern, block, depth = JOBS[job]
    command = ["fio", f"--name={job}", f"--filename={disk.path}", f"--size={arguments.size}"]
    command += [f"--rw={pattern}", f"--bs={block}", f"--iodepth={depth}", "--direct=1"]
    command += ["--ioengine=libaio", "--time_based=1", f"--runtime={arguments.seconds}"]
    command += ["--output-format=json", "--randrepeat=0", "--norandommap=1"]
    before = disk.cpu()
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    used = disk.cpu() - before
    side = json.loads(done.stdout)["jobs"][0]["write" if "write" in pattern else "read"]
    return Result(side["iops"], side["bw_bytes"], used / max(side["total_ios"], 1) * 1e6)


def make(path: pathlib.Path, size: int) -> None:
    block = os.urandom(1 << 20)
    with path.open("wb") as out:
        for _ in range(size >> 20):
            out.write(block)
        out.flush()
        os.fsync(out.fileno())


def measure(
    top: pathlib.Path, names: list[str], jobs: list[str], arguments: argparse.Namespace
) -> dict[tuple[str, str], list[Result]]:
    """All contenders serve at once, each a disk of its own, so that they take turns within seconds."""
    results: dict[tuple[str, str], list[Result]] = {}
    with contextlib.ExitStack() as stack:
        disks = {}
        for name in names:
            folder = top / name
            folder.mkdir()
            make(folder / "live", arguments.size)
            (folder / "reference").touch()
            os.truncate(folder / "reference", arguments.size)
            disks[name] = stack.enter_context(CONTENDERS[name](folder, arguments))
        for _ in range(arguments.rounds):
            for job in jobs:
                for name, disk in disks.items():
                    results.setdefault((name, job), []).append(fio(disk, job, arguments))
    return results


def report(results: dict[tuple[str, str], list[Result]], names: list[str], jobs: list[str]) -> None:
    peers = [name for name in names if name != names[0]]
    for job in jobs:
        print(f"\n{job:14}{'requests/s':>12}{'MB/s':>8}{'cpu us':>8}{'spread':>8}")
        middle: dict[str, float] = {}
        for name in names:
            found = results[name, job]
            rates = [result.requests for result in found]
            middle[name] = statistics.median(rates)
            speed = statistics.median(result.speed for result in found) / 1e6
            cpu = statistics.median(result.cpu for result in found)
            spread = (max(rates) - min(rates)) / middle[name]
            print(f"  {name:12}{middle[name]:12.0f}{speed:8.0f}{cpu:8.1f}{spread:8.0%}")
        ratios = (f"{middle[names[0]] / middle[peer]:.2f} x {peer}" for peer in peers)
        print(f"  {names[0]} is {', '.join(ratios)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=units.parse_size, default=256 << 20)
    parser.add_argument("--seconds", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cache", choices=["writeback", "none"], default="writeback")
    parser.add_argument("--threads", type=int, help="of the native data path")
    parser.add_argument("--only", help="contenders, the first is compared (all)")
    parser.add_argument("--jobs", default=",".join(JOBS))
    parser.add_argument("--folder", help="where the disk is made (a temporary folder)")
    parser.add_argument("--storage-daemon", default="qemu-storage-daemon")
    parser.add_argument("--newer", help="another qemu-storage-daemon")
    arguments = parser.parse_args()
    everybody = [name for name in CONTENDERS if name != "newer" or arguments.newer]
    names = arguments.only.split(",") if arguments.only else everybody
    jobs = arguments.jobs.split(",")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        results = measure(pathlib.Path(name), names, jobs, arguments)
    report(results, names, jobs)


if __name__ == "__main__":
    main()
