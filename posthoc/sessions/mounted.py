# SPDX-License-Identifier: Apache-2.0
"""A mounted session's beginning and end: anew, or where a session has died; with which data path.

Before it is ready, what goes wrong is the caller's to tell; afterwards it stands in the session's log and in how
it ended, which `posthoc umount` tells.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import logging
import os
import sys
from collections.abc import Awaitable, Callable

import trio

from dirtymap import bitmap, errors, state
from dirtymap.images import file, loop
from dirtymap.qcow2 import carrier
from overlayfs.datapath import native
from posthoc import background, exits, report
from posthoc.sessions import output, pair, ways
from posthoc.sessions.parameters import Parameters
from posthoc.sessions.session import Session

log = logging.getLogger(__name__)

Ready = Callable[[report.Facts], None]
Serve = Callable[[Ready], Awaitable[state.End]]


def run(
    parameters: Parameters, *, ready_fd: int | None = None, announce: Ready | None = None
) -> int:
    """Serve until the file system is unmounted or a signal comes; return the exit code.

    `ready_fd`, if given, is where `background.start` waits for the session to be ready; `announce` is called
    with the first status then. Raises UserError before that; afterwards everything is told in the session's
    log and at its end.
    """
    folder = state.Folder(parameters.mountpoint)
    if parameters.output:
        pair.check_map(parameters.output, parameters.live, parameters.reference)
        _check_beside(parameters.output, parameters.mountpoint)
    folder.lock()
    folder.begin_log()
    return _run(folder, functools.partial(_begin, parameters, folder), ready_fd, announce)


def _check_beside(output: str, mountpoint: str) -> None:
    """Refuse a map inside the mountpoint, where the mount would hide it; raises MapError."""
    if os.path.realpath(os.path.dirname(output)) == mountpoint:
        raise errors.MapError(output, "is in the mountpoint, which the mount covers")


def adopt(mountpoint: str, *, ready_fd: int | None = None, announce: Ready | None = None) -> int:
    """Be the session of a mount whose session has died and whose disk is being served; as `run`."""
    folder = state.Folder(mountpoint)
    folder.lock()
    return _run(folder, functools.partial(_adopt, folder), ready_fd, announce)


def _run(folder: state.Folder, serve: Serve, ready_fd: int | None, announce: Ready | None) -> int:
    folder.remove("end.json")
    was_ready = False

    def ready(facts: report.Facts) -> None:
        nonlocal was_ready
        was_ready = True
        if announce is not None:
            # Whoever was to read it may have gone; the guest stays.
            with contextlib.suppress(BrokenPipeError):
                announce(facts)
        if ready_fd is not None:
            background.detach(ready_fd, folder.log)

    try:
        folder.reserve("end.json")
        end = trio.run(serve, ready)
    except BaseException as error:
        if not was_ready:
            # There was no session: its command tells why.
            folder.discard_unused()
            raise
        folder.write("end.json", {"exit_code": exits.BUG, "message": f"a bug ended it: {error!r}"})
        raise
    folder.write("end.json", {"exit_code": end.exit_code, "message": end.message})
    if end.message:
        print(f"posthoc: {end.message}", file=sys.stderr)
    return end.exit_code


async def _begin(parameters: Parameters, folder: state.Folder, ready: Ready) -> state.End:
    """Mount anew, with the native program where that works."""
    legacy = ways.Legacy(
        parameters,
        datetime.datetime.now(datetime.UTC).astimezone().isoformat("T", "seconds"),
        ways.fingerprint(parameters.reference),
    )
    with pair.open_pair(
        parameters.live,
        parameters.reference,
        writable=not parameters.read_only,
        options=parameters.options,
        allow_shrunk=parameters.allow_shrunk,
    ) as images:
        # A map that no carrier can hold is told now, before there are bitmaps for it.
        carrier.layout(images.live.size, parameters.granularity, parameters.bitmap)
        reason = None
        if parameters.datapath != "python":
            session = None
            try:
                with ways.open_native(parameters, images.live, folder) as way:
                    session = Session(legacy, images, way)
                    return await session.serve(ready)
            except (native.NativeUnavailable, ExceptionGroup) as error:
                reason = _unavailable(error)
                must = ways.native_is_a_must(parameters)
                if reason is None or must or (session and session.was_ready):
                    raise
            reason = f"native: {reason}; no discards"
            log.warning("the python data path serves the disk (%s)", reason)
        with ways.open_python(parameters, images.live) as way:
            return await Session(legacy, images, way, note=reason).serve(ready)


def _unavailable(error: Exception) -> str | None:
    """Return why the native data path is not to be had, if `error` says just that."""
    if isinstance(error, ExceptionGroup) and len(error.exceptions) == 1:
        return _unavailable(error.exceptions[0])
    return error.reason if isinstance(error, native.NativeUnavailable) else None


async def _adopt(folder: state.Folder, ready: Ready) -> state.End:
    """Go on where a session has died, with the write bitmap and the decisions that were kept."""
    with ways.adopt_native(folder) as way:
        legacy, is_same = ways.inherited(ways.Legacy.restored(way.session))
        parameters = legacy.parameters
        # At once: the guest has been writing without a session, and the reference may take long to open.
        everything = bitmap.Bitmap(way.memory.size, parameters.granularity)
        everything.fill()
        marked = output.Output(parameters.output, parameters.bitmap)
        await trio.to_thread.run_sync(marked.begin, everything)
        live = file.FileImage(
            parameters.live,
            os.dup(way.live),
            way.memory.size,
            writable=not parameters.read_only,
            held=_lock_behind(way.live, parameters),
        )
        with pair.adopt_pair(live, parameters.reference, options=parameters.options) as images:
            session = Session(legacy, images, way, adopted=True, same_reference=is_same)
            return await session.serve(ready)


def _lock_behind(live: int, parameters: Parameters) -> list[int]:
    """Lock anew what is behind a loop device: those locks were the dead session's. The guest goes on in any case."""
    try:
        return loop.lock_behind(live, parameters.live, writable=not parameters.read_only)
    except errors.ImageError as error:
        log.warning("%s", error)
        return []
