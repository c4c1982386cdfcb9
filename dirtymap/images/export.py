# SPDX-License-Identifier: Apache-2.0
"""An NBD export as an image: a pool of connections that survives a server's restart.

    thread ── read_into ──┐                  ┌── Connection ──┐
    thread ── read_into ──┼── take, give ────┼── Connection ──┼── server
    thread ── extents  ───┘                  └── Connection ──┘

A thread has a connection to itself for one call. A lost connection is made anew, a bounded number of
times, and what was in doubt is asked again: reading and writing the same bytes twice is harmless. What
stays lost is a base.GoneError.
"""

from __future__ import annotations

import errno
import functools
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Protocol, TypeVar

from dirtymap import errors, extent
from dirtymap.images import base, blocks, nbd, pool

if TYPE_CHECKING:
    from dirtymap.images import chain

# Seconds to wait before each further try, and for all of them with what connecting takes: a server's restart.
PAUSES = (0.1, 0.4, 1.0, 2.0, 4.0, 7.5)
PATIENCE = 15.0
# Connections where the server says that several see the same disk (NBD_FLAG_CAN_MULTI_CONN).
CONNECTIONS = 4

T = TypeVar("T")


class Server(Protocol):
    """A server of our own behind an image, which ends with it."""

    @property
    def layers(self) -> tuple[chain.Layer, ...]:
        """The files it serves."""

    def is_alive(self) -> bool:
        """Whether it still runs."""

    def stop(self) -> None:
        """End it."""


class NbdImage:
    """The export at `address`; use `open_export`."""

    at_once = nbd.REQUEST * nbd.IN_FLIGHT

    def __init__(
        self, name: str, address: nbd.Address, first: nbd.Connection, connections: int
    ) -> None:
        self.name = name
        self.facts = first.facts
        self.size = first.facts.size
        self._address = address
        self._connections = connections
        self._pool = pool.Pool(address, connections)
        self._pool.add(first)
        self._closing = threading.Event()
        self._gone = False
        # Of our own and stopped with this image, unless this is another's reader.
        self.server: Server | None = None
        self._stops_server = True

    def read_into(self, start: int, buffer: memoryview) -> None:
        """Fill `buffer`; raises OSError, GoneError where the server stays away."""
        buffer = memoryview(buffer).cast("B")
        whole = blocks.around(start, len(buffer), self.facts.minimum, self.size)
        if whole == (start, len(buffer)):
            self.perform(lambda connection: connection.read(start, buffer))
            return
        rounded = memoryview(bytearray(whole[1]))
        self.perform(lambda connection: connection.read(whole[0], rounded))
        buffer[:] = rounded[start - whole[0] :][: len(buffer)]

    def extents(
        self, start: int, length: int, deadline: float | None = None
    ) -> Iterator[extent.Extent]:
        """Yield what base:allocation says; where it says nothing, or not before `deadline`, data.

        A hole alone promises nothing about its contents (NBD protocol, "base:allocation"): only the
        flag NBD_STATE_ZERO does.
        """
        flagged = self.flagged(nbd.BASE_ALLOCATION, start, length, deadline)
        return extent.join(
            extent.Extent(
                at,
                count,
                zero=flags is not None and bool(flags & nbd.STATE_ZERO),
                hole=flags is not None and bool(flags & nbd.STATE_HOLE),
            )
            for at, count, flags in flagged
        )

    def flagged(
        self, context: str, start: int, length: int, deadline: float | None = None
    ) -> Iterator[tuple[int, int, int | None]]:
        """Yield (start, length, flags) of the meta context's extents, covering exactly what was asked for.

        Flags None: nothing is known.
        """
        end = start + length
        while start < end and context in self.facts.contexts:
            if deadline is not None and time.monotonic() >= deadline:
                break
            try:
                found = self._status(context, start, end, deadline)
            except (OSError, nbd.SlowError):
                break
            except nbd.LostError:
                self.lost()
                break
            for count, flags in found:
                count = min(count, end - start)
                if count > 0:
                    yield start, count, flags
                    start += count
        if start < end:
            yield start, end - start, None

    def _status(
        self, context: str, start: int, end: int, deadline: float | None
    ) -> list[tuple[int, int]]:
        first, length = blocks.around(start, end - start, self.facts.minimum, self.size)
        with self._pool.connection() as connection:
            self._check(connection)
            found = connection.status(context, first, length, deadline)
        # The first extent may begin up to a block before `start`.
        while found and found[0][0] <= start - first:
            first += found.pop(0)[0]
        if found:
            found[0] = (found[0][0] - (start - first), found[0][1])
        else:
            raise OSError(errno.EPROTO, "the server gave no extents")
        return found

    def reader(self) -> NbdImage:
        """Return the same export for reading over connections of its own, so that a scan's requests and the
        guest's do not wait for each other; this very image where the server does not take more.

        The caller closes it, before this one.
        """
        if not self.facts.multi_conn:
            return self
        try:
            first = nbd.Connection(self._address, pool.FURTHER_PATIENCE)
        except nbd.LostError:
            return self
        image = NbdImage(self.name, self._address, first, self._connections)
        image.server, image._stops_server = self.server, False
        return image

    def perform(self, work: Callable[[nbd.Connection], T]) -> T:
        """Return work(connection), with a new connection as often as it takes. Raises OSError."""
        pauses = iter(PAUSES)
        patience = pool.Patience(PATIENCE)
        while True:
            if self._gone:
                patience.left = min(patience.left, pool.FURTHER_PATIENCE)
            try:
                with self._pool.connection(patience) as connection:
                    self._check(connection)
                    self._gone = False
                    return work(connection)
            except nbd.LostError as error:
                self.lost()
                pause = None if self._gone or patience.left <= 0 else next(pauses, None)
                if pause is None or not (self.server is None or self.server.is_alive()):
                    # Whoever asks next gets one try: a server that comes back late is found again.
                    self._gone = True
                    raise base.GoneError(f"the connection is lost: {error}") from None
                with patience.spent():
                    closed = self._closing.wait(min(pause, patience.left))
                if closed:
                    raise OSError(errno.EBADF, "the image has been closed") from None

    def lost(self) -> None:
        """Called when a connection was lost: what was not flushed may be lost with it."""
        self._pool.drop_idle()

    def _check(self, connection: nbd.Connection) -> None:
        facts = connection.facts
        if (facts.size, facts.minimum) != (self.size, self.facts.minimum):
            connection.close()
            raise base.GoneError("the server has come back with another disk")

    def close(self) -> None:
        """Part from the server; a call under way ends with an error. May be called more than once."""
        self._closing.set()
        self._pool.close()
        if self.server is not None and self._stops_server:
            self.server.stop()


