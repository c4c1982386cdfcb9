# SPDX-License-Identifier: Apache-2.0
"""The errors that a person is told of, one tree.

    PosthocError
    ├── UserError          the user's mistake or the environment; str() is the one line to print
    │   ├── ImageError     an image cannot be opened or used as asked
    │   ├── MapError       a map file cannot be used
    │   └── ToolError      an external command is missing or has failed
    └── ReadError          an I/O error; whatever result there is remains valid

Everything else that escapes is a bug and ends in a traceback.
"""

import os
from collections.abc import Sequence


class PosthocError(Exception):
    """Whatever posthoc itself raises."""


class UserError(PosthocError):
    """A mistake of the user's or a property of the environment, told in one line."""


class ImageError(UserError):
    """The image `name` (as the user wrote it) cannot be used; `reason` says why and what to do."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name = name
        self.reason = reason


class MapError(UserError):
    """The map file at `path` cannot be read, written or used."""

    def __init__(self, path: str | os.PathLike[str], reason: str) -> None:
        super().__init__(f"{os.fspath(path)}: {reason}")
        self.path = os.fspath(path)
        self.reason = reason


class ToolError(UserError):
    """An external command is missing or has failed; `reason` is what it said."""

    def __init__(self, command: Sequence[str], reason: str) -> None:
        super().__init__(f"{command[0]}: {reason}")
        self.command = tuple(command)
        self.reason = reason


class ReadError(PosthocError):
    """Bytes [start, start + length) of the image `name` cannot be read."""

    def __init__(self, name: str, start: int, length: int, errno: int) -> None:
        super().__init__(f"{name}: cannot read {length} bytes at {start}: {os.strerror(errno)}")
        self.name = name
        self.start = start
        self.length = length
        self.errno = errno


def reason(error: BaseException) -> str:
    """Return what `error` says, without the errno and file name that an OSError adds."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__
