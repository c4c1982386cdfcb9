# SPDX-License-Identifier: Apache-2.0
"""Which data path serves a session's disk, and what it keeps for the session that comes after.

The native program is taken where it was built and works: it serves a raw file or a block device itself (`native`),
and stands before the session that serves any other disk (`forward`). Where it is not to be had, `python` does alone.

What `native` keeps in its shared memory, beside the write bitmap: the scan's decisions, and `Legacy` as JSON.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import stat
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dirtymap import errors, images, state
from dirtymap.bitmap import Buffer
from dirtymap.images import base, file
from overlayfs import datapath, recorder
from overlayfs.datapath import forward, native, python
from posthoc.sessions.parameters import Parameters
from scanner import scan


@dataclass(frozen=True)
class Legacy:
    """What a session leaves for the one that adopts its mount."""

    parameters: Parameters
    since: str
    reference: str | None
    """The fingerprint of what the scan's decisions were made against."""
    cancelled: bool = False

    def stored(self) -> bytes:
        """Return it as JSON."""
        facts = dataclasses.asdict(self) | {"parameters": self.parameters.stored()}
        return json.dumps(facts).encode()

    @classmethod
    def restored(cls, data: bytes) -> Legacy:
        """Return what `stored` gave."""
        facts = json.loads(data)
        return cls(
            Parameters.restored(facts["parameters"]),
            facts["since"],
            facts["reference"],
            facts["cancelled"],
        )


def fingerprint(spec: str) -> str | None:
    """Return what tells whether an image is still what it was: its files, their sizes, their times of change.

    All those of a backing chain. None where that does not tell: for a device, an export, data in a file
    beside those of the chain. To be asked before the image is opened, so that a file that takes another's
    place in between is found to be another later, and never the other way round.
    """
    try:
        files = _files(spec)
        return None if files is None else " ".join(map(_mark, files))
    except (OSError, errors.UserError):
        return None


def _files(spec: str) -> list[str] | None:
    """Return the files that hold an image's bytes, None where they are not known. Raises UserError."""
    layers = images.layers(spec)
    if not layers:
        where = images.path(spec)
        return None if where is None else [where]
    files = [layer.path for layer in layers if layer.path is not None and not layer.data_files]
    return files if len(files) == len(layers) else None


def _mark(path: str) -> str:
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "is no file")
    return f"{found.st_dev}:{found.st_ino}:{found.st_size}:{found.st_mtime_ns}"


def inherited(legacy: Legacy) -> tuple[Legacy, bool]:
    """Return the legacy for the session that adopts the mount, and whether the reference is still the same.

    What was decided against another is worth nothing; one that cannot be told from another is another.
    """
    found = fingerprint(legacy.parameters.reference)
    is_same = found is not None and found == legacy.reference
    return dataclasses.replace(legacy, reference=found), is_same


def native_is_a_must(parameters: Parameters) -> bool:
    """Return whether the native data path was asked for, by name or by what only it can do."""
    return parameters.datapath == "native" or parameters.cache == "none"


@contextlib.contextmanager
def open_native(
    parameters: Parameters, live: base.Image, folder: state.Folder
) -> Iterator[datapath.Datapath]:
    """Prepare the data path that the native program has a part in, for the time of the context.

    Raises NativeUnavailable, also where nothing but the native data path would do and `live` is no file.
    """
    if isinstance(live, file.FileImage):
        way: native.NativeDatapath | forward.ForwardDatapath = _native(parameters, live, folder)
    elif native_is_a_must(parameters):
        raise native.NativeUnavailable(f"{live.name} is not a raw file or block device")
    else:
        way = _forward(parameters, live, folder)
    with contextlib.closing(way):
        yield way


def _native(
    parameters: Parameters, live: file.FileImage, folder: state.Folder
) -> native.NativeDatapath:
    return native.NativeDatapath.create(
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


def _forward(
    parameters: Parameters, live: base.Image, folder: state.Folder
) -> forward.ForwardDatapath:
    return forward.ForwardDatapath.create(
        live,
        recorder.Recorder(live.size, parameters.granularity),
        _keeper_socket(folder),
        threads=parameters.threads or datapath.DEFAULT_THREADS,
        log=folder.log,
    )


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
