# SPDX-License-Identifier: Apache-2.0
"""A mount over the native data path, for the tests: `python -m tests.overlayfs.datapath.serve JSON`.

It says "mounted" when it is. Facts are in the mount's status.json, so that a session that the keeper has
started again, which no test holds a pipe of, tells them too.
"""

import json
import logging
import os
import pathlib
import signal
import sys
import time
from typing import Any

import trio

from dirtymap import bitmap, errors, images
from dirtymap.images import file
from overlayfs import datapath, filesystem, mount
from overlayfs.datapath import native


def segments(bits: bitmap.Bitmap) -> list[list[int]]:
    return [list(run) for run in bits.runs()]


class Facts:
    """What the session and the shared memory know, as of the opening."""

    name, mode = "status.json", 0o444

    def __init__(self, path: native.NativeDatapath, control: "Control") -> None:
        self._path = path
        self._control = control
        self.openers: dict[int, filesystem.Content] = {}

    def _text(self) -> bytes:
        header = self._path.memory.header
        guest = self._path.recorder.statistics()
        facts = {
            "pid": os.getpid(),
            "description": self._path.description(),
            "written": segments(self._path.recorder.written),
            "taken": segments(self._path.memory.taken),
            "control": self._control.taken,
            "openers": len(self.openers),
            "depth": self._path.recorder.depth,
            **{
                name: int(getattr(header, name))
                for name in (
                    "servers",
                    "sessions",
                    "locked",
                    "epoch",
                    "granted_flags",
                    "kernel_flags",
                )
            },
            "guest": {
                name: [k.operations, k.bytes, k.errors, int(k.histogram.sum())]
                for name in ("read", "write", "flush", "discard")
                for k in [getattr(guest, name)]
            },
        }
        return json.dumps(facts).encode()

    def length(self) -> int:
        return len(self._text())

    async def open(self) -> filesystem.Text:
        return filesystem.Text(self._text())

    def write(self, data: bytes) -> None:
        raise AssertionError


class Large:
    """Three MiB and a bit that never change: byte i is i // 4096."""

    name, mode = "dirty.qcow2", 0o444
    data = b"".join(bytes([page % 251]) * 4096 for page in range(768)) + bytes(17)

    def length(self) -> int:
        return len(self.data)

    async def open(self) -> filesystem.Text:
        return filesystem.Text(self.data)

    def write(self, data: bytes) -> None:
        raise AssertionError


class Control:
    """Keeps the commands it was given; one of them is this process's death, another blocks it."""

    name, mode = "control", 0o200

    def __init__(self) -> None:
        self.taken: list[str] = []

    def length(self) -> int:
        return 0

    async def open(self) -> filesystem.Text:
        raise AssertionError

    def write(self, data: bytes) -> None:
        for line in data.decode().splitlines():
            if line == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if line.startswith("block "):
                time.sleep(float(line.removeprefix("block ")))
            self.taken.append(line)


class Session:
    """The mount from its making or adoption to its end."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        self.socket = pathlib.Path(config["socket"])
        if config.get("adopted"):
            self.path = native.NativeDatapath.adopt(self.socket)
            self.config = config = json.loads(self.path.session)
        else:
            self.path = self._create()

    def _create(self) -> native.NativeDatapath:
        config = self.config
        image = images.open(config["live"], writable=not config.get("read_only"))
        assert isinstance(image, file.FileImage)
        try:
            path = native.NativeDatapath.create(
                image.fd,
                image.size,
                config.get("granularity", 65536),
                self.socket,
                **config.get("options", {}),
            )
        finally:
            image.close()
        restart = [
            *(sys.executable, "-m", "tests.overlayfs.datapath.serve"),
            json.dumps({"adopted": True, "socket": config["socket"]}),
        ]
        path.remember(json.dumps(config).encode(), restart if config.get("restart") else ())
        return path

    async def run(self, *, adopted: bool) -> int:
        control = Control()
        facts = Facts(self.path, control)
        files = filesystem.Filesystem(
            self.path.disk,
            [facts, Large(), control],
            read_only=self.config.get("options", {}).get("read_only", False),
        )
        facts.openers = files._contents
        options = datapath.MountOptions(allow_other=bool(self.config.get("allow_other")))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._stop_on_signal, nursery.cancel_scope)
            where = await nursery.start(self._serve, files, options, adopted, nursery.cancel_scope)
            print(f"mounted {where}", flush=True)
        return 0

    async def _serve(
        self,
        files: filesystem.Filesystem,
        options: datapath.MountOptions,
        adopted: bool,
        scope: trio.CancelScope,
        *,
        task_status: trio.TaskStatus[str],
    ) -> None:
        where = self.config["mountpoint"]
        await mount.serve(
            files, self.path, where, options, adopted=adopted, task_status=task_status
        )
        scope.cancel()

    async def _stop_on_signal(self, scope: trio.CancelScope) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async for _ in signals:
                scope.cancel()

    def close(self) -> None:
        if "map" in self.config:
            pathlib.Path(self.config["map"]).write_text(
                json.dumps(segments(self.path.recorder.written))
            )
        self.path.close()


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    config = json.loads(sys.argv[1])
    try:
        session = Session(config)
        try:
            return trio.run(lambda: session.run(adopted=bool(config.get("adopted"))))
        finally:
            session.close()
    except* errors.UserError as group:
        print(f"refused {group.exceptions[0]}", flush=True)
    return 2


if __name__ == "__main__":
    sys.exit(main())
