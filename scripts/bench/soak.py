#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""fio with verification through the mount, engine after engine, for as long as it is let: does anything go wrong?

    scripts/bench/soak.py [--minutes 10] [--datapath native] [--cache none] [--size 512M] [--folder DIR]

The scan begins again all the while. At the end the map is compared with the difference between the images.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from dirtymap import units

ROOT = pathlib.Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
COMMAND = [sys.executable, "-m", "posthoc"]

# fio's engine, block sizes and what else it takes.
ENGINES = [
    ("libaio", "4k", ["--direct=1", "--iodepth=16"]),
    ("io_uring", "4k", ["--direct=1", "--iodepth=16"]),
    ("psync", "512-64k", ["--numjobs=1"]),
    ("libaio", "64k-1m", ["--direct=1", "--iodepth=4"]),
    ("mmap", "4k", []),
]


def posthoc(*words: object) -> None:
    subprocess.run([*COMMAND, *map(str, words)], check=True, env=ENVIRONMENT)


def fio(disk: pathlib.Path, number: int, size: int) -> int:
    """Write and verify all of a stretch with one engine; return the bytes written."""
    engine, blocks, options = ENGINES[number % len(ENGINES)]
    command = ["fio", "--name=soak", f"--filename={disk}", f"--size={size}", "--rw=randwrite"]
    command += [f"--bsrange={blocks}" if "-" in blocks else f"--bs={blocks}", *options]
    command += [
        f"--ioengine={engine}",
        "--verify=crc32c",
        "--verify_fatal=1",
        f"--randseed={number}",
    ]
    command += ["--verify_state_save=0", "--output-format=json"]
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, cwd=disk.parent.parent
    )
    job = json.loads(done.stdout)["jobs"][0]
    assert job["error"] == 0, job
    return int(job["write"]["io_bytes"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--datapath", default="native")
    parser.add_argument("--cache", choices=["writeback", "none"], default="writeback")
    parser.add_argument("--size", type=units.parse_size, default=512 << 20)
    parser.add_argument("--folder", help="where the disk is made (a temporary folder)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = pathlib.Path(name)
        live, reference, mountpoint = folder / "live", folder / "reference", folder / "mnt"
        for image in (live, reference):
            image.touch()
            os.truncate(image, arguments.size)
        mountpoint.mkdir()
        output = folder / "map.qcow2"
        posthoc(
            "mount",
            "--datapath",
            arguments.datapath,
            "--cache",
            arguments.cache,
            "--output",
            output,
            live,
            reference,
            mountpoint,
        )
        end = time.monotonic() + arguments.minutes * 60
        runs = written = 0
        try:
            while time.monotonic() < end:
                (mountpoint / "control").write_text("rescan\n")
                written += fio(mountpoint / "disk", runs, arguments.size // 4)
                runs += 1
            posthoc("wait", mountpoint)
            guest = json.loads((mountpoint / "status.json").read_bytes())["guest"]
        finally:
            posthoc("umount", mountpoint)
        posthoc("verify", output, live, reference)
        failed = sum(counted["errors"] for counted in guest.values())
        print(
            f"{runs} runs of fio, {units.human(written)} written and verified, {failed} errors, no segment missed"
        )


if __name__ == "__main__":
    main()
