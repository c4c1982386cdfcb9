# SPDX-License-Identifier: Apache-2.0
"""Mount a file system, serve it until it is unmounted, and leave nothing mounted behind.

    check -> open_device -> pyfuse3.init -> main and run -> started() -> ... -> unmounted -> close

It ends in one of three ways: unmounted from outside (after a lazy umount: when the last file is closed),
cancelled, or broken by an error of pyfuse3's or the data path's. The mount is gone when `serve` returns or
raises, but for one case: a session breaks whose data path serves without it. That is left to the next
session, since the guest's disk must not end with a bug of ours. Cancelled, it is unmounted first, while it
is still being served, because the kernel may have dirty pages of a writable mapping to write; if files are
open it is detached, the requests that have reached us are finished and answered, and the rest fail with
ENOTCONN.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyfuse3
import trio

from dirtymap import errors
from overlayfs import datapath, filesystem, mountpoint, unmount
from overlayfs.datapath import MountOptions, keeper, kernel

__all__ = ["MountOptions", "serve"]

log = logging.getLogger(__name__)

# Tasks of pyfuse3: idle ones that are kept, and a bound that no guest reaches, because at the bound
# nobody is left to answer `cat status`. (Each has a buffer of 1 MiB, of which it touches what it reads.)
_IDLE_TASKS = 16
_MOST_TASKS = 4096

# A mount that works answers within milliseconds; a machine may be busy.
_ANSWER_WITHIN = 30.0


async def serve(
    files: filesystem.Filesystem,
    path: datapath.Datapath,
    where: str | os.PathLike[str],
    options: MountOptions,
    *,
    adopted: bool = False,
    task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Mount `files` on the empty directory `where` and serve until they are unmounted.

    started() gives the resolved mountpoint, when the mount answers. Returns when it was unmounted from
    outside; a cancel unmounts. `adopted`: the data path has a mount there already. One mount at a time
    in a process (pyfuse3 has one session). Raises UserError if it cannot be mounted. `path` stays open:
    its `close` is the caller's.
    """
    resolved = mountpoint.resolve(where) if adopted else mountpoint.check(where)
    if not adopted:
        _check_fuse(options)
    with _device(files, path, resolved, options, adopted=adopted) as mine:
        left = False
        try:
            await _serve(path, mine, task_status, adopted=adopted)
        except (Exception, BaseExceptionGroup) as error:  # noqa: BLE001 (raised again)
            alone = _alone(error)
            left = isinstance(alone, Exception) and (adopted or mine.ready) and path.leave()
            raise alone from None
        finally:
            # The connection is closed before the last resort: the mount has no server any more, and
            # unmounting must not wait for an answer.
            pyfuse3.close(unmount=False)
            with trio.CancelScope(shield=True):
                if not left:
                    await trio.to_thread.run_sync(path.close_device)
                    await mine.remove()
                    await mine.reap()
                # Else the child that asked may wait for the next session, which waits for this one's end.


def _alone(error: BaseException) -> BaseException:
    """Return the one exception of a group of one."""
    if isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        return error.exceptions[0]
    return error


class _Mounted:
    """Our mount in the table of mounts: another one laid over it, or made after it, is not ours."""

    def __init__(self, path: str) -> None:
        self.path = path
        mount = mountpoint.find(path)
        self._identity = mount.identity if mount else None
        self._asking: trio.Process | None = None
        self.ready = False

    async def ask(self) -> str | None:
        """Return None when the mount answers a child's statfs, else what was wrong.

        A child that gets no answer cannot be killed until the connection is closed: it is left to
        `reap`, so that a cancel need not wait for it.
        """
        command = mountpoint.stat_command(self.path)
        try:
            self._asking = await trio.lowlevel.open_process(command, stdout=subprocess.DEVNULL)
        except OSError as error:
            return f"{command[0]}: {errors.reason(error)}"
        with trio.move_on_after(_ANSWER_WITHIN):
            status = await self._asking.wait()
            return None if status == 0 else f"{command[0]} ended with status {status}"
        return f"nothing within {_ANSWER_WITHIN:.0f} s"

    async def reap(self) -> None:
        """Wait for the child that asked; the connection is closed, so it ends."""
        if self._asking is not None:
            if self._asking.returncode is None:
                self._asking.kill()
            await self._asking.wait()

    async def remove(self) -> None:
        """Unmount, lazily if it is busy; nothing happens if it is gone."""
        said = await unmount.unmount(self.path, lambda m: m.identity == self._identity)
        if said is not None:
            log.error("unmount failed mountpoint=%s: %s", self.path, said)


