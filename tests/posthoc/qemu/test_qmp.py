# SPDX-License-Identifier: Apache-2.0
"""The QMP client against a scripted server (what QEMU cannot be made to do) and against QEMU itself."""

import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from dirtymap import errors
from posthoc.qemu import qmp
from tests.posthoc.qemu import running

GREETING = {"QMP": {"version": {"qemu": {"major": 9, "minor": 1, "micro": 2}}, "capabilities": []}}


class Server:
    """The server's end of a QMP connection, one line at a time."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self.buffer = b""

    async def say(self, *messages: object) -> None:
        """Send messages: objects as JSON lines, bytes as they are."""
        for message in messages:
            line = message if isinstance(message, bytes) else json.dumps(message).encode() + b"\r\n"
            await self.stream.send_all(line)

    async def hear(self) -> dict[str, Any]:
        """Return the next command."""
        while b"\n" not in self.buffer:
            data = await self.stream.receive_some()
            assert data, "the client hung up"
            self.buffer += data
        line, self.buffer = self.buffer.split(b"\n", 1)
        command: dict[str, Any] = json.loads(line)
        return command

    async def answer(self, *before: object, **reply: object) -> dict[str, Any]:
        """Return the next command after having answered it, with `before` said in between."""
        command = await self.hear()
        await self.say(*before, {**reply, "id": command["id"]})
        return command

    async def greet(self) -> None:
        await self.say(GREETING)
        assert (await self.answer(**{"return": {}}))["execute"] == "qmp_capabilities"


@asynccontextmanager
async def talking_to(
    script: Callable[[Server], Awaitable[None]],
) -> AsyncIterator[qmp.SocketMonitor]:
    """A client whose server runs `script` after the greeting."""
    client_end, server_end = trio.testing.memory_stream_pair()
    server = Server(server_end)

    async def serve() -> None:
        await server.greet()
        await script(server)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        async with qmp.running(qmp.SocketMonitor("vm.sock", client_end)) as monitor:
            yield monitor


async def failing(opening: Sequence[object]) -> errors.UserError:
    """Return the error of a client that is greeted with `opening`, after which the server hangs up."""
    client_end, server_end = trio.testing.memory_stream_pair()
    await Server(server_end).say(*opening)
    await server_end.aclose()
    with pytest.raises(errors.UserError) as caught:
        async with qmp.running(qmp.SocketMonitor("vm.sock", client_end)):
            pytest.fail("connected to nonsense")
    return caught.value


async def test_version_is_the_greeting_s() -> None:
    """The version comes from the greeting and compares as numbers."""

    async def script(server: Server) -> None:
        pass

    async with talking_to(script) as monitor:
        assert monitor.version == (9, 1, 2)
        assert monitor.version >= (9, 0)
        assert str(monitor.version) == "9.1.2"


async def test_arguments_and_return_value() -> None:
    """A command's arguments arrive and its return value comes back."""

    async def script(server: Server) -> None:
        command = await server.answer(**{"return": [1, {"a": "ä"}]})
        assert command["execute"] == "query-x"
        assert command["arguments"] == {"name": "ü", "flat": True}

    async with talking_to(script) as monitor:
        assert await monitor.execute("query-x", {"name": "ü", "flat": True}) == [1, {"a": "ä"}]


async def test_refusal_keeps_command_and_reply() -> None:
    """An error has the command, its arguments and the whole reply, and reads as one line."""

    async def script(server: Server) -> None:
        await server.answer(error={"class": "GenericError", "desc": "Bitmap already exists: b"})

    async with talking_to(script) as monitor:
        with pytest.raises(qmp.CommandError) as caught:
            await monitor.execute("block-dirty-bitmap-add", {"node": "n", "name": "b"})
    error = caught.value
    assert error.command == "block-dirty-bitmap-add"
    assert error.arguments == {"node": "n", "name": "b"}
    assert error.reply["error"]["class"] == error.error_class == "GenericError"
    assert str(error) == "QEMU refused block-dirty-bitmap-add: Bitmap already exists: b"


async def test_replies_out_of_order_reach_their_commands() -> None:
    """Two commands at once get each its own reply, whichever comes first."""

    async def script(server: Server) -> None:
        first, second = await server.hear(), await server.hear()
        for command in (second, first):
            await server.say({"return": command["execute"], "id": command["id"]})

    results = {}

    async def ask(command: str) -> None:
        results[command] = await monitor.execute(command)

    async with talking_to(script) as monitor:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, "one")
            nursery.start_soon(ask, "two")
    assert results == {"one": "one", "two": "two"}


async def test_listener_gets_its_events_only() -> None:
    """Events of the names asked for arrive in order, with those that came before the reply."""

    async def script(server: Server) -> None:
        await server.answer(
            {"event": "RTC_CHANGE", "data": {}},
            {"event": "BLOCK_EXPORT_DELETED", "data": {"id": "a"}},
            {"event": "BLOCK_EXPORT_DELETED", "data": {"id": "b"}},
            **{"return": {}},
        )

    async with talking_to(script) as monitor:
        with monitor.listen("BLOCK_EXPORT_DELETED") as listener:
            await monitor.execute("block-export-del", {"id": "a"})
            assert [(await listener.next())["data"]["id"] for _ in range(2)] == ["a", "b"]