class WritableNbdImage(NbdImage):
    """An export that a guest's writes go to."""

    def __init__(
        self, name: str, address: nbd.Address, first: nbd.Connection, connections: int
    ) -> None:
        super().__init__(name, address, first, connections)
        self._blocks = blocks.Lock()
        self._state = threading.Lock()
        # Counts of requests that change bytes: acknowledged, and covered by a flush. One in flight that is lost
        # is made again, and is in doubt no more than one not begun.
        self._acknowledged = 0
        self._flushed = 0
        self._losses = 0
        self._in_doubt = False

    def lost(self) -> None:
        """Remember that acknowledged writes may have died with the server, for the next flush to say."""
        super().lost()
        with self._state:
            self._losses += 1
            self._in_doubt = self._in_doubt or self._acknowledged > self._flushed

    def _change(self, work: Callable[[nbd.Connection], None]) -> None:
        """Perform one request that changes bytes, and count it when it is acknowledged."""

        def counted(connection: nbd.Connection) -> None:
            with self._state:
                losses = self._losses
            work(connection)
            with self._state:
                self._acknowledged += 1
                # Another thread has found a connection lost meanwhile: perhaps to the very server that
                # has acknowledged this.
                self._in_doubt = self._in_doubt or self._losses != losses

        self.perform(counted)

    def write(self, start: int, buffer: bytes | memoryview) -> None:
        """Write all of `buffer`; after an OSError any part of it may have been written."""
        view = memoryview(buffer).cast("B")
        split = blocks.split(start, len(view), self.facts.minimum, self.size)
        if split.whole is not None:
            first, length = split.whole
            part = view[first - start :][:length]
            with self._blocks.shared():
                self._change(lambda connection: connection.write(first, part))
        for first, length in split.partial:
            self._rewrite(first, view[first - start :][:length])

    def _rewrite(self, start: int, part: memoryview) -> None:
        """Write a part of one block by reading the rest of it; two at once would lose one."""
        first, length = blocks.around(start, len(part), self.facts.minimum, self.size)
        block = memoryview(bytearray(length))
        with self._blocks.alone():
            self.perform(lambda connection: connection.read(first, block))
            block[start - first :][: len(part)] = part
            self._change(lambda connection: connection.write(first, block))

    def flush(self, datasync: bool = True) -> None:
        """Return when everything written is stable on the server's side.

        Raises EIO once after a connection was lost with writes not yet flushed: the server may have
        forgotten what it had acknowledged, and only who wrote it can know what to do.
        """
        with self._state:
            acknowledged = self._acknowledged
        if self.facts.can_flush:
            self.perform(nbd.Connection.flush)
        with self._state:
            # Looked at last: the connection may have been lost by this very flush.
            in_doubt, self._in_doubt = self._in_doubt, False
            self._flushed = max(self._flushed, acknowledged)
        if in_doubt:
            raise OSError(errno.EIO, "the server was lost with writes not yet flushed")

    def zero(self, start: int, length: int) -> None:
        """Make the bytes read as zeros; what they take on the server's side stays theirs."""
        self._zero(start, length, holes=False)

    def discard(self, start: int, length: int) -> None:
        """Make the bytes read as zeros, by holes where the server can.

        NBD_CMD_TRIM alone promises nothing of the bytes (NBD protocol: their contents are undefined), and a
        hole of a file or a discarded qcow2 cluster reads as zeros: so it is NBD_CMD_WRITE_ZEROES without
        NBD_CMD_FLAG_NO_HOLE. A server that only trims is believed no more than it says: what is not zeros
        after it is written.
        """
        if self.facts.can_zero or not self.facts.can_trim:
            self._zero(start, length, holes=True)
            return
        self.trim(start, length)
        for part in self.extents(start, length):
            if not part.zero:
                self._zero(part.start, part.length, holes=True)

    def _zero(self, start: int, length: int, *, holes: bool) -> None:
        split = blocks.split(start, length, self.facts.minimum, self.size)
        if split.whole is not None:
            first, count = split.whole
            with self._blocks.shared():
                if self.facts.can_zero:
                    self._change(lambda connection: connection.zero(first, count, holes=holes))
                else:
                    self._write_zeros(first, count)
        for first, count in split.partial:
            self._rewrite(first, memoryview(bytes(count)))

    def _write_zeros(self, start: int, length: int) -> None:
        zeros = memoryview(bytes(min(length, 4 << 20)))
        for at in range(start, start + length, len(zeros)):
            part = zeros[: start + length - at]
            self._change(functools.partial(_write, at, part))

    def trim(self, start: int, length: int) -> None:
        """Say that the bytes are needed no more; they may read as anything until written again.

        Only the whole blocks among them are trimmed, and nothing where the server cannot.
        """
        split = blocks.split(start, length, self.facts.minimum, self.size)
        if split.whole is None or not self.facts.can_trim:
            return
        first, count = split.whole
        with self._blocks.shared():
            self._change(lambda connection: connection.trim(first, count))


def _write(start: int, buffer: memoryview, connection: nbd.Connection) -> None:
    connection.write(start, buffer)


def open_export(
    name: str,
    address: nbd.Address,
    *,
    writable: bool = False,
    connections: int | None = None,
    kind: type[NbdImage] | None = None,
) -> NbdImage:
    """Connect to the export at `address`; the caller closes it. Raises ImageError.

    `connections` is the user's wish. Several are used by themselves only where the server says that they
    see each other's writes and flushes; for writing nothing else would be safe.
    """
    nbd.require_binding()
    try:
        first = nbd.Connection(address)
    except nbd.LostError as error:
        raise errors.ImageError(name, f"cannot be reached: {error}") from None
    try:
        facts = first.facts
        if facts.size == 0:
            raise errors.ImageError(name, "is empty: there is nothing to compare")
        if writable and facts.read_only:
            raise errors.ImageError(name, "is exported read-only")
        if writable and not facts.multi_conn:
            connections = 1
        if connections is None:
            connections = CONNECTIONS if facts.multi_conn else 1
        made = kind or (WritableNbdImage if writable else NbdImage)
        return made(name, address, first, connections)
    except BaseException:
        first.close()
        raise