@contextmanager
def _device(
    files: filesystem.Filesystem,
    path: datapath.Datapath,
    where: str,
    options: MountOptions,
    *,
    adopted: bool,
) -> Iterator[_Mounted]:
    """Mount; the data path's device is closed at the end, pyfuse3's session by the caller."""
    device = path.open_device(where, options)
    try:
        try:
            pyfuse3.init(files, device, _fuse_options(options))
        except RuntimeError:
            pyfuse3.close(unmount=False)
            if adopted:
                path.leave()
                raise keeper.NativeUnavailable("libfuse does not take its descriptor") from None
            if device != where:
                kernel.unmount(where)
                raise keeper.NativeUnavailable("libfuse does not take its descriptor") from None
            raise errors.UserError(
                f"{where}: the kernel refused the FUSE mount (its reason stands above)"
            ) from None
        yield _Mounted(where)
    finally:
        path.close_device()


def _fuse_options(options: MountOptions) -> set[str]:
    """Return the options for libfuse (mount.fuse3(8)); a comma or backslash in a name is escaped."""
    name = options.name.replace("\\", "\\\\").replace(",", "\\,")
    chosen = {*pyfuse3.default_options, f"fsname={name}", "subtype=posthoc", "noatime"}
    return chosen | {"allow_other"} if options.allow_other else chosen


def _check_fuse(options: MountOptions) -> None:
    """Raise UserError for what libfuse would only print."""
    if not Path("/dev/fuse").exists():
        raise errors.UserError("/dev/fuse is missing: load the kernel's module fuse")
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        raise errors.UserError(
            "/dev/fuse cannot be opened by this user: mount as root, or chmod it 666"
        )
    if os.geteuid() == 0:
        return
    if shutil.which(os.environ.get("POSTHOC_FUSERMOUNT", "fusermount3")) is None:
        raise errors.UserError("fusermount3 is missing: install fuse3, or mount as root")
    if options.allow_other and not _others_allowed():
        raise errors.UserError("--allow-other needs the line user_allow_other in /etc/fuse.conf")


def _others_allowed() -> bool:
    try:
        lines = Path("/etc/fuse.conf").read_text().splitlines()
    except OSError:
        return False
    return "user_allow_other" in (line.strip() for line in lines)


async def _serve(
    path: datapath.Datapath,
    mine: _Mounted,
    task_status: trio.TaskStatus[str],
    *,
    adopted: bool,
) -> None:
    """Serve until unmounted or cancelled; unmounted when it returns, unless the service broke.

    A mount that was adopted and does not answer is left: whoever comes next may do better.
    """
    answered: str | None = None
    async with trio.open_nursery() as nursery:
        over = trio.Event()
        await nursery.start(_service, path, over, lambda: adopted or mine.ready)
        try:
            answered = await mine.ask()
            if answered is None:
                log.info("mounted mountpoint=%s datapath=%s", mine.path, path.description())
                mine.ready = True
                task_status.started(mine.path)
                await over.wait()
        finally:
            if not over.is_set():
                with trio.CancelScope(shield=True):
                    if not (adopted and answered is not None and path.leave()):
                        await mine.remove()
                # A copy of the mount in another namespace, or open files, keep the kernel's side alive.
                pyfuse3.terminate()
    if answered is not None:
        raise errors.UserError(f"{mine.path}: the mount does not answer: {answered}")


async def _service(
    path: datapath.Datapath,
    over: trio.Event,
    stands: Callable[[], bool],
    *,
    task_status: trio.TaskStatus[None],
) -> None:
    """Run pyfuse3 and the data path until pyfuse3 ends, out of reach of a cancel from outside.

    Where the mount `stands`, an error of pyfuse3's leaves it: before the data path is cancelled, which ends it.
    """
    try:
        with trio.CancelScope(shield=True):
            async with trio.open_nursery() as nursery:
                await nursery.start(path.run)
                task_status.started()
                try:
                    await pyfuse3.main(_IDLE_TASKS, _MOST_TASKS)
                except Exception:
                    if stands():
                        path.leave()
                    raise
                nursery.cancel_scope.cancel()
    finally:
        over.set()
