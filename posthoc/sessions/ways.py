# SPDX-License-Identifier: Apache-2.0
"""Which data path serves a session's disk, and what it keeps for the session that comes after.

`native` is taken where it can be: for a raw file or a block device, where its program was built and works.
What it keeps in its shared memory, beside the write bitmap: the scan's decisions, and `Legacy` as JSON.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dirtymap import images, state
from dirtymap.bitmap import Buffer
from dirtymap.images import base, file
from overlayfs import datapath, recorder
from overlayfs.datapath import native, python
from posthoc.sessions.parameters import Parameters
from scanner import scan

# A file's identity, size and time of change; None for what is no file.
Fingerprint = tuple[int, int, int, int]


@dataclass(frozen=True)
class Legacy:
    """What a session leaves for the one that adopts its mount."""

    parameters: Parameters
    since: str
    reference: Fingerprint | None
    cancelled: bool = False

    def stored(self) -> bytes:
        """Return it as JSON."""
        facts = dataclasses.asdict(self) | {"parameters": self.parameters.stored()}
        return json.dumps(facts).encode()

    @classmethod
    def restored(cls, data: bytes) -> Legacy:
        """Return what `stored` gave."""
        facts = json.loads(data)
        mark = facts["reference"]
        return cls(
            Parameters.restored(facts["parameters"]),
            facts["since"],
            None if mark is None else tuple(mark),
            facts["cancelled"],
        )


def fingerprint(spec: str) -> Fingerprint | None:
    """Return what tells whether the file of an image is still the one it was; None where there is none."""
    where = images.path(spec)
    if where is None:
        return None
    try:
        found = os.stat(where)
    except OSError:
        return None
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def is_same_reference(legacy: Legacy) -> bool:
    """Return whether decisions made against the reference are worth anything now.

    A reference that is no file (an NBD export) cannot be told from another: in doubt it is not the same.
    """
    return legacy.reference is not None and legacy.reference == fingerprint(
        legacy.parameters.reference
    )


def why_not_native(parameters: Parameters, live: base.Image) -> str | None:
    """Return None where the native data path is to be tried, else why not; "" where nobody wants it.

    Raises UserError where it was asked for by name and cannot be.
    """
    if parameters.datapath == "python":
        return ""
    if isinstance(live, file.FileImage):
        return None
    reason = f"{live.name} is not a raw file or block device"
    if parameters.datapath == "native":
        raise native.NativeUnavailable(reason)
    return reason


@contextlib.contextmanager
def open_native(
    parameters: Parameters, live: base.Image, folder: state.Folder
) -> Iterator[native.NativeDatapath]:
    """Prepare the native data path for the time of the context. Raises NativeUnavailable."""
    assert isinstance(live, file.FileImage)
    way = native.NativeDatapath.create(
        live.fd,
        live.size,
        parameters.granularity,
        _keeper_socket(folder),
        read_only=parameters.read_only,
        threads=parameters.threads,
        cache=parameters.cache,
        scan_length=scan.buffer_length(live.size, parameters.granularity),
        log=folder.log,
    )
    with contextlib.closing(way):
        yield way


@contextlib.contextmanager
def adopt_native(folder: state.Folder) -> Iterator[native.NativeDatapath]:
    """Take over the data path of a mount whose session has died. Raises UserError.

    What goes wrong within the context ends this session only: the disk goes on being served.
    """
    way = native.NativeDatapath.adopt(_keeper_socket(folder), log=folder.log)
    with contextlib.closing(way):
        try:
            yield way
        except Exception:
            way.leave()
            raise


@contextlib.contextmanager
def open_python(parameters: Parameters, live: base.Image) -> Iterator[python.PythonDatapath]:
    """Prepare the python data path for the time of the context."""
    way = python.PythonDatapath(
        live,
        recorder.Recorder(live.size, parameters.granularity),
        parameters.threads or datapath.DEFAULT_THREADS,
    )
    with contextlib.closing(way):
        yield way


def decisions_memory(way: datapath.Datapath) -> Buffer | None:
    """Return the memory in which the scan's decisions outlive this session, None where they do not."""
    return way.scan if isinstance(way, native.NativeDatapath) else None


def leave(way: datapath.Datapath, legacy: Legacy) -> None:
    """Leave `legacy`, and how to start it, for a session that comes after this one has died."""
    if isinstance(way, native.NativeDatapath):
        way.remember(legacy.stored(), _restart_command(legacy.parameters.mountpoint))


def _keeper_socket(folder: state.Folder) -> Path:
    return folder.path / "keeper.sock"


def _restart_command(mountpoint: str) -> list[str]:
    return [sys.executable, "-P", "-m", "posthoc", "mount", "--foreground", "--adopt", mountpoint]
