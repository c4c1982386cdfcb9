# SPDX-License-Identifier: Apache-2.0
"""QMP, QEMU's monitor protocol, for trio.

One JSON object a line, both ways: QEMU greets, the client answers `qmp_capabilities`, then each command
gets one reply with its id, and events come in between (QEMU, docs/interop/qmp-spec).

    Monitor               what a session needs of a monitor, whatever carries it
    ├── SocketMonitor     QEMU's own unix socket (this module)
    └── VirshMonitor      libvirt's monitor, through virsh (virsh.py): no events

    MonitorError          UserError: one line
    ├── CommandError      QEMU refused: the command and the reply are kept
    ├── TimeoutError      no reply in time; QEMU may still do it
    ├── ProtocolError     what came is no QMP
    └── Disconnected      QEMU has gone, or has closed the monitor

Why not PyPI's qemu.qmp: it is asyncio only. Through trio_asyncio there would be two loops, two kinds of
cancelling and a dependency for what are 200 lines here, and what matters (a cancelled command leaves the
stream whole, a QEMU that dies wakes everybody) would have to be shown for the bridge as well.
"""

import contextlib
import itertools
import json
import math
import os
import socket
import struct
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import trio

from dirtymap import errors

# QEMU answers everything used here at once; a merge into a big bitmap and a drain under load take seconds.
TIMEOUT = 60.0
# Another client holding the monitor shows as a connection that is never greeted.
GREETING_TIMEOUT = 10.0
# query-named-block-nodes of a machine with a thousand snapshots is a few MiB.
LINE_LIMIT = 64 << 20


class MonitorError(errors.UserError):
    """Something went wrong between this process and a QEMU's monitor."""


class CommandError(MonitorError):
    """QEMU refused `command`; `reply` is what it said, `description` the text of it."""

    def __init__(
        self, command: str, arguments: Mapping[str, Any] | None, reply: Mapping[str, Any]
    ) -> None:
        self.command = command
        self.arguments = dict(arguments or {})
        self.reply = dict(reply)
        error = reply.get("error")
        self.description = str(error.get("desc", error) if isinstance(error, dict) else reply)
        self.error_class = str(error.get("class", "")) if isinstance(error, dict) else ""
        super().__init__(f"QEMU refused {command}: {self.description}")


class TimeoutError(MonitorError):  # noqa: A001 - qmp.TimeoutError is what it is
    """No reply to `command` came in time. QEMU may still carry it out."""

    def __init__(self, command: str, seconds: float) -> None:
        self.command = command
        super().__init__(f"QEMU did not answer {command} within {seconds:g} s")


class ProtocolError(MonitorError):
    """What came from the monitor is no QMP; the connection is of no use any more."""


class Disconnected(MonitorError):  # noqa: N818 - a state as much as an error
    """QEMU exited or closed its monitor."""


@contextlib.contextmanager
def understanding(command: str) -> Iterator[None]:
    """Turn stumbling over the shape of what `command` returned into a ProtocolError."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ProtocolError(f"QEMU's answer to {command} is none that is known") from error


class Version(NamedTuple):
    """QEMU's version; compares as a tuple."""

    major: int
    minor: int
    micro: int

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}.{self.micro}"


class Peer(NamedTuple):
    """The QEMU process: who must be able to open what is handed to it."""

    pid: int
    uid: int
    gid: int


class Listener(Protocol):
    """Something to wait on between two looks at QEMU's state."""

    async def wait(self, seconds: float) -> None:
        """Return at the next event, or after `seconds`, or early for no reason."""


class Monitor(Protocol):
    """A running QEMU's monitor."""

    @property
    def name(self) -> str:
        """How the user named it."""

    @property
    def version(self) -> Version:
        """QEMU's version."""

    @property
    def peer(self) -> Peer | None:
        """QEMU's process, where it can be told."""

    @property
    def folder(self) -> str | None:
        """A folder in which this QEMU may surely make sockets and open files; None: nothing is known."""

    async def execute(
        self, command: str, arguments: Mapping[str, Any] | None = None, within: float = TIMEOUT
    ) -> Any:
        """Carry out `command` and return what QEMU returns for it.

        Raises CommandError, TimeoutError, ProtocolError or Disconnected. When cancelled or timed out
        the command may be carried out all the same, before any later one: QEMU keeps their order.
        """

    def listen(self, *events: str) -> contextlib.AbstractContextManager[Listener]:
        """Queue the events of these names from now on, so that none between two calls is missed."""

    async def wait_lost(self) -> MonitorError:
        """Return, once the monitor is of no use any more, the error that says why."""


