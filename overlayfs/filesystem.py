# SPDX-License-Identifier: Apache-2.0
"""The files in the mount: names, attributes, and who answers for each.

    inode   1        2      3        4             5             6         7...
    name    (root)   disk   status   status.json   dirty.qcow2   control   further virtual files

Each verb checks and delegates: the disk's requests to a `Disk`, the others to a `VirtualFile`. Inode
numbers are constants, and a file handle holds its inode: handle = inode | counter << 8. So a session
that was started anew understands the handles that the kernel still holds; an opener's fixed content is
then made again.

The disk behaves like a block device. Its size is fixed: setting it to anything else is EPERM, opening
with O_TRUNC too (the kernel would take the size for 0 until it asked again, and other openers would
read nothing meanwhile); a write that begins at or beyond the end is ENOSPC, one that crosses it is cut.

The kernel caches the disk's pages (no FOPEN_DIRECT_IO): only so can it be mapped shared (with it mmap
fails with ENODEV, measured on Linux 6.18, unless INIT has DIRECT_IO_ALLOW_MMAP, which pyfuse3 cannot
ask for). It costs no exactness: there is no write-back cache, each write(2) is a WRITE request before
it returns, marked before the image changes; pages of a writable mapping become WRITE requests when the
kernel cleans them, and until then the image has not changed either. All openers share the one cache, so
they see each other's writes; an O_DIRECT opener's requests bypass it and drop what they overlap.
Nothing but the mount writes the image, so the cache need not be dropped at an open (keep_cache).
A native data path sets its own flags.

Virtual files are FOPEN_DIRECT_IO: each opener has contents of its own, fixed from open to release.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import stat
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar, cast

import pyfuse3

from overlayfs import allocation, datapath

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

DISK = "disk"
ROOT_INODE, DISK_INODE = 1, 2
# The numbers of the names that a session always has; others follow in the order they are given.
INODES = {DISK: DISK_INODE, "status": 3, "status.json": 4, "dirty.qcow2": 5, "control": 6}

INODE_BITS = 8
INODE_MASK = (1 << INODE_BITS) - 1

# A command is a line; what is longer than this in one write is no command.
LONGEST_WRITE = 4096

_BLOCK = 4096
# Seconds that the kernel may believe what never changes: names, and the disk's attributes.
_FOREVER = 3600.0


class Content(Protocol):
    """What one opener of a virtual file reads: fixed, and at hand."""

    @property
    def length(self) -> int:
        """Bytes."""

    def read(self, start: int, length: int) -> bytes:
        """Return the bytes [start, start + length), fewer at the end."""


class VirtualFile(Protocol):
    """A file whose contents are made when it is opened. Called on the event loop: only `open` may wait.

    While one opener waits, the guest and the other openers are served.

    What is raised: an OSError's errno is the caller's; a ValueError in `write` is EINVAL; anything else
    is a bug, EIO to the caller, and logged.
    """

    @property
    def name(self) -> str:
        """The name in the mount."""

    @property
    def mode(self) -> int:
        """Permission bits. What nobody may do is refused to root as well."""

    def length(self) -> int:
        """Return the bytes that an opener would find now, or about as many: whoever opens it learns the number."""

    async def open(self) -> Content:
        """Return the contents for one opener."""

    def write(self, data: bytes) -> None:
        """Take one write(2), at most LONGEST_WRITE bytes."""


@dataclass(frozen=True, slots=True)
class Text:
    """Content from bytes in memory."""

    data: bytes

    @property
    def length(self) -> int:
        """Bytes."""
        return len(self.data)

    def read(self, start: int, length: int) -> bytes:
        """Return the bytes [start, start + length), fewer at the end."""
        return self.data[start : start + length]


@dataclass(frozen=True, slots=True)
class Owner:
    """Who owns the files, and the disk's permission bits (write bits count only when not read-only)."""

    uid: int
    gid: int
    mode: int = 0o600


