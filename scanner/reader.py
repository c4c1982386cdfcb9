# SPDX-License-Identifier: Apache-2.0
"""One worker's desk: two buffers, what is read into them, and which segments then differ.

Errors are found out here: a chunk that cannot be read is read again segment by segment, and only the segments
that really cannot be read count as differing.
"""

from collections.abc import Callable

import numpy as np

from dirtymap.images import base
from scanner import compare, plan, progress

LIVE, REFERENCE = "live", "reference"

# Read and compared at once: both buffers stay in a core's own cache (512 KiB took 0.27 s of CPU for 1 GiB of each
# side, 2 MiB 0.34 s, reading alone 0.26 s).
PIECE = 1 << 20

Report = Callable[[progress.ScanError], None]


class Reader:
    """Reads runs of both images and compares them at `granularity`; for one thread.

    `report` is told of each segment that cannot be read.
    """

    def __init__(
        self,
        live: base.Image,
        reference: base.Image,
        granularity: int,
        report: Report,
    ) -> None:
        self._images = {LIVE: live, REFERENCE: reference}
        self._granularity = self._unit = granularity
        self._hashed = reference if isinstance(reference, base.HashedImage) else None
        if self._hashed is not None:
            self._unit = max(granularity, self._hashed.granularity)
        distant = [i.at_once for i in self._images.values() if isinstance(i, base.DistantImage)]
        self._piece = max(PIECE, self._unit, *distant)
        self._buffers = {side: compare.buffer(self._piece) for side in self._images}
        self._views = {side: buffer.data for side, buffer in self._buffers.items()}
        self._at_live, self._at_reference = (
            self._buffers[side].ctypes.data for side in (LIVE, REFERENCE)
        )
        self._report = report
        # Set beside a guest, which is not to wait while this thread copies.
        self.gentle = False
        self._gentle_reads = {
            side: image.read_gently if isinstance(image, base.CopiedImage) else image.read_into
            for side, image in self._images.items()
        }

    def differing(self, start: int, length: int, kind: plan.Kind) -> compare.Mask:
        """Return for each segment of a run whether it differs or cannot be read.

        The run begins at a multiple of the granularity, or of a reference's larger blocks.
        Raises GoneError when an image cannot be reached any more.
        """
        try:
            return self._differing(start, length, kind)
        except base.GoneError:
            raise
        except OSError:
            return self._one_by_one(start, length, kind)

    def _one_by_one(self, start: int, length: int, kind: plan.Kind) -> compare.Mask:
        step = self._granularity if kind is plan.Kind.LIVE else self._unit
        end = start + length
        return np.concatenate(
            [self._alone(at, min(step, end - at), kind) for at in range(start, end, step)]
        )

    def _alone(self, start: int, length: int, kind: plan.Kind) -> compare.Mask:
        """Return which segments of one step differ: all of them where a side cannot be read."""
        if self._readable(start, length, kind):
            try:
                return self._compare(start, length, kind)
            except base.GoneError:
                raise
            except OSError as error:
                # A table of hashes is read when it is asked.
                self._note(REFERENCE, start, length, error)
        return np.ones(-(-length // self._granularity), np.bool_)

    def _readable(self, start: int, length: int, kind: plan.Kind) -> bool:
        """Read one segment and return whether that worked on every side that it needs."""
        readable = True
        for side in self._needed(kind):
            try:
                self._read(side, start, length)
            except base.GoneError:
                raise
            except OSError as error:
                self._note(side, start, length, error)
                readable = False
        return readable

    def _note(self, side: str, start: int, length: int, error: OSError) -> None:
        self._report(progress.ScanError(side, start, length, error.errno or 0))

    def _needed(self, kind: plan.Kind) -> tuple[str, ...]:
        if kind is plan.Kind.REFERENCE:
            return () if self._hashed is not None else (REFERENCE,)
        if kind is plan.Kind.LIVE or self._hashed is not None:
            return (LIVE,)
        return (LIVE, REFERENCE)

    def _differing(self, start: int, length: int, kind: plan.Kind) -> compare.Mask:
        mask = np.zeros(-(-length // self._granularity), np.bool_)
        needed = self._needed(kind)
        for at in range(0, length, self._piece):
            part = min(self._piece, length - at)
            for side in needed:
                self._read(side, start + at, part)
            if len(needed) == 2 and compare.same_memory(self._at_live, self._at_reference, part):
                # The usual case, and all that most of a disk costs.
                continue
            first = at // self._granularity
            found = self._compare(start + at, part, kind)
            mask[first : first + len(found)] = found
        return mask

    def _read(self, side: str, start: int, length: int) -> None:
        """Fill the side's buffer; beyond the image's end there are zeros."""
        image = self._images[side]
        available = max(0, min(length, image.size - start))
        if available:
            read = self._gentle_reads[side] if self.gentle else image.read_into
            read(start, self._views[side][:available])
        if available < length:
            self._buffers[side][available:length] = 0

    def _compare(self, start: int, length: int, kind: plan.Kind) -> compare.Mask:
        """Return which segments of what was just read differ."""
        live = self._buffers[LIVE][:length]
        reference = self._buffers[REFERENCE][:length]
        if kind is plan.Kind.LIVE:
            return compare.nonzero(live, self._granularity)
        if self._hashed is not None:
            if kind is plan.Kind.REFERENCE:
                # The live disk is known to be zero here: its hash need not wait for a read.
                live[:] = 0
            return self._compare_hashes(self._hashed, start, live)
        if kind is plan.Kind.REFERENCE:
            return compare.nonzero(reference, self._granularity)
        return compare.differing(live, reference, self._granularity)

    def _compare_hashes(
        self, reference: base.HashedImage, start: int, live: compare.Bytes
    ) -> compare.Mask:
        """Ask a reference of hashes block by block; `start` is a block's first byte."""
        # Not before `start`: a run may lie altogether beyond the reference's end.
        block, end = reference.granularity, max(start, min(start + len(live), reference.size))
        mask = np.zeros(-(-len(live) // self._granularity), np.bool_)
        for at in range(start, end, block):
            stop = min(at + block, end)
            # Of a block within which the live disk ends, not all the bytes are there that its hash is of.
            cut = stop < min(at + block, reference.size)
            if cut or not reference.equal(at // block, live[at - start : stop - start].data):
                # A block larger than the granularity: any of its segments may be the one.
                first = (at - start) // self._granularity
                mask[first : -(-(stop - start) // self._granularity)] = True
        if end < start + len(live):
            # The reference ends within this run: zeros from there on.
            live[: end - start] = 0
            mask |= compare.nonzero(live, self._granularity)
        return mask
