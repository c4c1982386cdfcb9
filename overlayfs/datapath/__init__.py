# SPDX-License-Identifier: Apache-2.0
"""The disk's own reads and writes, in one of several ways behind one interface.

`python` is the reference form: requests come through pyfuse3, image I/O is done by worker threads.
`native` serves a file in a program of its own. `forward` is python behind that program, for a disk that is
no file. Whichever it is, one rule holds:

    a write's segments are marked in the recorder before the first of its bytes may change.

In whose order a session uses a data path:

    open_device -> (pyfuse3.init) -> run ... drain, swap ... -> (unmounted) -> close_device -> close
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import trio

from dirtymap import bitmap
from overlayfs import recorder

DEFAULT_THREADS = 4


@dataclass(frozen=True, slots=True)
class MountOptions:
    """How the file system is mounted, whichever data path does it.

    Without `allow_other` the kernel answers the mounting user only. `read_only` is upheld by the file
    system itself, not by the kernel's flag: `control` must remain writable. `name` is the source that
    mount(8) and findmnt(8) show.
    """

    allow_other: bool = False
    read_only: bool = False
    name: str = "posthoc"


class Disk(Protocol):
    """The requests of the disk that come through pyfuse3, called on the event loop.

    The file system has checked each: it lies within the disk, and writing is allowed. All raise OSError
    with the errno that the guest gets.
    """

    @property
    def size(self) -> int:
        """Bytes, constant."""

    async def read(self, start: int, length: int) -> bytes | bytearray | memoryview:
        """Return `length` bytes from `start` on."""

    async def write(self, start: int, data: bytes) -> int:
        """Write all of `data` at `start`, marked before; return its length."""

    async def sync(self, datasync: bool) -> None:
        """Return when all writes that were answered before are on stable storage."""


@runtime_checkable
class DiscardingDisk(Disk, Protocol):
    """One that fallocate(2) reaches through pyfuse3 (allocation.py). Checked and failing like the others."""

    async def discard(self, start: int, length: int) -> None:
        """Make the bytes read as zeros, marked before, and give up their space where that can be."""

    async def zero(self, start: int, length: int) -> None:
        """Make the bytes read as zeros, marked before, and keep their space."""

    async def drain(self) -> None:
        """Return when every change that had begun at the call is done, failed or not."""


class Datapath(Protocol):
    """A way to serve the disk."""

    @property
    def recorder(self) -> recorder.Recorder:
        """The write bitmap and the guest's statistics."""

    @property
    def depth(self) -> int:
        """How many of the guest's requests are under way at this moment, as far as can be seen; for any thread."""

    @property
    def disk(self) -> Disk:
        """Who answers those of the disk's requests that reach pyfuse3."""

    def description(self) -> str:
        """Return what `status` says of it: "python, 4 threads"."""

    def open_device(self, mountpoint: str, options: MountOptions) -> str:
        """Return what pyfuse3.init() is given.

        The mountpoint, for pyfuse3 to mount on; or /dev/fd/N, with the mount already made.
        Raises UserError. Whoever called it calls `close_device`, also when what follows fails.
        """

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Do what must run beside pyfuse3.main(); started() when main may begin.

        Runs while the file system is being unmounted, and is cancelled when main has returned.
        """

    def leave(self) -> bool:
        """After a bug of this session's: leave the mount to the next one, to which it answers. False where there
        is none to come; then it is to be unmounted."""

    def close_device(self) -> None:
        """Let go of what `open_device` made; idempotent. The file system is unmounted by then."""

    async def drain(self) -> None:
        """Return when every write that had begun at the call is done, failed or not."""

    async def swap(self) -> bitmap.Bitmap:
        """Return the write bitmap and begin an empty one; no bit is lost to a writer meanwhile.

        A checkpoint is `swap`, then `drain`, then reading: the writes in flight at the swap are in the
        returned bitmap only, so their bytes must have landed before the disk is read for it.
        """

    def close(self) -> None:
        """Let go of everything else; idempotent. Images are closed by whoever opened them."""
