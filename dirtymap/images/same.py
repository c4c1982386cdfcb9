# SPDX-License-Identifier: Apache-2.0
"""Ways to know that two images hold the same bytes without reading them.

scanner/plan.py asks them, after the write bitmap has begun to record.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from dirtymap import extent
from dirtymap.images import base, chain, export, fiemap, file, nbd

REFLINKS = "reflinks"
BACKING = "backing"


class Rule(Protocol):
    """A way to know without reading that both images hold the same bytes.

    Its promise must hold at some moment after the write bitmap began to record and before the answer is
    used, for bytes not written in between (the write bitmap has those); any doubt is no extent.
    """

    @property
    def reason(self) -> str:
        """The name under which its savings are counted, one of scanner/plan.py's REASONS."""

    def equal(self, start: int, length: int, deadline: float) -> Iterator[extent.Extent]:
        """Yield, in order, extents within [start, start + length) that are surely equal on both sides.

        At `deadline` (time.monotonic() seconds) it ends, and what was not yielded is read.
        """


def rules(live: base.Image, reference: base.Image) -> list[Rule]:
    """Return the rules that apply to this pair."""
    found = (Reflinks.between(live, reference), Backing.between(live, reference))
    return [rule for rule in found if rule is not None]


class Reflinks:
    """Both files have these bytes at the same place of one file system: one is a reflink copy of the other.

    Why the map stays safe. One place holds one content, so that the bytes are equal at the moment when
    both files are there. The file system gives a writer of a shared place a new one, and the answer comes
    after everything written before was put into its place (FIEMAP_FLAG_SYNC, for the whole file with the
    first question of each answer; that most was written out in pieces before only saves it time); what is
    written later is in the write bitmap. The reference is asked before and after the live disk: where
    something moves its places meanwhile (balancing, defragmenting), its two answers differ and nothing is
    concluded.
    """

    reason = REFLINKS

    def __init__(self, live: file.FileImage, reference: file.FileImage) -> None:
        self._live = live
        self._reference = reference

    @classmethod
    def between(cls, live: base.Image, reference: base.Image) -> Reflinks | None:
        """Return the rule for this pair, None where it cannot apply."""
        if not isinstance(live, file.FileImage) or not isinstance(reference, file.FileImage):
            return None
        if not all(stat.S_ISREG(os.fstat(side.fd).st_mode) for side in (live, reference)):
            return None
        # Places are numbers within one file system; the numbers of two would mean nothing together.
        numbering = fiemap.numbering(live.fd)
        if numbering is None or numbering != fiemap.numbering(reference.fd):
            return None
        if fiemap.is_realtime(live.fd) or fiemap.is_realtime(reference.fd):
            return None
        return cls(live, reference)

    def equal(self, start: int, length: int, deadline: float) -> Iterator[extent.Extent]:
        """Yield what both files have at the same place; a file's end within a block ends it there."""
        # Behind a file's end its last block has bytes too, which nobody can read.
        end = min(start + length, self._live.present(), self._reference.present())
        if start >= end:
            return
        try:
            before = list(fiemap.shared(self._reference.fd, start, end - start, deadline))
            if not before:
                return
            live = list(fiemap.shared(self._live.fd, start, end - start, deadline))
            same = list(fiemap.common(before, live))
            if not same:
                return
            after = fiemap.shared(self._reference.fd, start, end - start, deadline)
            confirmed = list(fiemap.common(same, after))
        except OSError:
            return  # no FIEMAP here
        yield from extent.join(
            extent.data(place.start, place.end - place.start) for place in confirmed
        )


class Backing:
    """Both images are overlays of one backing chain, or one is an overlay of the other.

        live        top  ─┐            live   top
                          ├─ base             middle
        reference   top2 ─┘       reference = base

    Why the map stays safe. Where no layer above the common one has allocated anything, both images read
    the very same bytes of it. QEMU is asked which layer each byte comes from (qemu:allocation-depth). What
    the guest writes after the answer is in the write bitmap; what it wrote before is allocated on top. A
    layer that is shorter than the common one hides the rest of it with zeros: only bytes within all of
    the layers count.
    """

    reason = BACKING

    def __init__(
        self,
        sides: Sequence[tuple[export.NbdImage, int]],
        files: Sequence[file.FileImage],
        size: int,
    ) -> None:
        """`sides` are the images to ask, each with its number of layers above the common one.

        `files` are those that are read here and not by a QEMU, which knows zeros beyond a file's end.
        """
        self._sides = sides
        self._files = files
        self._size = size

    @classmethod
    def between(cls, live: base.Image, reference: base.Image) -> Backing | None:
        """Return the rule for this pair, None where it cannot apply."""
        chains = (_layers(live), _layers(reference))
        depths = _common(*chains)
        if depths is None:
            return None
        above = [
            layer for layers, depth in zip(chains, depths, strict=True) for layer in layers[:depth]
        ]
        sides: list[tuple[export.NbdImage, int]] = []
        for image, depth in zip((live, reference), depths, strict=True):
            if depth == 0:
                continue  # all of it is the common layer
            if not isinstance(image, export.NbdImage):
                return None
            if nbd.ALLOCATION_DEPTH not in image.facts.contexts:
                return None
            sides.append((image, depth))
        size = min([live.size, reference.size, *(layer.size for layer in above)])
        files = [image for image in (live, reference) if isinstance(image, file.FileImage)]
        return cls(sides, files, size)

    def equal(self, start: int, length: int, deadline: float) -> Iterator[extent.Extent]:
        """Yield what comes from the common layer, or from none at all, on both sides."""
        end = min(start + length, self._size, *(image.present() for image in self._files))
        if start >= end:
            return
        found: Iterable[extent.Extent] = [extent.data(start, end - start)]
        for image, depth in self._sides:
            below = _below(image, depth, start, end - start, deadline)
            found = (
                extent.data(first, last - first)
                for first, last, _, _ in extent.overlaps(found, below)
            )
        yield from extent.join(found)


def _layers(image: base.Image) -> tuple[chain.Layer, ...]:
    if isinstance(image, export.NbdImage) and image.server is not None:
        return image.server.layers
    if isinstance(image, file.FileImage):
        # By its descriptor: the name may mean another file by now.
        identity = chain.identity(f"/proc/self/fd/{image.fd}")
        return (chain.Layer(image.path, "raw", image.size, encrypted=False, identity=identity),)
    return ()


def _common(one: Sequence[chain.Layer], other: Sequence[chain.Layer]) -> tuple[int, int] | None:
    """Return how many layers lie above the first common one in each chain.

    From there down all must be the same: a backing file named by a relative path is looked for beside the
    file that names it, and that may have been opened by two names.
    """
    for depth, layer in enumerate(one):
        for other_depth, candidate in enumerate(other):
            below, other_below = one[depth:], other[other_depth:]
            if (
                layer.is_same(candidate)
                and len(below) == len(other_below)
                and all(a.is_same(b) for a, b in zip(below, other_below, strict=True))
            ):
                return depth, other_depth
    return None


def _below(
    image: export.NbdImage, depth: int, start: int, length: int, deadline: float
) -> Iterator[extent.Extent]:
    """Yield what none of the `depth` uppermost layers of `image` has allocated.

    The context's number is 0 where no layer has it, 1 for the uppermost, 2 for the next (QEMU's
    docs/interop/nbd.txt).
    """
    for at, count, number in image.flagged(nbd.ALLOCATION_DEPTH, start, length, deadline):
        if number is not None and (number == 0 or number > depth):
            yield extent.data(at, count)
        if time.monotonic() >= deadline:
            return
