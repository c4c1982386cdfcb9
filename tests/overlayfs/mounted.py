# SPDX-License-Identifier: Apache-2.0
"""A mount served by another process (tests/overlayfs/serve.py), as a test holds it."""

import dataclasses
import json
import os
import pathlib
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from tests import builds, wait

ROOT = pathlib.Path(__file__).resolve().parents[2]

# What is asked of an image: its gates and its broken places.
_OF_THE_IMAGE = {"close_gate", "open_gate", "waiting", "break", "mend"}


@dataclasses.dataclass
class Mounted:
    """The process, its mount, and the file in which it records."""

    process: subprocess.Popen[bytes]
    live: pathlib.Path
    mountpoint: pathlib.Path
    record: pathlib.Path
    log: pathlib.Path
    granularity: int
    # Who serves the image beneath, where that is another (see `stacked`).
    image: "Mounted | None" = None
    _pending: bytes = b""
    _has_mounted: bool = False

    @property
    def disk(self) -> pathlib.Path:
        return self.mountpoint / "disk"

    def line(self, deadline: float = wait.DEADLINE) -> dict[str, Any]:
        """Return the next line that the process says."""
        assert self.process.stdout is not None
        end = time.monotonic() + deadline
        while b"\n" not in self._pending:
            ready, _, _ = select.select([self.process.stdout], [], [], end - time.monotonic())
            assert ready, "the server says nothing"
            data = os.read(self.process.stdout.fileno(), 65536)
            assert data, f"the server has ended: {self.log.read_text()}"
            self._pending += data
        line, _, self._pending = self._pending.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        self._has_mounted |= "mounted" in answer
        return answer

    def ask(self, name: str, *arguments: Any) -> Any:
        """Have the process do something (a method do_NAME of serve.Server), or who serves its image."""
        if self.image is not None and name in _OF_THE_IMAGE:
            return self.image.ask(name, *arguments)
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([name, *arguments]).encode() + b"\n")
        self.process.stdin.flush()
        return self.line()["answer"]

    def facts(self) -> dict[str, Any]:
        answer: dict[str, Any] = self.ask("facts")
        if self.image is not None:
            answer["syncs"] = self.image.facts()["syncs"]
        return answer

    def open_gates(self) -> None:
        """Open all gates, also of a process that takes no commands any more."""
        (self.image or self).process.send_signal(signal.SIGUSR1)

    def written(self) -> set[int]:
        """Return the segments whose bit is set in the write bitmap, read from the shared file.

        Of the native data path, whose memory has no name, the file is there at its end.
        """
        if not self.record.exists():
            return set(self.ask("written"))
        segments = -(-self.live.stat().st_size // self.granularity)
        data = self.record.read_bytes()[: -(-segments // 8)]
        return {8 * i + bit for i, byte in enumerate(data) for bit in range(8) if byte >> bit & 1}

    def wait_until_waiting(self, gate: str, count: int = 1) -> None:
        """Return when `count` writes stand at a gate."""
        wait.until(lambda: self.ask("waiting", gate) >= count, f"{count} writes at gate {gate}")

    def end(self) -> int:
        """Wait for the process and return its exit status."""
        return self.process.wait(wait.DEADLINE)

    def terminate(self) -> int:
        """SIGTERM, as a session gets it."""
        self.process.send_signal(signal.SIGTERM)
        return self.end()

    def close(self) -> None:
        """End the process whatever has become of it, and its mount."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()
        if self._has_mounted and self.is_mounted():
            subprocess.run(["umount", "--lazy", self.mountpoint], check=False)

    def is_mounted(self) -> bool:
        return f" {self.mountpoint} " in pathlib.Path("/proc/self/mountinfo").read_text()


def spawn(
    folder: pathlib.Path,
    live: pathlib.Path,
    mountpoint: pathlib.Path,
    *,
    granularity: int = 65536,
    environment: Mapping[str, str] | None = None,
    **config: Any,
) -> Mounted:
    """Start a server; its first line has not been read."""
    record, log = folder / "record", folder / "serve.log"
    record.unlink(missing_ok=True)
    config |= {"live": str(live), "mountpoint": str(mountpoint), "record": str(record)}
    config["granularity"] = granularity
    with log.open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.overlayfs.serve", json.dumps(config)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env={**os.environ, **(environment or {})},
        )
    return Mounted(process, live, mountpoint, record, log, granularity)


@contextmanager
def serving(
    folder: pathlib.Path, live: pathlib.Path, mountpoint: pathlib.Path, **config: Any
) -> Iterator[Mounted]:
    """Mount, and at the end of the block see the process end well if it has not yet."""
    mounted = spawn(folder, live, mountpoint, **config)
    try:
        assert mounted.line() == {"mounted": str(mountpoint)}
        yield mounted
        if mounted.process.poll() is None:
            assert mounted.terminate() == 0, mounted.log.read_text()
    finally:
        mounted.close()
    builds.check(mounted.log.read_text())


@contextmanager
def stacked(
    folder: pathlib.Path,
    live: pathlib.Path,
    mountpoint: pathlib.Path,
    *,
    mark_late: bool = False,
    environment: Mapping[str, str] | None = None,
    **config: Any,
) -> Iterator[Mounted]:
    """Mount natively over the disk of a mount over python, which has the gates and the broken places.

    `mark_late` is the mistake that the tests must be able to find: the first of the two marks is left away.
    """
    below = folder / "below"
    (below / "mnt").mkdir(parents=True)
    if mark_late:
        program = str(builds.datapath("faults"))
        environment = {"POSTHOC_DATAPATH": program, "POSTHOC_FAULTS": "no-mark-before"}
    with serving(below, live, below / "mnt") as image:
        config |= {"datapath": "native", "environment": environment}
        with serving(folder, image.disk, mountpoint, **config) as it:
            it.image, it.live = image, live
            yield it
