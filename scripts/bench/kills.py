#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What a guest feels when a process of its mount is killed: its longest wait, and any error.

    scripts/bench/kills.py [--kills 100] [--folder DIR] [--cache writeback|none]

fio writes and verifies 4 KiB blocks while the server of the native data path is killed every now and then, then
while the session is, then while nobody is. Aim: 20 ms for the server, nothing for the session.
"""

import argparse
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from dirtymap import state
from overlayfs.datapath import keeper

ROOT = pathlib.Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
COMMAND = [sys.executable, "-m", "posthoc"]
SIZE = 256 << 20
PAUSE = 0.2


def session(mountpoint: pathlib.Path) -> int:
    return int(json.loads((mountpoint / "status.json").read_bytes())["pid"])


def server(mountpoint: pathlib.Path) -> int:
    path = state.Folder(str(mountpoint)).path / "keeper.sock"
    while True:
        serving = int(keeper.ask(path, "pids").split()[1])
        if serving:
            return serving


def fio(mountpoint: pathlib.Path) -> "subprocess.Popen[str]":
    command = ["fio", "--name=verify", f"--filename={mountpoint / 'disk'}", f"--size={SIZE}"]
    command += ["--rw=randwrite", "--bs=4k", "--iodepth=4", "--direct=1", "--ioengine=libaio"]
    command += ["--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0", "--loops=1000"]
    command += ["--do_verify=1", "--verify_backlog=1024", "--output-format=json"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=mountpoint.parent)


def run(mountpoint: pathlib.Path, what: str, kills: int) -> str:
    """Kill `what` so many times under fio; return what fio saw."""
    writer = fio(mountpoint)
    answers = []
    for _ in range(kills):
        time.sleep(PAUSE)
        if what == "nothing":
            continue
        os.kill({"server": server, "session": session}[what](mountpoint), signal.SIGKILL)
        began = time.monotonic()
        session(mountpoint)
        answers.append(time.monotonic() - began)
    writer.send_signal(signal.SIGINT)
    said, _ = writer.communicate()
    # fio reports its end by a signal on a line before the JSON.
    found = json.loads(said[said.index("{") :])["jobs"][0]
    longest = max(found[side]["clat_ns"]["max"] for side in ("read", "write")) / 1e6
    total = found["read"]["total_ios"] + found["write"]["total_ios"]
    text = f"{kills} kills of the {what:8} error {found['error']}, {total} requests, longest wait {longest:.0f} ms"
    return text + (f", status within {max(answers) * 1000:.0f} ms" if answers else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--folder", help="where the disk is made (a temporary folder)")
    parser.add_argument("--cache", choices=["writeback", "none"], default="writeback")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = pathlib.Path(name)
        images, mountpoint = [folder / "live", folder / "reference"], folder / "mnt"
        for image in images:
            image.touch()
            os.truncate(image, SIZE)
        mountpoint.mkdir()
        options = ["--datapath", "native", "--rate", "1M", "--cache", arguments.cache]
        subprocess.run(
            [*COMMAND, "mount", *options, *images, mountpoint], check=True, env=ENVIRONMENT
        )
        try:
            for what in ("nothing", "server", "session"):
                print(run(mountpoint, what, arguments.kills), flush=True)
        finally:
            subprocess.run([*COMMAND, "umount", mountpoint], check=True, env=ENVIRONMENT)


if __name__ == "__main__":
    main()
