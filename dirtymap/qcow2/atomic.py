# SPDX-License-Identifier: Apache-2.0
"""Files that are replaced as a whole or not at all."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from collections.abc import Iterator

from dirtymap import errors


class UnsyncedError(OSError):
    """The new file is in its place, but a power failure may bring back what was there before."""

    def __init__(self, error: OSError) -> None:
        reason = f"is in place, but may not survive a power failure: {errors.reason(error)}"
        super().__init__(error.errno, reason)


def check_target(path: str | os.PathLike[str]) -> None:
    """Raise OSError where `path` is something, but no regular file: a rename would replace it."""
    with contextlib.suppress(FileNotFoundError):
        mode = os.lstat(path).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError("it is a directory")
        if stat.S_ISLNK(mode):
            raise OSError("it is a symbolic link: name the file itself")
        if not stat.S_ISREG(mode):
            raise OSError("it is not a regular file")


@contextlib.contextmanager
def replacement(path: str | os.PathLike[str]) -> Iterator[int]:
    """A descriptor of a new file that takes `path`'s place when the block ends, on disk by then.

    The new file has mode 0600 and stands beside `path` until then, under a name of its own; it is
    removed when anything fails. Raises OSError; UnsyncedError where all went well but the last step,
    the folder's. The descriptor is closed here.
    """
    path = os.fspath(path)
    check_target(path)
    folder = os.path.dirname(path) or "."
    descriptor, temporary = tempfile.mkstemp(prefix=".posthoc-", suffix=".new", dir=folder)
    try:
        try:
            yield descriptor
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.rename(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    try:
        sync_folder(folder)
    except OSError as error:
        raise UnsyncedError(error) from error


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Put a folder's names on disk: without this a rename may be undone by a power failure."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_all(descriptor: int, start: int, data: memoryview) -> None:
    """Write all of `data` at `start`; one call may write less (2 GiB, a full disk, a signal)."""
    while data:
        written = os.pwrite(descriptor, data, start)
        start += written
        data = data[written:]