async def test_listener_ends_with_the_connection() -> None:
    """Who waits for an event of a QEMU that goes is woken."""

    async def script(server: Server) -> None:
        await server.stream.aclose()

    async with talking_to(script) as monitor:
        with monitor.listen("SHUTDOWN") as listener, pytest.raises(trio.EndOfChannel):
            await listener.next()
        with monitor.listen("SHUTDOWN") as listener:
            await listener.wait(3600)


async def test_message_in_pieces_and_several_in_one() -> None:
    """Lines are found however the bytes are cut."""

    async def script(server: Server) -> None:
        command = await server.hear()
        reply = json.dumps({"return": "x" * 200_000, "id": command["id"]}).encode() + b"\r\n"
        await server.say(reply[:7])
        await trio.testing.wait_all_tasks_blocked()
        await server.say(reply[7:] + b'{"event": "STOP"}\r\n{"event": "RES')
        await trio.testing.wait_all_tasks_blocked()
        await server.say(b'UME"}\r\n')

    async with talking_to(script) as monitor:
        with monitor.listen("STOP", "RESUME") as listener:
            assert len(await monitor.execute("query-x")) == 200_000
            assert (await listener.next())["event"] == "STOP"
            assert (await listener.next())["event"] == "RESUME"


async def test_cancelled_command_leaves_the_stream_whole() -> None:
    """After a cancelled command the next one gets its own reply, and the late reply is dropped."""
    heard = trio.Event()

    async def script(server: Server) -> None:
        first = await server.hear()
        heard.set()
        second = await server.hear()
        await server.say({"return": "late", "id": first["id"]})
        await server.say({"return": "own", "id": second["id"]})

    async with talking_to(script) as monitor:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(monitor.execute, "first")
                await heard.wait()
                scope.cancel()
        assert await monitor.execute("second") == "own"


async def test_who_is_cancelled_can_still_take_things_back() -> None:
    """A shielded command in the cleanup of what was cancelled gets its reply."""
    replies = []

    async def script(server: Server) -> None:
        await server.answer(**{"return": "taken back"})

    async def work(monitor: qmp.Monitor) -> None:
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                replies.append(await monitor.execute("block-export-del"))

    client_end, server_end = trio.testing.memory_stream_pair()
    server = Server(server_end)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.greet)
        with trio.CancelScope() as scope:
            async with qmp.running(qmp.SocketMonitor("vm.sock", client_end)) as monitor:
                nursery.start_soon(script, server)
                scope.cancel()
                await work(monitor)
    assert replies == ["taken back"]


async def test_cancel_while_sending_tears_no_line(autojump_clock: trio.testing.MockClock) -> None:
    """A cancel that comes while QEMU is slow to read waits for the end of the line."""
    client_end, server_end = trio.testing.lockstep_stream_pair()
    server = Server(server_end)
    seen = []

    async def serve() -> None:
        await server.greet()
        await trio.sleep(5)  # the client is in the middle of its line, cancelled
        seen.append((await server.hear())["execute"])
        seen.append((await server.answer(**{"return": {}}))["execute"])

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        async with qmp.running(qmp.SocketMonitor("vm.sock", client_end)) as monitor:
            with trio.move_on_after(1):
                await monitor.execute("long", {"text": "x" * 1000})
            await monitor.execute("next")
    assert seen == ["long", "next"]


async def test_no_reply_is_a_timeout(autojump_clock: trio.testing.MockClock) -> None:
    """A QEMU that hangs is an error after the time given, which names the command."""

    async def script(server: Server) -> None:
        await server.hear()
        await server.answer(**{"return": 1})

    async with talking_to(script) as monitor:
        with pytest.raises(qmp.TimeoutError, match="did not answer query-block within 5 s"):
            await monitor.execute("query-block", within=5)
        assert await monitor.execute("query-version") == 1


async def test_reader_of_nothing_is_given_up(autojump_clock: trio.testing.MockClock) -> None:
    """When QEMU stops reading in the middle of a line, the connection is lost, not torn."""
    client_end, server_end = trio.testing.lockstep_stream_pair()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(Server(server_end).greet)
        async with qmp.running(qmp.SocketMonitor("vm.sock", client_end)) as monitor:
            for command in ("first", "second"):
                with pytest.raises(qmp.TimeoutError, match="did not answer first"):
                    await monitor.execute(command, within=5)


async def test_hang_up_wakes_every_command() -> None:
    """When QEMU goes, each waiting command and each later one says so."""

    async def script(server: Server) -> None:
        await server.hear()
        await server.hear()
        await server.stream.aclose()

    async def gone(command: str) -> None:
        with pytest.raises(qmp.Disconnected, match="vm.sock: QEMU exited or closed its monitor"):
            await monitor.execute(command)

    async with talking_to(script) as monitor:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(gone, "one")
            nursery.start_soon(gone, "two")
        await gone("three")
        assert isinstance(await monitor.wait_lost(), qmp.Disconnected)


