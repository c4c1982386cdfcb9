# SPDX-License-Identifier: Apache-2.0
"""A mount in a process of its own, for the tests: `python -m tests.overlayfs.serve JSON`.

pyfuse3 has one session a process, and whoever uses a mount must not be who serves it. The write bitmap
and the statistics lie in a file (`record`), which the test reads with its own eyes. Commands come on
stdin, one JSON list a line, and each is answered with a line of JSON; the end of stdin cancels, as
SIGTERM does.
"""

import contextlib
import errno
import inspect
import json
import logging
import mmap
import os
import pathlib
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from typing import Any

import trio

from dirtymap import errors, images
from dirtymap.images import base
from overlayfs import datapath, filesystem, mount, recorder
from overlayfs.datapath import forward, keeper, kept, native, python


class Held:
    """Gates before the reads, before and behind the writes of an image: a closed one stops the thread."""

    def __init__(self) -> None:
        self.gates = {name: threading.Event() for name in ("read", "before", "after")}
        self.waiting = dict.fromkeys(self.gates, 0)
        self._lock = threading.Lock()
        self.open_all()
        # A session that is being cancelled takes no commands any more.
        signal.signal(signal.SIGUSR1, lambda *_: self.open_all())

    def open_all(self) -> None:
        for gate in self.gates.values():
            gate.set()

    def close(self, name: str) -> None:
        self.gates[name].clear()

    def open(self, name: str) -> None:
        self.gates[name].set()

    def through(self, name: str) -> None:
        with self._lock:
            self.waiting[name] += 1
        self.gates[name].wait()
        with self._lock:
            self.waiting[name] -= 1


class GatedImage:
    """A raw image with gates around its writes and failures where a test asks for them."""

    def __init__(self, inner: base.WritableImage) -> None:
        self._inner = inner
        self.held = Held()
        self.broken: dict[tuple[str, int], int] = {}
        self.syncs: list[bool] = []
        self.zeroed: list[tuple[str, int, int]] = []
        self.most_at_once = 0
        self._at_once = 0
        self._lock = threading.Lock()
        self.name, self.size = inner.name, inner.size

    def break_at(self, verb: str, start: int, number: int) -> None:
        """Make `verb` fail with errno `number` where it touches byte `start`."""
        self.broken[verb, start] = number

    def _fail(self, verb: str, start: int, length: int) -> None:
        for (broken, at), number in self.broken.items():
            if broken == verb and start <= at < start + max(length, 1):
                raise OSError(number, os.strerror(number))

    @contextlib.contextmanager
    def _counted(self) -> Any:
        with self._lock:
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            yield
        finally:
            with self._lock:
                self._at_once -= 1

    def read_into(self, start: int, buffer: memoryview) -> None:
        with self._counted():
            self.held.through("read")
            self._fail("read", start, len(buffer))
            self._inner.read_into(start, buffer)

    def extents(self, start: int, length: int, deadline: float | None = None) -> Any:
        return self._inner.extents(start, length, deadline)

    def write(self, start: int, buffer: bytes | memoryview) -> None:
        with self._counted():
            self.held.through("before")
            # A failing write has changed what comes before the broken place.
            for verb, at in self.broken:
                if verb == "write" and start < at < start + len(buffer):
                    self._inner.write(start, buffer[: at - start])
            self._fail("write", start, len(buffer))
            self._inner.write(start, buffer)
            self.held.through("after")

    def flush(self, datasync: bool = True) -> None:
        self.syncs.append(datasync)
        self._fail("flush", 0, 0)
        self._inner.flush(datasync)

    def zero(self, start: int, length: int) -> None:
        self._make_zero("zero", start, length)

    def discard(self, start: int, length: int) -> None:
        self._make_zero("discard", start, length)

    def _make_zero(self, verb: str, start: int, length: int) -> None:
        self.zeroed.append((verb, start, length))
        self.held.through("before")
        self._fail(verb, start, length)
        self._inner.write(start, bytes(length))
        self.held.through("after")

    def close(self) -> None:
        self._inner.close()


class LateDisk(python.PythonDisk):
    """The mistake the tests must be able to find: it marks after the write."""

    async def write(self, start: int, data: bytes) -> int:
        await trio.to_thread.run_sync(self._write, start, data)
        self._recorder.mark(start, len(data))
        return len(data)


