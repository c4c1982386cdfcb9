#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Resident memory of a mount over a sparse disk, with an open dirty.qcow2: session, keeper and server together.

    scripts/bench/memory.py [--sizes 1T,4T] [--folder DIR]

Shared pages are counted once (PSS). Target: 80 MiB and 8 MiB more for each TiB, at 64 KiB.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from dirtymap import state, units

ROOT = pathlib.Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
COMMAND = [sys.executable, "-m", "posthoc"]


def resident(pid: int) -> int:
    """Return the bytes of memory that a process has, its part of what is shared."""
    for line in pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0


def processes(mountpoint: pathlib.Path) -> dict[str, int]:
    """Return the processes of a mount, by what they are."""
    session = json.loads((mountpoint / "status.json").read_bytes())["pid"]
    found = {"session": session}
    mark = str(state.Folder(str(mountpoint)).path).encode()
    for entry in pathlib.Path("/proc").glob("[0-9]*"):
        words = (entry / "cmdline").read_bytes().split(b"\0")
        if b"keeper" in words and any(word.startswith(mark) for word in words):
            found["server" if "keeper" in found else "keeper"] = int(entry.name)
    return found


def measure(folder: pathlib.Path, size: int) -> dict[str, int]:
    images, mountpoint = [folder / "live", folder / "reference"], folder / "mnt"
    for image in images:
        image.touch()
        os.truncate(image, size)
    mountpoint.mkdir()
    subprocess.run([*COMMAND, "mount", *images, mountpoint], check=True, env=ENVIRONMENT)
    try:
        subprocess.run([*COMMAND, "wait", mountpoint], check=True, env=ENVIRONMENT)
        with open(mountpoint / "dirty.qcow2", "rb") as carrier:
            carrier.read(1 << 20)
            return {name: resident(pid) for name, pid in processes(mountpoint).items()}
    finally:
        subprocess.run([*COMMAND, "umount", mountpoint], check=True, env=ENVIRONMENT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="1T,4T")
    parser.add_argument("--folder", help="where the disk is made (a temporary folder)")
    arguments = parser.parse_args()
    for size in map(units.parse_size, arguments.sizes.split(",")):
        with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
            found = measure(pathlib.Path(name), size)
        target = (80 << 20) + (8 << 20) * size // (1 << 40)
        total = sum(found.values())
        parts = ", ".join(f"{name} {units.human(value)}" for name, value in found.items())
        print(
            f"{units.human(size):10} {units.human(total)} ({parts}); "
            f"{total / target:.2f} of the target, {units.human(target)}"
        )


if __name__ == "__main__":
    main()