@pytest.mark.parametrize(
    "nonsense",
    [
        b"HTTP/1.1 400 Bad Request\r\n",
        b"[1, 2]\n",
        b"{}\n",
        b'{"return": 1}\n',
        b'{"error": {"class": "GenericError", "desc": "JSON parse error"}}\n',
        b"\xff\xfe\n",
    ],
    ids=["http", "list", "empty-object", "no-id", "error-without-id", "no-utf-8"],
)
async def test_nonsense_is_a_protocol_error(nonsense: bytes) -> None:
    """What is no QMP ends the connection with one line, and no command waits for ever."""

    async def script(server: Server) -> None:
        await server.hear()
        await server.say(nonsense)

    async with talking_to(script) as monitor:
        with pytest.raises(qmp.ProtocolError, match="vm.sock") as caught:
            await monitor.execute("query-block")
        assert "\n" not in str(caught.value)


async def test_endless_line_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line beyond the limit is not read into memory to its end."""
    monkeypatch.setattr(qmp, "LINE_LIMIT", 1 << 16)

    async def script(server: Server) -> None:
        await server.hear()
        await server.say(b"x" * (1 << 18))

    async with talking_to(script) as monitor:
        with pytest.raises(qmp.ProtocolError, match="more than 65536 bytes"):
            await monitor.execute("query-block")


@pytest.mark.parametrize(
    ("opening", "said"),
    [
        ([], "QEMU exited or closed"),
        ([b"SSH-2.0-OpenSSH\r\n"], "not QMP"),
        ([{"QMP": {}}], "not a QMP monitor"),
        ([{"return": {}}], "not a QMP monitor"),
        ([{"QMP": {"version": {"qemu": {"major": "x", "minor": 0, "micro": 0}}}}], "not a QMP"),
        ([GREETING], "QEMU exited or closed|QEMU has gone"),
    ],
    ids=["nothing", "ssh", "no-version", "no-greeting", "odd-version", "then-nothing"],
)
async def test_wrong_greeting(opening: list[object], said: str) -> None:
    """Something else than a QMP monitor is told apart at once."""
    error = await failing(opening)
    assert re.search(said, str(error)), error


async def test_no_greeting_names_the_likely_reason(autojump_clock: trio.testing.MockClock) -> None:
    """A monitor that another client holds accepts the connection and stays silent."""
    client_end, _server_end = trio.testing.memory_stream_pair()
    with pytest.raises(errors.UserError, match="another has this one"):
        async with qmp.running(qmp.SocketMonitor("vm.sock", client_end)):
            pytest.fail("connected to silence")


async def test_body_s_error_comes_out_bare() -> None:
    """What the body raises leaves the connection as itself, not in an exception group."""

    async def script(server: Server) -> None:
        pass

    with pytest.raises(KeyError):
        async with talking_to_plainly(script):
            raise KeyError


@asynccontextmanager
async def talking_to_plainly(
    script: Callable[[Server], Awaitable[None]],
) -> AsyncIterator[qmp.SocketMonitor]:
    """As talking_to, but with no nursery around the client."""
    client_end, server_end = trio.testing.memory_stream_pair()
    server = Server(server_end)
    await server.say(GREETING, {"return": {}, "id": "posthoc-1"})
    async with qmp.running(qmp.SocketMonitor("vm.sock", client_end)) as monitor:
        await script(server)
        yield monitor


@pytest.mark.parametrize("what", ["absent", "file", "deaf", "long"])
async def test_no_monitor_there(tmp_path: Path, what: str) -> None:
    """A path that is no listening socket is the user's mistake, told in one line."""
    path = tmp_path / "qmp.sock"
    if what == "file":
        path.write_text("")
    if what == "deaf":
        with trio.socket.socket(trio.socket.AF_UNIX) as unconnected:
            await unconnected.bind(str(path))
    if what == "long":
        path = tmp_path / ("x" * 120)
    with pytest.raises(errors.UserError, match="no QMP monitor there") as caught:
        async with qmp.connect(str(path)):
            pytest.fail("connected to nothing")
    assert "\n" not in str(caught.value)


async def test_real_qemu() -> None:
    """A QEMU is greeted, told apart by its process and asked; its refusal and its death are told."""
    with running.running() as vm:
        async with qmp.connect(vm.qmp) as monitor:
            assert monitor.peer is not None
            assert monitor.peer.pid == vm.pid
            version = (await monitor.execute("query-version"))["qemu"]
            assert monitor.version == (version["major"], version["minor"], version["micro"])
            with pytest.raises(qmp.CommandError, match="nope"):
                await monitor.execute("block-dirty-bitmap-add", {"node": "nope", "name": "b"})
            vm.kill()
            with trio.fail_after(30):
                assert isinstance(await monitor.wait_lost(), qmp.Disconnected)