class SocketListener:
    """Events of some names, in the order they came."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self.send, self.receive = trio.open_memory_channel[dict[str, Any]](math.inf)

    async def next(self) -> dict[str, Any]:
        """Wait for the next event; trio.EndOfChannel when the monitor is lost."""
        return await self.receive.receive()

    async def wait(self, seconds: float) -> None:
        """Return at the next event, or after `seconds`, or when the monitor is lost."""
        with trio.move_on_after(seconds):
            try:
                await self.receive.receive()
            except trio.EndOfChannel:
                # Not a busy loop for a caller that looks again before it waits again: the look raises.
                await trio.lowlevel.checkpoint()


class _Pending:
    """A command that waits for its reply."""

    def __init__(self) -> None:
        self.done = trio.Event()
        self.reply: dict[str, Any] | None = None


class SocketMonitor:
    """A QMP connection over a stream; made by `connect`."""

    def __init__(self, name: str, stream: trio.abc.Stream, peer: Peer | None = None) -> None:
        self._name = name
        self._stream = stream
        self._peer = peer
        self._version = Version(0, 0, 0)
        self._buffer = bytearray()
        self._send_lock = trio.Lock()
        self._ids = itertools.count(1)
        self._pending: dict[str, _Pending] = {}
        self._listeners: list[SocketListener] = []
        self._lost_error: MonitorError | None = None
        self._lost = trio.Event()
        self.reading = trio.CancelScope(shield=True)

    @property
    def name(self) -> str:
        return self._name

    @property
    def version(self) -> Version:
        return self._version

    @property
    def peer(self) -> Peer | None:
        return self._peer

    @property
    def folder(self) -> str | None:
        return None

    async def execute(
        self, command: str, arguments: Mapping[str, Any] | None = None, within: float = TIMEOUT
    ) -> Any:
        """Carry out `command`; see Monitor."""
        request = f"posthoc-{next(self._ids)}"
        pending = self._pending[request] = _Pending()
        try:
            with trio.move_on_after(within):
                await self._send(command, arguments, request, within)
                await pending.done.wait()
        finally:
            del self._pending[request]
        if pending.reply is None:
            raise self._lost_error or TimeoutError(command, within)
        if "error" in pending.reply:
            raise CommandError(command, arguments, pending.reply)
        return pending.reply["return"]

    @contextlib.contextmanager
    def listen(self, *events: str) -> Iterator[SocketListener]:
        """Queue events of these names from now on; see Monitor."""
        listener = SocketListener(events)
        self._listeners.append(listener)
        if self._lost_error is not None:
            listener.send.close()
        try:
            yield listener
        finally:
            self._listeners.remove(listener)
            listener.send.close()
            listener.receive.close()

    async def wait_lost(self) -> MonitorError:
        """Wait until the connection is of no use; see Monitor."""
        await self._lost.wait()
        assert self._lost_error is not None
        return self._lost_error

    async def _send(
        self, command: str, arguments: Mapping[str, Any] | None, request: str, within: float
    ) -> None:
        message: dict[str, Any] = {"execute": command, "id": request}
        if arguments:
            message["arguments"] = dict(arguments)
        async with self._send_lock:
            if self._lost_error is not None:
                raise self._lost_error
            # A line is sent whole or the connection is given up: the shield keeps a cancel from
            # tearing it, the time limit a QEMU that reads nothing from holding us for ever.
            with trio.move_on_after(within, shield=True) as scope:
                try:
                    await self._stream.send_all(json.dumps(message).encode() + b"\n")
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    self._lose(Disconnected(f"{self._name}: QEMU has gone (at {command})"))
            if scope.cancelled_caught:
                self._lose(TimeoutError(command, within))
        if self._lost_error is not None:
            raise self._lost_error

    async def _handshake(self) -> None:
        """Read the greeting. The reader does not run yet."""
        message = await self._read_message()
        try:
            numbers = message["QMP"]["version"]["qemu"]
            self._version = Version(
                int(numbers["major"]), int(numbers["minor"]), int(numbers["micro"])
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ProtocolError(
                f"{self._name}: not a QMP monitor: it does not greet as one"
            ) from error

    async def _read(self) -> None:
        """Hand out replies and events until the connection is lost or `reading` is cancelled.

        A cancel from outside does not end it: whoever is cancelled has things to take back in QEMU, and
        waits for the replies.
        """
        with self.reading:
            try:
                while True:
                    self._dispatch(await self._read_message())
            except MonitorError as error:
                self._lose(error)

    async def _read_message(self) -> dict[str, Any]:
        line = await self._read_line()
        try:
            message = json.loads(line)
        except ValueError as error:
            raise ProtocolError(f"{self._name}: not QMP: {line[:60]!r}") from error
        if not isinstance(message, dict):
            raise ProtocolError(f"{self._name}: not QMP: {line[:60]!r}")
        return message

    async def _read_line(self) -> bytes:
        searched = 0
        while (end := self._buffer.find(b"\n", searched)) < 0:
            searched = len(self._buffer)
            if searched > LINE_LIMIT:
                raise ProtocolError(f"{self._name}: a message of more than {LINE_LIMIT} bytes")
            try:
                data = await self._stream.receive_some(1 << 16)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                data = b""
            if not data:
                raise Disconnected(f"{self._name}: QEMU exited or closed its monitor")
            self._buffer += data
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return line

    def _dispatch(self, message: dict[str, Any]) -> None:
        if "event" in message:
            for listener in self._listeners:
                if message["event"] in listener.names:
                    listener.send.send_nowait(message)
        elif "return" in message or "error" in message:
            self._settle(message)
        else:
            raise ProtocolError(f"{self._name}: not QMP: {json.dumps(message)[:60]}")

    def _settle(self, reply: dict[str, Any]) -> None:
        request = reply.get("id")
        if request is None:
            # QEMU answers without an id only to what it could not parse.
            raise ProtocolError(f"{self._name}: a reply without an id: {json.dumps(reply)[:200]}")
        # A reply that nobody waits for belongs to a command that was cancelled or timed out.
        if (pending := self._pending.get(str(request))) is not None:
            pending.reply = reply
            pending.done.set()

    def _lose(self, error: MonitorError) -> None:
        if self._lost_error is not None:
            return
        self._lost_error = error
        self._lost.set()
        for pending in self._pending.values():
            pending.done.set()
        for listener in self._listeners:
            listener.send.close()


@contextlib.asynccontextmanager
async def connect(path: str) -> AsyncIterator[SocketMonitor]:
    """Connect to the QMP unix socket at `path`; the connection is closed on leaving.

    Raises UserError (not allowed, another client has the monitor), Disconnected where nobody listens.
    """
    try:
        stream = await trio.open_unix_socket(path)
    except (FileNotFoundError, ConnectionRefusedError) as error:
        raise Disconnected(f"{path}: no QMP monitor there: {errors.reason(error)}") from error
    except (OSError, ValueError, RuntimeError) as error:
        raise errors.UserError(f"{path}: no QMP monitor there: {errors.reason(error)}") from error
    async with stream:
        async with running(SocketMonitor(path, stream, peer_of(stream.socket))) as monitor:
            yield monitor


@contextlib.asynccontextmanager
async def running(monitor: SocketMonitor) -> AsyncIterator[SocketMonitor]:
    """Negotiate, then read for `monitor` in the background while the body runs."""
    with trio.move_on_after(GREETING_TIMEOUT) as scope:
        await monitor._handshake()
    if scope.cancelled_caught:
        raise errors.UserError(
            f"{monitor.name}: QEMU does not greet: a monitor serves one client at a time, and another"
            " has this one"
        )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(monitor._read)
        # Kept and raised outside of the nursery, so that it does not arrive in an exception group.
        failure: BaseException | None = None
        try:
            await monitor.execute("qmp_capabilities")
            yield monitor
        except BaseException as error:  # noqa: BLE001 - raised again below
            failure = error
        monitor.reading.cancel()
    if failure is not None:
        raise failure


def peer_of(connection: trio.socket.SocketType) -> Peer | None:
    """Return the process at the other end of a unix socket, as the user that it is now.

    The kernel tells who called listen() (unix(7), SO_PEERCRED): a QEMU with -runas has been another since.
    """
    size = struct.calcsize("3i")
    try:
        raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    except OSError:
        return None
    assert isinstance(raw, bytes)
    pid, _, _ = struct.unpack("3i", raw)
    return process_owner(pid) if pid > 0 else None


def process_owner(pid: int) -> Peer | None:
    """Return the user and group that process `pid` runs as, or None when it has gone."""
    try:
        status = os.stat(f"/proc/{pid}")
    except OSError:
        return None
    return Peer(pid, status.st_uid, status.st_gid)
