# SPDX-License-Identifier: Apache-2.0
"""Opening the two images that are compared, with the checks that go with it."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass

from dirtymap import errors, images, units
from dirtymap.images import absent, base, export, file, sizes
from dirtymap.qcow2 import carrier


@dataclass(frozen=True)
class Pair:
    """The live image, the same for the scan's reading, the reference, and what to tell the user."""

    live: base.Image
    reader: base.Image
    reference: base.Image
    notes: tuple[str, ...]


@contextlib.contextmanager
def open_pair(
    live: str,
    reference: str,
    *,
    writable: bool = False,
    options: images.Options = images.DEFAULTS,
    allow_shrunk: bool = False,
) -> Iterator[Pair]:
    """Open both images by name for the time of the context.

    Raises UserError where they are the same bytes, where one cannot be opened or is in use, where the live
    disk would be written and the reference stands on it, or where the live disk is shorter than the reference
    and `allow_shrunk` was not said.
    """
    if images.same_file(live, reference):
        raise errors.UserError(f"{live} and {reference} are the same disk: nothing can be compared")
    with contextlib.ExitStack() as stack:
        compared = images.open_reference(reference, options=options)
        stack.callback(compared.close)
        if writable:
            # Before it is opened: a format's header is written then.
            _check_apart(live, compared)
        opened = images.open(live, writable=writable, options=options)
        stack.callback(opened.close)
        compared, rounded = fit(compared, opened.size)
        beyond = compared.size - opened.size
        notes = size_notes(opened.name, compared.name, beyond, allow_shrunk=allow_shrunk) + rounded
        reader = opened
        if isinstance(opened, file.FileImage | export.NbdImage):
            reader = opened.reader()
            if reader is not opened:
                stack.callback(reader.close)
        yield Pair(opened, reader, compared, notes)


def _check_apart(live: str, reference: base.Image) -> None:
    """Refuse to write a file that the reference reads from, under any name and through a loop device.

    Only the live disk's uppermost layer is written: those below it may be the reference's, too.
    """
    written = {live: live}
    for layer in images.layers(live)[:1]:
        written |= {name: f"{live}'s data file {name}" for name in layer.data_files}
    for name, read in itertools.product(written, _files(reference)):
        if images.same_file(name, read):
            raise errors.ImageError(
                written[name],
                f"{reference.name} stands on it: writing it would destroy the reference",
            )


def _files(image: base.Image) -> Iterator[str]:
    """Yield the local files that `image` is read from."""
    if isinstance(image, file.FileImage):
        yield image.path
    elif isinstance(image, export.NbdImage) and image.server is not None:
        for layer in image.server.layers:
            yield from (layer.path, *layer.data_files) if layer.path else layer.data_files


@contextlib.contextmanager
def adopt_pair(
    live: file.FileImage, reference: str, *, options: images.Options = images.DEFAULTS
) -> Iterator[Pair]:
    """Open the reference by name beside a live disk that is being served already, and is closed at the end.

    A reference that cannot be opened becomes one that fails every read, with a note: the mount goes on.
    """
    with contextlib.ExitStack() as stack:
        stack.callback(live.close)
        reader = live.reader()
        stack.callback(reader.close)
        try:
            compared = images.open_reference(reference, options=options)
            stack.callback(compared.close)
            compared, notes = fit(compared, live.size)
        except errors.UserError as error:
            compared, notes = absent.AbsentImage(reference, live.size, str(error)), (str(error),)
        yield Pair(live, reader, compared, notes)


def fit(reference: base.Image, size: int) -> tuple[base.Image, tuple[str, ...]]:
    """Return `reference` without the zeros by which it is longer than a disk of `size` bytes only because
    sizes are rounded up there, and what to tell of that (images.sizes). Raises ImageError.
    """
    try:
        fitted, note = sizes.fit(reference, size)
    except OSError as error:
        raise errors.ImageError(reference.name, errors.reason(error)) from None
    return fitted, () if note is None else (note,)


def size_notes(live: str, reference: str, beyond: int, *, allow_shrunk: bool) -> tuple[str, ...]:
    """Return what to tell of a reference that has `beyond` bytes more than the live disk, or fewer.

    Raises ImageError where it has more and `allow_shrunk` was not said.
    """
    if beyond < 0:
        return (
            f"{reference} is {units.describe(-beyond)} shorter than {live}: "
            "the rest is compared with zeros",
        )
    if beyond > 0 and not allow_shrunk:
        raise errors.ImageError(
            live,
            f"is {units.describe(beyond)} shorter than {reference}: "
            "--allow-shrunk compares what it has",
        )
    if beyond > 0:
        return (f"{live} is {units.describe(beyond)} shorter than {reference}",)
    return ()


def check_map(output: str, *inputs: str) -> None:
    """Refuse early a map that could not be written at the end, or only over what is no map; raises MapError."""
    check_output(output, *inputs)
    carrier.check_target(output)


def check_output(output: str, *inputs: str) -> None:
    """Refuse early a file that could not be written at the end; raises MapError."""
    where = os.path.abspath(output)
    folder = os.path.dirname(where)
    if not os.path.isdir(folder):
        raise errors.MapError(output, f"there is no folder {folder}")
    if os.path.isdir(where):
        raise errors.MapError(output, "is a folder, not a file")
    if os.path.lexists(where) and not os.path.isfile(where):
        raise errors.MapError(output, "is not a regular file: a map is written beside and renamed")
    if not os.access(folder, os.W_OK):
        raise errors.MapError(output, f"{folder} cannot be written to")
    if any(images.path(name) is not None and images.same_file(output, name) for name in inputs):
        raise errors.MapError(output, "is one of the images")