def answered(
    handler: Callable[Concatenate[Filesystem, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[Filesystem, P], Coroutine[Any, Any, T]]:
    """Make every failure of `handler` an errno: any other exception would end pyfuse3's main loop."""

    @functools.wraps(handler)
    async def answer(self: Filesystem, /, *arguments: P.args, **keywords: P.kwargs) -> T:
        try:
            return await handler(self, *arguments, **keywords)
        except pyfuse3.FUSEError:
            raise
        except OSError as error:
            raise pyfuse3.FUSEError(error.errno or errno.EIO) from None
        except Exception as error:  # noqa: BLE001 the guest's disk outlives a bug in a handler
            self._report(handler.__name__, error)
            raise pyfuse3.FUSEError(errno.EIO) from None

    return answer


class Filesystem(pyfuse3.Operations):
    """The mount's files: the disk and `files`, all in the root folder.

    Neither `disk` nor `files` is closed here.
    """

    def __init__(
        self,
        disk: datapath.Disk,
        files: Sequence[VirtualFile],
        *,
        read_only: bool = False,
        owner: Owner | None = None,
    ) -> None:
        super().__init__()
        self._disk = disk
        self._read_only = read_only
        self._owner = owner or Owner(os.getuid(), os.getgid())
        self._files = dict(zip(_inodes([file.name for file in files]), files, strict=True))
        names = {DISK_INODE: DISK} | {inode: file.name for inode, file in self._files.items()}
        self._names = {inode: name.encode() for inode, name in sorted(names.items())}
        self._by_name = {name: inode for inode, name in self._names.items()}
        self._contents: dict[int, Content] = {}
        # Handles of an earlier session may still be open in the kernel: count on from the clock, in
        # steps of 64 ns (56 bits last until 2116), so that none is given twice.
        self._opened = time.time_ns() >> 6
        self._since = time.time_ns()
        self._reported: set[tuple[str, str]] = set()

    def _report(self, verb: str, error: Exception) -> None:
        """Log a bug with its traceback, once: a guest may ask a thousand times a second."""
        kind = (verb, repr(error))
        level = logging.DEBUG if kind in self._reported else logging.ERROR
        self._reported.add(kind)
        log.log(level, "request failed verb=%s error=%r", verb, error, exc_info=error)

    # Names and attributes

    @answered
    async def lookup(
        self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """Find a name; those that are not there are not remembered."""
        if name in (b".", b".."):
            return self._attributes(ROOT_INODE)
        if parent_inode != ROOT_INODE or name not in self._by_name:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return self._attributes(self._by_name[name])

    @answered
    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        """Tell what stat(2) tells."""
        return self._attributes(inode)

    def _attributes(self, inode: int) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = pyfuse3.InodeT(inode)
        entry.entry_timeout = entry.attr_timeout = _FOREVER
        entry.st_uid, entry.st_gid = self._owner.uid, self._owner.gid
        # Constant: a changing mtime makes the kernel drop the disk's cached pages.
        entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = self._since
        if inode == ROOT_INODE:
            entry.st_mode = pyfuse3.ModeT(stat.S_IFDIR | 0o555)
            entry.st_nlink = 2
            return entry
        if inode == DISK_INODE:
            entry.st_size = self._disk.size
            mode = self._owner.mode & (0o444 if self._read_only else 0o666)
        else:
            entry.st_size = self._length(inode)
            entry.attr_timeout = 0
            mode = self._file(inode).mode
        entry.st_mode = pyfuse3.ModeT(stat.S_IFREG | mode)
        entry.st_blksize = _BLOCK
        entry.st_blocks = -(-entry.st_size // 512)
        return entry

    def _file(self, inode: int) -> VirtualFile:
        try:
            return self._files[inode]
        except KeyError:
            raise pyfuse3.FUSEError(errno.ENOENT) from None

    def _length(self, inode: int) -> int:
        """Return a virtual file's length: its last opener's, whose fstat must fit what it reads."""
        for handle in reversed(self._contents):
            if handle & INODE_MASK == inode:
                return self._contents[handle].length
        return self._file(inode).length()

    @answered
    async def setattr(
        self,
        inode: int,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: int | None,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        """Refuse a change of size or access; times are accepted and stay what they are."""
        current = self._attributes(inode)
        if fields.update_size and attr.st_size != current.st_size:
            self._refuse_size(inode)
        if fields.update_mode and stat.S_IMODE(attr.st_mode) != stat.S_IMODE(current.st_mode):
            raise pyfuse3.FUSEError(errno.EPERM)
        if fields.update_uid and attr.st_uid != current.st_uid:
            raise pyfuse3.FUSEError(errno.EPERM)
        if fields.update_gid and attr.st_gid != current.st_gid:
            raise pyfuse3.FUSEError(errno.EPERM)
        return current

    def _refuse_size(self, inode: int) -> None:
        """Raise, unless the file is one that takes commands: a shell's `>` truncates it first."""
        if inode == DISK_INODE and self._read_only:
            raise pyfuse3.FUSEError(errno.EROFS)
        if inode == DISK_INODE or not self._file(inode).mode & 0o222:
            raise pyfuse3.FUSEError(errno.EPERM)

    # The folder

    @answered
    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileHandleT:
        """Open the root folder; there is no other."""
        if inode != ROOT_INODE:
            raise pyfuse3.FUSEError(errno.ENOTDIR)
        return pyfuse3.FileHandleT(inode)

    @answered
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        """List the names; an entry's position is its inode."""
        for inode, name in self._names.items():
            if inode > start_id and not pyfuse3.readdir_reply(
                token, pyfuse3.FileNameT(name), self._attributes(inode), inode
            ):
                return

    @answered
    async def releasedir(self, fh: int) -> None:
        """Nothing is held for an open folder."""

    @answered
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        """The folder never changes."""

    @answered
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        """Describe a full file system of the disk's size; a loop device asks for the block size."""
        data = pyfuse3.StatvfsData()
        data.f_bsize = data.f_frsize = _BLOCK
        data.f_blocks = -(-self._disk.size // _BLOCK)
        data.f_files = len(self._names) + 1
        data.f_namemax = 255
        return data

    # Open files

    @answered
    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        """Open the disk, or fix a virtual file's contents for this opener."""
        self._opened += 1
        handle = pyfuse3.FileHandleT(inode | self._opened << INODE_BITS)
        if inode == DISK_INODE:
            self._check_disk(flags)
            return pyfuse3.FileInfo(fh=handle, keep_cache=True)
        file = self._file(inode)
        if (_reads(flags) and not file.mode & 0o444) or (_writes(flags) and not file.mode & 0o222):
            raise pyfuse3.FUSEError(errno.EACCES)
        if _reads(flags):
            self._contents[handle] = await file.open()
        return pyfuse3.FileInfo(fh=handle, direct_io=True, keep_cache=False)

    def _check_disk(self, flags: int) -> None:
        if self._read_only and (_writes(flags) or flags & os.O_TRUNC):
            raise pyfuse3.FUSEError(errno.EROFS)
        if flags & os.O_TRUNC:
            raise pyfuse3.FUSEError(errno.EPERM)

    @answered
    async def read(self, fh: int, off: int, size: int) -> bytes:
        """Read; fewer bytes only at the end."""
        if fh & INODE_MASK != DISK_INODE:
            return (await self._content(fh)).read(off, size)
        length = min(size, self._disk.size - off)
        if length <= 0:
            return b""
        # pyfuse3 copies from any buffer; only its signature says bytes.
        return cast("bytes", await self._disk.read(off, length))

    async def _content(self, fh: int) -> Content:
        """Return an opener's contents, made anew when it opened the file in an earlier session."""
        if fh not in self._contents:
            made = await self._file(fh & INODE_MASK).open()
            # Two reads at once: the first that has made them decides for both.
            self._contents.setdefault(fh, made)
        return self._contents[fh]

    @answered
    async def write(self, fh: int, off: int, buf: bytes) -> int:
        """Write to the disk as to a block device, or hand a command over."""
        if fh & INODE_MASK != DISK_INODE:
            return self._command(self._file(fh & INODE_MASK), buf)
        if self._read_only:
            raise pyfuse3.FUSEError(errno.EROFS)
        room = self._disk.size - off
        if len(buf) <= room:
            return await self._disk.write(off, buf)
        if room <= 0:
            raise pyfuse3.FUSEError(errno.ENOSPC)
        return await self._disk.write(off, buf[:room])

    def _command(self, file: VirtualFile, data: bytes) -> int:
        """Hand over one write; where in the file it was meant to go says nothing."""
        if len(data) > LONGEST_WRITE:
            raise pyfuse3.FUSEError(errno.EMSGSIZE)
        try:
            file.write(data)
        except ValueError:
            raise pyfuse3.FUSEError(errno.EINVAL) from None
        return len(data)

    @answered
    async def fsync(self, fh: int, datasync: bool) -> None:
        """Bring the disk's writes to stable storage."""
        if fh & INODE_MASK == DISK_INODE:
            await self._disk.sync(datasync)

    @answered
    async def release(self, fh: int) -> None:
        """Forget an opener's contents."""
        self._contents.pop(fh, None)

    @answered
    async def setxattr(
        self, inode: int, name: bytes, value: bytes, ctx: pyfuse3.RequestContext
    ) -> None:
        """Do what the server before pyfuse3 sends under these names; there are no attributes."""
        disk = self._disk
        if not isinstance(disk, datapath.DiscardingDisk):
            raise pyfuse3.FUSEError(errno.ENOSYS)
        if name == allocation.DRAIN:
            # Whose change is done writes its answer before it lets another task run: ours comes after it.
            await disk.drain()
            return
        if name != allocation.FALLOCATE:
            raise pyfuse3.FUSEError(errno.ENOSYS)
        if inode != DISK_INODE:
            # Not ENOSYS, for which the kernel would ask of the disk no more either.
            raise pyfuse3.FUSEError(errno.EOPNOTSUPP)
        if self._read_only:
            raise pyfuse3.FUSEError(errno.EROFS)
        change = allocation.change(value, disk.size)
        await (disk.discard if change.punch else disk.zero)(change.start, change.length)

    # Not given: flush, access, getxattr, poll, locks. pyfuse3 answers ENOSYS, and the kernel, having heard
    # it once, does each by itself: close(2) succeeds, default_permissions decides access, attributes
    # are "not supported" (asked otherwise before *every* write, for security.capability).

    # The set of files is fixed

    @answered
    async def create(self, *arguments: Any, **keywords: Any) -> Any:
        """Refuse."""
        raise pyfuse3.FUSEError(errno.EPERM)

    mknod = mkdir = symlink = link = unlink = rmdir = rename = create


def _reads(flags: int) -> bool:
    return flags & os.O_ACCMODE != os.O_WRONLY


def _writes(flags: int) -> bool:
    return flags & os.O_ACCMODE != os.O_RDONLY


def _inodes(names: Sequence[str]) -> list[int]:
    """Return the inode of each virtual file: its constant, or the next free number."""
    free = iter(range(max(INODES.values()) + 1, INODE_MASK + 1))
    return [INODES[name] if name in INODES else next(free) for name in names]