class FailingDatapath(python.PythonDatapath):
    """A data path that a test may make fail, or never begin."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.failure = trio.Event()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        task_status.started()
        await self.failure.wait()
        raise RuntimeError("the data path has failed")


class FailingNative(native.NativeDatapath):
    """The same of the native one."""

    failure: trio.Event

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(super().run)
            task_status.started()
            await self.failure.wait()
            raise RuntimeError("the data path has failed")


class Status:
    """A virtual file whose contents are made at each opening: it counts them."""

    name, mode = "status", 0o444

    def __init__(self) -> None:
        self.opened = 0

    def _text(self) -> bytes:
        return "".join(f"line {i} of opening {self.opened}\n" for i in range(200)).encode()

    def length(self) -> int:
        return len(self._text())

    async def open(self) -> filesystem.Text:
        content = filesystem.Text(self._text())
        self.opened += 1
        return content

    def write(self, data: bytes) -> None:
        raise AssertionError("status is not writable")


class Large:
    """A file of a known length with contents of no end of openings: byte i is i // 4096 + opening."""

    name, mode = "dirty.qcow2", 0o444
    size = 3 * 1024 * 1024 + 17

    def __init__(self) -> None:
        self.opened = 0

    def length(self) -> int:
        return self.size

    async def open(self) -> filesystem.Text:
        self.opened += 1
        pages = -(-self.size // 4096)
        data = b"".join(bytes([(page + self.opened) % 256]) * 4096 for page in range(pages))
        return filesystem.Text(data[: self.size])

    def write(self, data: bytes) -> None:
        raise AssertionError("dirty.qcow2 is not writable")


class Control:
    """Keeps the commands it was given."""

    name, mode = "control", 0o200

    def __init__(self) -> None:
        self.taken: list[str] = []

    def length(self) -> int:
        return 0

    async def open(self) -> filesystem.Text:
        raise AssertionError("control is not readable")

    def write(self, data: bytes) -> None:
        for line in data.decode().splitlines():
            if line == "bad":
                raise ValueError("no such command")
            if line == "busy":
                raise OSError(errno.EBUSY, "busy")
            if line == "bug":
                raise KeyError("a bug in a command")
            self.taken.append(line)


class Server:
    """The mount and what a test may ask of its process."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        self.read_only = bool(config.get("read_only"))
        image = images.open(config["live"], writable=not self.read_only)
        self.image = GatedImage(image)
        self.path: Any = self._path(image, config.get("granularity", 65536))
        self.recorder = self.path.recorder
        self.status, self.large, self.control = Status(), Large(), Control()
        self.taken: Any = None
        self.drained = False

    def _path(self, image: Any, granularity: int) -> datapath.Datapath:
        record = recorder.Recorder(image.size, granularity, self._record(image.size, granularity))
        threads = self.config.get("threads", datapath.DEFAULT_THREADS)
        path = FailingDatapath(self.image, record, threads)
        if self.config.get("mark_late"):
            path.disk = LateDisk(self.image, record, threads)
        return path

    def _record(self, size: int, granularity: int) -> memoryview | None:
        if "record" not in self.config:
            return None
        with open(self.config["record"], "w+b") as file:
            file.truncate(recorder.buffer_length(size, granularity))
            return memoryview(mmap.mmap(file.fileno(), 0))

    async def run(self) -> int:
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._stop_on_signal, nursery.cancel_scope)
                try:
                    where = await nursery.start(self._serve, nursery.cancel_scope)
                except errors.UserError as error:
                    say({"refused": str(error)})
                    nursery.cancel_scope.cancel()
                    return 2
                say({"mounted": where})
                nursery.start_soon(self._commands, nursery)
        finally:
            self._close()
        return 0

    def _close(self) -> None:
        self.path.close()
        self.image.close()

    async def _serve(self, scope: trio.CancelScope, *, task_status: trio.TaskStatus[str]) -> None:
        files = filesystem.Filesystem(
            self.path.disk, [self.status, self.large, self.control], read_only=self.read_only
        )
        options = datapath.MountOptions(
            allow_other=bool(self.config.get("allow_other")), read_only=self.read_only
        )
        where = self.config["mountpoint"]
        await mount.serve(files, self.path, where, options, task_status=task_status)
        scope.cancel()

    async def _stop_on_signal(self, scope: trio.CancelScope) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async for _ in signals:
                scope.cancel()

    async def _commands(self, nursery: trio.Nursery) -> None:
        stdin = trio.lowlevel.FdStream(os.dup(0))
        pending = b""
        async for data in stdin:
            *lines, pending = (pending + data).split(b"\n")
            for line in lines:
                name, *arguments = json.loads(line)
                handler: Callable[..., Any] = getattr(self, f"do_{name}")
                answer = handler(nursery, *arguments)
                say({"answer": await answer if inspect.isawaitable(answer) else answer})
        nursery.cancel_scope.cancel()

    # What a test may ask

    def do_close_gate(self, _: trio.Nursery, name: str) -> None:
        self.image.held.close(name)

    def do_open_gate(self, _: trio.Nursery, name: str) -> None:
        self.image.held.open(name)

    def do_waiting(self, _: trio.Nursery, name: str) -> int:
        return self.image.held.waiting[name]

    def do_break(self, _: trio.Nursery, verb: str, start: int, number: int) -> None:
        self.image.break_at(verb, start, number)

    def do_mend(self, _: trio.Nursery) -> None:
        self.image.broken.clear()

    def do_facts(self, _: trio.Nursery) -> dict[str, Any]:
        return {
            "syncs": self.image.syncs,
            "zeroed": self.image.zeroed,
            "most_at_once": self.image.most_at_once,
            "depth": self.recorder.depth,
            "control": self.control.taken,
            "description": self.path.description(),
            "status_opened": self.status.opened,
            "drained": self.drained,
            "guest": {
                name: [k.operations, k.bytes, k.errors, int(k.histogram.sum())]
                for name in ("read", "write", "flush", "discard")
                for k in [getattr(self.recorder.statistics(), name)]
            },
        }

    async def do_swap(self, _: trio.Nursery) -> list[int]:
        taken = await self.path.swap()
        return [first + i for first, count in taken.runs() for i in range(count)]

    def do_drain(self, nursery: trio.Nursery) -> None:
        self.drained = False
        nursery.start_soon(self._drain)

    async def _drain(self) -> None:
        await self.path.drain()
        self.drained = True

    def do_fail_run(self, _: trio.Nursery) -> None:
        self.path.failure.set()


class ForwardServer(Server):
    """The same behind the native program."""

    def _path(self, image: Any, granularity: int) -> datapath.Datapath:
        # A socket's path is short; a test's folder need not be.
        self.folder = tempfile.TemporaryDirectory(prefix="posthoc-")
        self.socket = pathlib.Path(self.folder.name, "keeper")
        return forward.ForwardDatapath.create(
            self.image,
            recorder.Recorder(image.size, granularity, self._record(image.size, granularity)),
            self.socket,
            threads=self.config.get("threads", datapath.DEFAULT_THREADS),
            socket_buffer=self.config.get("socket_buffer", kept.SOCKET_BUFFER),
        )

    def _close(self) -> None:
        super()._close()
        self.folder.cleanup()

    def do_kill(self, _: trio.Nursery, role: str) -> None:
        """Kill "keeper" or "server", which is replaced."""
        pids = keeper.ask(self.socket, "pids").split()
        os.kill(int(pids[["keeper", "server"].index(role)]), signal.SIGKILL)

    def do_servers(self, _: trio.Nursery) -> int:
        return int(self.path._memory.header.servers)


class NativeServer(Server):
    """The same over the native data path, whose program knows no gates and no broken places."""

    cache = "writeback"

    def _path(self, image: Any, granularity: int) -> datapath.Datapath:
        # A socket's path is short; a test's folder need not be.
        self.folder = tempfile.TemporaryDirectory(prefix="posthoc-")
        self.socket = pathlib.Path(self.folder.name, "keeper")
        path = FailingNative.create(
            image.fd,
            image.size,
            granularity,
            self.socket,
            read_only=self.read_only,
            threads=self.config.get("threads"),
            cache=self.cache,
        )
        assert isinstance(path, FailingNative)
        path.failure = trio.Event()
        return path

    def _close(self) -> None:
        super()._close()
        self.folder.cleanup()
        # What it recorded lies in memory that ends with it.
        pathlib.Path(self.config["record"]).write_bytes(self.recorder.written.data.tobytes())

    async def do_commit(self, _: trio.Nursery) -> None:
        await self.path.commit()

    def do_taken(self, _: trio.Nursery) -> list[int]:
        return [first + i for first, count in self.path.memory.taken.runs() for i in range(count)]

    def do_pids(self, _nursery: trio.Nursery) -> list[int]:
        keeping, serving, _ = map(int, keeper.ask(self.socket, "pids").split())
        return [keeping, serving, self.path.memory.header.standby_pid]

    def do_written(self, _: trio.Nursery) -> list[int]:
        return [first + i for first, count in self.recorder.written.runs() for i in range(count)]


class DirectServer(NativeServer):
    """The same around the host's page cache."""

    cache = "none"


def say(what: dict[str, Any]) -> None:
    print(json.dumps(what), flush=True)


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    config = json.loads(sys.argv[1])
    kinds = {"native": NativeServer, "direct": DirectServer, "forward": ForwardServer}
    return trio.run(kinds.get(config.get("datapath"), Server)(config).run)


if __name__ == "__main__":
    sys.exit(main())
