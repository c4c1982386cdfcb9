# SPDX-License-Identifier: Apache-2.0
"""One connection to an NBD server, through libnbd; the only module that imports its binding.

    images/export.py   the image: reconnecting, blocks
    images/pool.py     connections, each lent to one thread at a time
    images/nbd.py      Connection: many requests in flight, every answer's error looked at

A `nbd.NBD` handle is one connection and not meant for two threads at once: whoever uses a Connection has
it alone. The binding is the distribution's (python3-libnbd); the package `nbd` of PyPI is something else.

Measured (512 MiB, cached, qemu-nbd): synchronous reads of 1 MiB 1.05 GB/s, 16 requests of 256 KiB in
flight into a numpy buffer 2.4 GB/s; requests of 64 KiB lose half.
"""

from __future__ import annotations

import errno
import functools
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib import parse

from dirtymap import errors

try:
    import nbd as libnbd
except ImportError:
    libnbd = None

if TYPE_CHECKING:
    from dirtymap import images

REQUEST = 256 << 10
IN_FLIGHT = 16
# Servers may hang up on longer requests where they named no maximum (NBD protocol, "Block size constraints").
_LONGEST = 32 << 20
# Block status is 32-bit on the wire; a multiple of every minimum block size (64 KiB at most).
_LONGEST_STATUS = (4 << 30) - (64 << 10)
# A server that writes zeros itself, and no faster than 20 MB/s, still answers one of IN_FLIGHT in time.
_LONGEST_ZERO = 64 << 20
# Seconds a server may take for the handshake, and without a single answer to what it was asked.
CONNECT_PATIENCE = 20.0
ANSWER_PATIENCE = 60.0

BASE_ALLOCATION = "base:allocation"
ALLOCATION_DEPTH = "qemu:allocation-depth"
# base:allocation (NBD protocol, "Metadata querying").
STATE_HOLE = 1
STATE_ZERO = 2


class LostError(Exception):
    """The connection is gone; what was asked for may or may not have been done."""


class SlowError(LostError):
    """The connection was given up because the caller's deadline has passed."""


def part(handle: Any) -> None:
    """Part from the server politely where it listens; never waits for it."""
    try:
        if handle.aio_is_ready():
            handle.aio_disconnect()
    except libnbd.Error:
        pass  # it has gone first


@dataclass(frozen=True)
class Address:
    """Where a server is and how to speak to it."""

    uri: str
    tls_certificates: str | None = None
    tls_psk: str | None = None
    tls_user: str | None = None
    contexts: tuple[str, ...] = (BASE_ALLOCATION,)
    part: Callable[[Any], None] = field(default=part, compare=False)
    """What is done with the handle of a connection that is closed or given up."""

    @classmethod
    def of(cls, uri: str, options: images.Options, *contexts: str) -> Address:
        """Return the address `uri` with what `options` says of TLS."""
        return cls(
            uri,
            options.tls_certificates,
            options.tls_psk,
            options.tls_user,
            (BASE_ALLOCATION, *contexts),
        )


@dataclass(frozen=True)
class Facts:
    """What the server said of the export in its handshake."""

    size: int
    read_only: bool
    multi_conn: bool
    can_flush: bool
    can_zero: bool
    can_trim: bool
    minimum: int  # bytes that every request's start and length must be a multiple of
    maximum: int  # bytes of a read or write at most
    contexts: frozenset[str] = field(default_factory=frozenset)


def uri(socket: str | os.PathLike[str], export: str = "") -> str:
    """Return the NBD URI of `export` behind the unix socket at `socket` (an absolute path)."""
    return f"nbd+unix:///{parse.quote(export, safe='')}?socket={parse.quote(os.fspath(socket))}"


def absolute(uri: str) -> str:
    """Return `uri` with the local files that its query names made absolute, from the current folder.

    Source: the NBD URI specification, and nbd_connect_uri(3) for the TLS material.
    """
    address, mark, query = uri.partition("?")
    # Both separators are known to libnbd.
    parts = re.split("([&;])", query)
    return address + mark + "".join(map(_absolute_part, parts))


def _absolute_part(part: str) -> str:
    key, _, value = part.partition("=")
    if key not in ("socket", "tls-certificates", "tls-psk-file") or value.startswith("/"):
        return part
    return f"{key}={parse.quote(os.path.abspath(parse.unquote(value)))}"


