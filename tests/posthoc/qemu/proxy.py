# SPDX-License-Identifier: Apache-2.0
"""A QMP monitor that stands before a real one and makes the faults that QEMU cannot be made to make."""

import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import trio

Message = dict[str, Any]


class HangUp(Exception):  # noqa: N818 - no error, a wish
    """Raised by a fault: close the connection."""


class Proxy:
    """Passes commands on, one client at a time, until the command number `at`; that one meets `fault`.

    `fault(command, forward)` returns what the client is to be told, as bytes or a message; `forward()` asks
    QEMU. Commands are counted from 0, over all connections.
    """

    def __init__(self, path: str, target: str) -> None:
        self.path = path
        self.target = target
        self.commands: list[str] = []
        self.at = -1
        self.fault: Callable[[Message, Callable[[], Awaitable[Message]]], Awaitable[Any]]
        self.fired = False
        self.closed = False
        self.change: Callable[[Message], None] | None = None
        """Applied to every command on its way to QEMU."""

    async def serve(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Listen on `path`."""
        with trio.socket.socket(trio.socket.AF_UNIX) as listening:
            await listening.bind(self.path)
            listening.listen(5)
            task_status.started()
            while True:
                connection, _ = await listening.accept()
                async with trio.SocketStream(connection) as client:
                    if not self.closed:
                        with contextlib.suppress(HangUp, trio.BrokenResourceError):
                            await self._pass_on(client)

    async def _pass_on(self, client: trio.abc.Stream) -> None:
        async with await trio.open_unix_socket(self.target) as server:
            ours, theirs = Lines(client), Lines(server)
            await client.send_all(await theirs.next())  # the greeting
            while line := await ours.next():
                command: Message = json.loads(line)
                if command["execute"] != "qmp_capabilities":
                    self.commands.append(command["execute"])
                if self.change is not None:
                    self.change(command)
                    line = json.dumps(command).encode() + b"\n"

                async def forward(line: bytes = line) -> Message:
                    await server.send_all(line)
                    events: set[str] = set()
                    while "event" in (answer := json.loads(await theirs.next())):
                        events.add(answer["event"])
                    if json.loads(line)["execute"] == "block-export-del" and "return" in answer:
                        # QEMU 7.2 that is about to send an event when its client goes may greet no other.
                        while "BLOCK_EXPORT_DELETED" not in events:
                            events.add(json.loads(await theirs.next()).get("event", ""))
                    reply: Message = answer
                    return reply

                faulty = (
                    command["execute"] != "qmp_capabilities" and self.at == len(self.commands) - 1
                )
                self.fired = self.fired or faulty
                answer = await (self.fault(command, forward) if faulty else forward())
                if not isinstance(answer, bytes):
                    answer = json.dumps(answer).encode() + b"\n"
                await client.send_all(answer)


class Lines:
    """The lines of a stream; b"" at its end."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self.buffer = b""

    async def next(self) -> bytes:
        while b"\n" not in self.buffer:
            data = await self.stream.receive_some()
            if not data:
                return b""
            self.buffer += data
        line, _, self.buffer = self.buffer.partition(b"\n")
        return line + b"\n"


@contextlib.asynccontextmanager
async def standing_before(path: str, target: str) -> AsyncIterator[Proxy]:
    """Run a proxy at `path` before the monitor at `target`."""
    proxy = Proxy(path, target)
    async with trio.open_nursery() as nursery:
        await nursery.start(proxy.serve)
        yield proxy
        nursery.cancel_scope.cancel()
