# SPDX-License-Identifier: Apache-2.0
"""QEMU processes for the tests of `attach`: qemu-storage-daemon and qemu-system, without a guest.

Each has two monitors, one for posthoc and one for the test, and disks whose nodes are named as asked.
What a guest would write comes through `Qemu.write`: qemu-io in qemu-system's human monitor, a writable NBD
export in qemu-storage-daemon. That has no human monitor, and a QEMU has but one NBD server: where it was
used, posthoc is told of it (`Qemu.server`).
"""

import contextlib
import dataclasses
import functools
import json
import pathlib
import random
import socket
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import nbd

from tests import qemu, wait

BLOCK = 4096


class Client:
    """A plain blocking QMP client for the tests' own commands."""

    def __init__(self, path: pathlib.Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(wait.DEADLINE)
        try:
            self.socket.connect(str(path))
        except OSError:
            self.socket.close()
            raise
        self.lines = self.socket.makefile("rb")
        self.lock = threading.Lock()
        assert "QMP" in json.loads(self.lines.readline())
        self("qmp_capabilities")

    def ask(self, command: str, arguments: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return the whole reply."""
        with self.lock:
            message = {"execute": command, "arguments": dict(arguments or {})}
            self.socket.sendall(json.dumps(message).encode() + b"\n")
            while "event" in (reply := json.loads(self.lines.readline())):
                pass
            result: dict[str, Any] = reply
            return result

    def __call__(self, command: str, arguments: Mapping[str, Any] | None = None) -> Any:
        """Return what the command returns; AssertionError if QEMU refuses it."""
        reply = self.ask(command, arguments)
        assert "return" in reply, (command, arguments, reply)
        return reply["return"]

    def close(self) -> None:
        self.lines.close()
        self.socket.close()


@dataclasses.dataclass
class Disk:
    """A disk to be: its node's name, its file and format."""

    node: str
    path: pathlib.Path
    format: str = "raw"
    direct: bool = False

    def blockdev(self) -> dict[str, Any]:
        cache = {"cache": {"direct": self.direct}}
        file = {"driver": "file", "filename": str(self.path), "discard": "unmap", **cache}
        return {
            "driver": self.format,
            "node-name": self.node,
            "discard": "unmap",
            "file": file,
            **cache,
        }


@dataclasses.dataclass
class Qemu:
    """A running QEMU; without a process, one that somebody else has started and will end."""

    process: "subprocess.Popen[bytes] | None"
    folder: pathlib.Path
    system: bool
    iothread: bool

    @property
    def qmp(self) -> str:
        """The monitor for posthoc."""
        return str(self.folder / "qmp")

    def __post_init__(self) -> None:
        path = self.folder / "side"
        self.connections: dict[str, nbd.NBD] = {}

        def connected() -> Client | None:
            if self.process is not None:
                assert self.process.poll() is None, (self.folder / "log").read_text()
            # The last of the sockets to be made is the one that QEMU serves when it is ready.
            with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
                return Client(path)
            return None

        self.client = wait.until(connected, "QEMU listens")

    def write(self, node: str, start: int, length: int, pattern: int) -> None:
        """Write `length` bytes of `pattern` as a guest would."""
        if self.system:
            # Silent when it went well (-q keeps its report out of the log); a failure is returned text.
            command = f'qemu-io {self._backend(node)} "write -q -P {pattern} {start} {length}"'
            said = self.client("human-monitor-command", {"command-line": command})
            assert said == "", said
            return
        self._connection(node).pwrite(bytes([pattern]) * length, start)

    def _backend(self, node: str) -> str:
        """What qemu-io writes to: the device, or what of it has the disk."""
        backend = "" if self.iothread else "/virtio-backend"
        return f"-d /machine/peripheral/dev-{node}{backend}"

    @property
    def server(self) -> pathlib.Path:
        """Where the storage daemon's NBD server listens; started with the first use."""
        path = self.folder / "nbd"
        if not path.exists():
            address = {"type": "unix", "data": {"path": str(path)}}
            self.client("nbd-server-start", {"addr": address})
        return path

    def _connection(self, node: str) -> "nbd.NBD":
        """A connection to a writable export of `node`."""
        if node not in self.connections:
            server = self.server
            export = {"type": "nbd", "id": f"guest-{node}", "name": node, "node-name": node}
            thread = {"iothread": "io0"} if self.iothread else {}
            self.client("block-export-add", {**export, **thread, "writable": True})
            handle = self.connections[node] = nbd.NBD()
            handle.connect_uri(qemu.uri(server, node))
        return self.connections[node]

    def _end_connections(self) -> None:
        if self.connections:
            # The server first: below 9.0 a client that goes by itself takes a QEMU with an iothread along.
            self.client("nbd-server-stop")
            self.connections.clear()
            (self.folder / "nbd").unlink(missing_ok=True)

    def bitmaps(self, node: str) -> dict[str, dict[str, Any]]:
        """The bitmaps of a node by name."""
        nodes = self.client("query-named-block-nodes", {"flat": True})
        (found,) = [n for n in nodes if n["node-name"] == node]
        return {bitmap["name"]: bitmap for bitmap in found.get("dirty-bitmaps", [])}

    def state(self) -> dict[str, Any]:
        """All that attach could leave behind: nodes, bitmaps, exports, and whether NBD is served.

        Asked by stopping the server: not where the test itself has begun to write by it.
        """
        nodes = self.client("query-named-block-nodes", {"flat": True})
        exports = self.client("query-block-exports")
        return {
            "nodes": sorted(
                # QEMU names implicit nodes #block123.
                (n["node-name"], sorted(b["name"] for b in n.get("dirty-bitmaps", [])))
                for n in nodes
            ),
            "exports": sorted(e["id"] for e in exports),
            "server": bool(self.connections) or "return" in self.client.ask("nbd-server-stop"),
        }

    def backup(self, target: str, **arguments: str) -> None:
        """Run `blockdev-backup` to the node `target` to its end."""
        job = {"job-id": "backup", "target": target, "auto-dismiss": False, **arguments}
        self.client("blockdev-backup", job)
        self._finish("backup")

    def _finish(self, job_id: str) -> None:
        def concluded() -> dict[str, Any] | None:
            (job,) = [j for j in self.client("query-jobs") if j["id"] == job_id]
            return job if job["status"] == "concluded" else None

        job = wait.until(concluded, f"{job_id} is done")
        self.client("job-dismiss", {"id": job_id})
        assert "error" not in job, job

    def new_target(
        self, name: str, size: int, backing: tuple[pathlib.Path, str] | None = None
    ) -> pathlib.Path:
        """Add a new qcow2 as node `name` and return its path."""
        path = self.folder / f"{name}.qcow2"
        qemu.create(path, size, "qcow2", backing=backing)
        self.client("blockdev-add", {**Disk(name, path, "qcow2").blockdev(), "backing": None})
        return path

    def backups_agree(
        self, node: str, bitmap: str, reference: tuple[pathlib.Path, str], size: int
    ) -> bool:
        """Take a full and an incremental backup; return whether they are the same disk.

        The incremental is `bitmap`'s over `reference`, so that this judges the bitmap by QEMU's own
        blockdev-backup and qemu-img compare. Nothing may be writing, and one job runs at a time: backup
        jobs that end together, or beside a connected NBD client, now and then make an assertion of QEMU's
        fail (7.2: bdrv_replace_child_noperm; 10.0: bdrv_replace_node_common).
        """
        self._end_connections()
        full = self.new_target("full", size)
        incremental = self.new_target("incremental", size, reference)
        self.backup("full", device=node, sync="full")
        kept = {"sync": "bitmap", "bitmap": bitmap, "bitmap-mode": "never"}
        self.backup("incremental", device=node, **kept)
        for name in ("full", "incremental"):
            self.client("blockdev-del", {"node-name": name})
        same = qemu.identical(full, incremental, ("qcow2", "qcow2"))
        full.unlink()
        incremental.unlink()
        return same

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """End it, in order where it still answers."""
        assert self.process is not None
        if self.process.poll() is None:
            with contextlib.suppress(OSError, ValueError, AssertionError):
                self.client("quit")
        self.client.close()
        try:
            self.process.wait(wait.DEADLINE)
        except subprocess.TimeoutExpired:
            self.kill()
        self.connections.clear()


@contextlib.contextmanager
def running(
    *disks: Disk, system: bool = False, iothread: bool = False, arguments: Sequence[str] = ()
) -> Iterator[Qemu]:
    """Run qemu-storage-daemon, or qemu-system, over `disks`; in an iothread when asked.

    What holds a disk there is a device in qemu-system, in qemu-storage-daemon the export of Qemu.write.
    """
    with folder() as where:
        command = _system(where) if system else _storage_daemon(where)
        if iothread:
            command += ["-object" if system else "--object", "iothread,id=io0"]
        if system and iothread:
            # virtio-blk moves its disk there when its guest starts it; SCSI does at once.
            command += ["-device", "virtio-scsi-pci,id=scsi0,iothread=io0"]
        for disk in disks:
            command += ["-blockdev" if system else "--blockdev", json.dumps(disk.blockdev())]
            if system:
                driver = "scsi-hd,bus=scsi0.0" if iothread else "virtio-blk-pci"
                command += ["-device", f"{driver},drive={disk.node},id=dev-{disk.node}"]
        command += arguments
        with (where / "log").open("wb") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=where
            )
        try:
            instance = Qemu(process, where, system, iothread)
        except BaseException:
            process.kill()
            process.wait()
            raise
        try:
            yield instance
        except BaseException as error:
            if (status := process.poll()) is not None:
                error.add_note(f"QEMU ended with {status}: {(where / 'log').read_text()}")
            raise
        finally:
            instance.stop()


def _storage_daemon(folder: pathlib.Path) -> list[str]:
    command = ["qemu-storage-daemon"]
    for name in ("qmp", "side"):
        command += ["--chardev", f"socket,path={folder / name},server=on,wait=off,id={name}"]
        command += ["--monitor", f"chardev={name}"]
    return command


def _system(folder: pathlib.Path) -> list[str]:
    """A machine that is never started: what is under test is its block layer."""
    command = ["qemu-system-x86_64", "-S", "-accel", "tcg", "-machine", "q35", "-m", "16"]
    command += ["-nodefaults", "-no-user-config", "-display", "none"]
    return [*command, *monitors(folder)]


def monitors(folder: pathlib.Path) -> list[str]:
    """qemu-system's options for the two monitors."""
    words = []
    for name in ("qmp", "side"):
        words += ["-qmp", f"unix:{folder / name},server=on,wait=off"]
    return words


@contextlib.contextmanager
def folder() -> Iterator[pathlib.Path]:
    """A folder of a short name: a socket's path has at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="posthoc-vm-", dir="/tmp") as name:
        yield pathlib.Path(name)


class Writer(threading.Thread):
    """Writes random blocks of one node, one a millisecond at most, until stopped; counts them."""

    def __init__(self, write: Callable[[int, int, int], None], size: int, seed: int = 1) -> None:
        super().__init__(daemon=True)
        self.write = write
        self.size = size
        self.random = random.Random(seed)
        self.count = 0
        self.error: BaseException | None = None
        self.ending = threading.Event()

    def run(self) -> None:
        try:
            while not self.ending.wait(0.001):
                self.write_one()
                self.count += 1
        except BaseException as error:  # noqa: BLE001 - told by stop()
            self.error = error

    def write_one(self) -> None:
        self.write_within(0, self.size)

    def write_within(self, first: int, last: int) -> None:
        start = self.random.randrange(first // BLOCK, last // BLOCK) * BLOCK
        self.write(start, BLOCK, self.random.randrange(1, 256))

    def stop(self) -> None:
        self.ending.set()
        self.join(wait.DEADLINE)
        assert not self.is_alive()
        if self.error is not None:
            raise self.error


class Chaser(Writer):
    """Writes before, in and behind the place that a scan reads, in turn; `landed` counts each."""

    reading = range(0)

    def __init__(self, write: Callable[[int, int, int], None], size: int) -> None:
        super().__init__(write, size)
        self.landed = dict.fromkeys(("before", "in", "behind"), 0)
        self.reads = 0

    def write_one(self) -> None:
        reading = self.reading
        for where, (first, last) in self.places(reading).items():
            self.write_within(first, last)
            if reading is self.reading:
                self.landed[where] += 1

    def places(self, reading: range) -> dict[str, tuple[int, int]]:
        """The places around `reading` that have room for a block."""
        before, behind = (0, reading.start), (reading.stop, self.size)
        all_of_them = {"before": before, "in": (reading.start, reading.stop), "behind": behind}
        return {
            where: (first, last)
            for where, (first, last) in all_of_them.items()
            if last - first >= BLOCK
        }

    def read(self, start: int, length: int, ask: Callable[[], None]) -> None:
        """Read by `ask`, and return when a write to each place has been begun and has ended meanwhile."""
        self.reading = range(start, start + length)
        before = dict(self.landed)
        ask()
        wait.until(
            lambda: (
                self.error
                or all(self.landed[where] > before[where] for where in self.places(self.reading))
            ),
            "writes around what is read",
        )
        self.reads += 1


@contextlib.contextmanager
def stopped_at_the_end(writer: Writer) -> Iterator[None]:
    """Let `writer` write while the block runs; the first hundred writes are done when it begins."""
    writer.start()
    try:
        wait.until(lambda: writer.count > 100 or writer.error, "the writer writes")
        yield
    finally:
        writer.stop()


@contextlib.contextmanager
def writing(vm: Qemu, node: str, size: int) -> Iterator[Writer]:
    """Write to random places of `node` while the block runs."""
    writer = Writer(functools.partial(vm.write, node), size)
    with stopped_at_the_end(writer):
        yield writer


@contextlib.contextmanager
def chasing(vm: Qemu, node: str, size: int) -> Iterator[Chaser]:
    """Write around what is read while the block runs (Chaser.read)."""
    chaser = Chaser(functools.partial(vm.write, node), size)
    with stopped_at_the_end(chaser):
        yield chaser