def require_binding() -> None:
    """Raise UserError where libnbd's Python binding is missing or the other package is in its place."""
    if libnbd is None or not hasattr(libnbd, "NBD"):
        raise errors.UserError(
            "the Python binding of libnbd is missing: install python3-libnbd (Debian, Fedora); "
            "the package nbd of PyPI is an unrelated one"
        )


class Connection:
    """A connected handle. Not for two threads at once; the caller closes it."""

    def __init__(
        self,
        address: Address,
        patience: float | None = None,
        ending: threading.Event | None = None,
    ) -> None:
        """Connect and shake hands within `patience` (CONNECT_PATIENCE) seconds; raises LostError.

        Once `ending` is set, by any thread, whatever waits for the server gives up within a second.
        """
        patience = CONNECT_PATIENCE if patience is None else patience
        self.ending = ending or threading.Event()
        self._handle: Any = libnbd.NBD()
        self._part = address.part
        try:
            self._configure(address)
            self._handle.aio_connect_uri(address.uri)
            self._shake_hands(time.monotonic() + patience)
            self.facts = self._facts(address)
        except libnbd.Error as error:
            self.close()
            raise LostError(_text(error)) from None
        except BaseException:
            self.close()
            raise

    def _configure(self, address: Address) -> None:
        handle = self._handle
        # The address is what the user typed: naming a key file in it is theirs to do.
        handle.set_uri_allow_local_file(True)
        # A read that failed is an error here, never a buffer to look into.
        handle.set_pread_initialize(False)
        # An image's last bytes may be no whole block; asking for them is right, and servers answer.
        handle.set_strict_mode(handle.get_strict_mode() & ~libnbd.STRICT_ALIGN)
        for context in address.contexts:
            handle.add_meta_context(context)
        if address.tls_certificates is not None:
            handle.set_tls_certificates(address.tls_certificates)
        if address.tls_psk is not None:
            handle.set_tls_psk_file(address.tls_psk)
        if address.tls_user is not None:
            handle.set_tls_username(address.tls_user)

    def _shake_hands(self, deadline: float) -> None:
        handle = self._handle
        while handle.aio_is_connecting():
            left = deadline - time.monotonic()
            if left <= 0 or self.ending.is_set():
                raise LostError("the server does not answer")
            handle.poll(_milliseconds(left))
        if not handle.aio_is_ready():
            raise LostError("the server has hung up in the handshake")

    def _facts(self, address: Address) -> Facts:
        handle = self._handle
        minimum = handle.get_block_size(libnbd.SIZE_MINIMUM)
        maximum = handle.get_block_size(libnbd.SIZE_MAXIMUM)
        return Facts(
            size=handle.get_size(),
            read_only=bool(handle.is_read_only()),
            multi_conn=bool(handle.can_multi_conn()),
            can_flush=bool(handle.can_flush()),
            can_zero=bool(handle.can_zero()),
            can_trim=bool(handle.can_trim()),
            # "A client desiring maximum interoperability SHOULD constrain its requests to a minimum
            # block size of 2^9" where the server has named none.
            minimum=minimum or 512,
            maximum=min(maximum or _LONGEST, _LONGEST),
            contexts=frozenset(name for name in address.contexts if handle.can_meta_context(name)),
        )

    def read(self, start: int, buffer: memoryview) -> None:
        """Fill `buffer`; start and length are blocks of the server's. Raises OSError or LostError."""
        self._transfer(start, buffer, self._handle.aio_pread)

    def write(self, start: int, buffer: memoryview) -> None:
        """Write `buffer`; start and length are blocks of the server's. Raises OSError or LostError."""
        self._transfer(start, buffer, self._handle.aio_pwrite)

    def flush(self) -> None:
        """Return when what was written is stable. Raises OSError or LostError."""
        self._run(iter([self._handle.aio_flush]))

    def zero(self, start: int, length: int, *, holes: bool) -> None:
        """Make whole blocks read as zeros, by `holes` where the server likes. Raises like `write`."""
        issue = self._handle.aio_zero
        flags = 0 if holes else libnbd.CMD_FLAG_NO_HOLE
        self._run(
            functools.partial(issue, count, at, flags=flags)
            for at, count in _pieces(start, length, _LONGEST_ZERO)
        )

    def trim(self, start: int, length: int) -> None:
        """Tell the server that whole blocks are needed no more. Raises like `write`."""
        issue = self._handle.aio_trim
        self._run(
            functools.partial(issue, count, at)
            for at, count in _pieces(start, length, _LONGEST_ZERO)
        )

    def status(
        self, context: str, start: int, length: int, deadline: float | None
    ) -> list[tuple[int, int]]:
        """Return (length, flags) of the extents from `start` on: some of what was asked for, at least one.

        Raises OSError, LostError, or SlowError when `deadline` passes: the answer is still on its way
        then, and the connection of no further use.
        """
        found: list[tuple[int, int]] = []

        def receive(name: str, _offset: int, entries: list[int], _error: Any) -> int:
            if name == context:
                found.extend(zip(entries[0::2], entries[1::2], strict=True))
            return 0

        length = min(length, _LONGEST_STATUS)
        issue = functools.partial(self._handle.aio_block_status, length, start, receive)
        self._run(iter([issue]), deadline)
        found = [entry for entry in found if entry[0] > 0]
        if not found:
            raise OSError(errno.EPROTO, "the server gave no extents")
        return found

    def _transfer(
        self, start: int, buffer: memoryview, issue: Callable[[memoryview, int], int]
    ) -> None:
        longest = min(REQUEST, self.facts.maximum)
        self._run(
            functools.partial(issue, buffer[at - start : at - start + count], at)
            for at, count in _pieces(start, len(buffer), longest)
        )

    def _run(self, requests: Iterator[Callable[[], int]], deadline: float | None = None) -> None:
        """Issue all of `requests`, a window of them in flight, and see every one's answer.

        After the first error nothing more is issued, but what is in flight is still waited for: its
        buffers belong to libnbd until then. Only a connection given up as lost is not waited for;
        closing the handle makes libnbd forget the buffers.
        """
        flying: set[int] = set()
        failure: libnbd.Error | None = None
        patience = time.monotonic() + ANSWER_PATIENCE
        while True:
            while failure is None and len(flying) < IN_FLIGHT:
                request = next(requests, None)
                if request is None:
                    break
                try:
                    flying.add(request())
                except libnbd.Error as error:
                    failure = error
            if not flying:
                break
            progress, failed = self._collect(flying)
            failure = failure or failed
            if progress:
                patience = time.monotonic() + ANSWER_PATIENCE
                continue
            if deadline is not None and time.monotonic() >= deadline:
                self.close()
                raise SlowError("the answer took too long")
            self._wait(patience, deadline)
        if failure is not None:
            self._raise(failure)

    def _collect(self, flying: set[int]) -> tuple[bool, Any]:
        """Retire what has been answered: whether anything was, and the first error among it."""
        handle = self._handle
        failure = None
        progress = False
        while flying and (cookie := handle.aio_peek_command_completed()):
            flying.discard(cookie)
            progress = True
            try:
                handle.aio_command_completed(cookie)
            except libnbd.Error as error:
                failure = failure or error
        return progress, failure

    def _wait(self, patience: float, deadline: float | None) -> None:
        now = time.monotonic()
        if now >= patience or self.ending.is_set():
            self.close()
            raise LostError("the server does not answer")
        left = (patience if deadline is None else min(patience, deadline)) - now
        try:
            self._handle.poll(_milliseconds(left))
        except libnbd.Error as error:
            # A signal has come, or the connection is over, as the answers will tell.
            if error.errnum != errno.EINTR and not self.is_over:
                self.close()
                raise LostError(_text(error)) from None

    def _raise(self, error: Any) -> None:
        if self.is_over or error.errnum in (errno.ESHUTDOWN, errno.ENOTCONN):
            self.close()
            raise LostError(_text(error))
        raise OSError(error.errnum or errno.EIO, _text(error))

    @property
    def is_over(self) -> bool:
        """Whether nothing more can be asked of this connection."""
        handle = self._handle
        return handle is None or bool(handle.aio_is_dead() or handle.aio_is_closed())

    def close(self) -> None:
        """Ask nothing more of the connection, and part from the server as its address says."""
        handle, self._handle = self._handle, None
        if handle is not None:
            self._part(handle)


def _pieces(start: int, length: int, longest: int) -> Iterator[tuple[int, int]]:
    end = start + length
    while start < end:
        count = min(longest, end - start)
        yield start, count
        start += count


def _milliseconds(seconds: float) -> int:
    # A second at most: a signal's handler runs in the main thread only between two calls.
    return max(1, min(int(seconds * 1000), 1000))


def _text(error: Any) -> str:
    """Return libnbd's message without the name of the C function in front."""
    text: str = error.string
    _, separator, rest = text.partition(": ")
    return rest if separator and text.startswith("nbd_") else text
