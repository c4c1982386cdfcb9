# SPDX-License-Identifier: Apache-2.0
"""Connections to one server, lent to one thread at a time."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from dirtymap.images import nbd

# Seconds for a connection beyond the first. A server that serves one client at a time (qemu-nbd without
# --shared) does not refuse a second one, it lets it wait; even then it may say that several are welcome.
FURTHER_PATIENCE = 3.0
# Seconds that a try has at least.
_SHORTEST = 1.0


class Patience:
    """Seconds that reaching a server may take in all, over several tries; `left` of them."""

    def __init__(self, seconds: float) -> None:
        self.left = seconds

    @contextmanager
    def spent(self) -> Iterator[None]:
        """Take the time that the block lasts."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.left -= time.monotonic() - began


class Pool:
    """At most `limit` connections to `address`, made when first needed."""

    def __init__(self, address: nbd.Address, limit: int) -> None:
        self.address = address
        self._limit = limit
        self._made = 0
        self._idle: list[nbd.Connection] = []
        self._changed = threading.Condition()
        self._ending = threading.Event()

    @contextmanager
    def connection(self, patience: Patience | None = None) -> Iterator[nbd.Connection]:
        """Lend a connection for as long as the block lasts. Raises nbd.LostError where none can be made.

        Making one takes what is left of `patience`, or a moment where nothing is; waiting for one that
        others use takes none of it.
        """
        connection = self._take(patience)
        try:
            yield connection
        except BaseException as error:
            # After anything but the server's own answer nobody knows what is still in flight.
            if not isinstance(error, OSError):
                connection.close()
            raise
        finally:
            self._give(connection)

    def _take(self, patience: Patience | None) -> nbd.Connection:
        while (connection := self._idle_or_slot()) is None:
            try:
                return self._connect(patience)
            except nbd.LostError:
                if not self._is_further():
                    self._forget()
                    raise
                self._forget(lower=True)
            except BaseException:
                self._forget()
                raise
        return connection

    def _idle_or_slot(self) -> nbd.Connection | None:
        """Return an idle connection, or None when the caller is to make one; waits for either."""
        with self._changed:
            while True:
                if self._ending.is_set():
                    raise OSError(errno.EBADF, "the image has been closed")
                if self._idle:
                    return self._idle.pop()
                if self._made < self._limit:
                    self._made += 1
                    return None
                self._changed.wait()

    def _is_further(self) -> bool:
        with self._changed:
            return self._made > 1

    def _connect(self, patience: Patience | None) -> nbd.Connection:
        seconds = FURTHER_PATIENCE if self._is_further() else nbd.CONNECT_PATIENCE
        if patience is None:
            return nbd.Connection(self.address, seconds, self._ending)
        with patience.spent():
            # The last of several tries is a try all the same.
            left = max(patience.left, _SHORTEST)
            return nbd.Connection(self.address, min(seconds, left), self._ending)

    def _forget(self, *, lower: bool = False) -> None:
        with self._changed:
            self._made -= 1
            if lower:
                # As many as the server takes; the rest of the requests wait for one of these.
                self._limit = max(1, self._made)
            self._changed.notify()

    def _give(self, connection: nbd.Connection) -> None:
        with self._changed:
            if not (self._ending.is_set() or connection.is_over):
                self._idle.append(connection)
                self._changed.notify()
                return
        connection.close()
        self._forget()

    def add(self, connection: nbd.Connection) -> None:
        """Take over a connection made elsewhere."""
        connection.ending = self._ending
        with self._changed:
            self._made += 1
            self._idle.append(connection)

    def drop_idle(self) -> None:
        """Close what nobody uses: after a loss these lead to the server that has gone."""
        with self._changed:
            idle, self._idle = self._idle, []
            self._made -= len(idle)
            self._changed.notify_all()
        for connection in idle:
            connection.close()

    def close(self) -> None:
        """Close what is idle now, and what is lent out when it comes back, within a second or so."""
        with self._changed:
            self._ending.set()
            idle, self._idle = self._idle, []
            self._changed.notify_all()
        for connection in idle:
            connection.close()
