# SPDX-License-Identifier: Apache-2.0
"""The scan: threads read both images and decide segments; a trio task supervises them.

    event loop      run(), pause(), rescan() ...           sets flags under the condition, wakes the threads
    threads         next chunk -> read both -> compare -> decide, looking at the flags between chunks

Rules. The write bitmap records before run() is called (a segment's bit is set before its bytes may
change, and from before the first read); then whatever a thread reads of a segment being written, the map has
the bit. A thread takes a chunk and decides it, or leaves it undecided; nothing else is shared but the plan,
the decisions and the flags, each under its own lock.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence

from dirtymap import bitmap
from dirtymap.images import base, same
from scanner import compare, crew, decisions, pace, plan, priority, progress, reader

# The names that sessions use.
Decisions = decisions.Decisions
buffer_length = decisions.buffer_length

WORKERS = 2

# Unreadable runs that are kept by name; the rest is counted.
_LISTED_ERRORS = 64


class Scan:
    """A scan of `live` against `reference` that fills in `decision`; all belong to the caller.

    `written` returns the write bitmap as it stands (any thread may ask), of the same geometry; whoever
    makes a map of these decisions ORs everything written since before run(). The map's size, that of
    `decision`, is the live image's. `rules` replaces what same.rules() says of the pair; the shortcuts
    `without` (of plan.REASONS) are not taken.

    The controls are for the event loop's thread and take effect within one chunk.
    """

    def __init__(
        self,
        live: base.Image,
        reference: base.Image,
        decision: decisions.Decisions,
        *,
        written: Callable[[], bitmap.Bitmap] | None = None,
        workers: int = WORKERS,
        rate: int | None = None,
        paused: bool = False,
        without: Collection[str] = (),
        courtesy: pace.Courtesy | None = None,
        rules: Sequence[same.Rule] | None = None,
        tuning: plan.Tuning = plan.TUNING,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._live, self._reference, self.decisions = live, reference, decision
        self._written = written
        self._without = frozenset(without)
        self._rules = same.rules(live, reference) if rules is None else rules
        self._tuning = tuning
        self._clock = clock
        self._unit = decision.granularity
        if isinstance(reference, base.HashedImage):
            self._unit = max(self._unit, reference.granularity)

        # Everything below is read and written under this condition, apart from what says otherwise.
        self._changed = threading.Condition()
        self._pace = pace.Pace(rate, courtesy)
        self._meters = {name: progress.Meter(clock()) for name in ("read", "decided")}
        self._paused = paused
        self._at_work = 0
        self._wanted = _check_workers(workers)
        self._halted = False
        self._exhausted = False
        self._errors: list[progress.ScanError] = []
        self._failure: str | None = None
        self._bug: BaseException | None = None

        self._chunks: Iterator[plan.Run] = iter(())
        self._chunks_lock = threading.Lock()

        # Only the event loop's thread touches these.
        self._crew: crew.Crew | None = None
        self._cancelled = self._again = self._interrupted = False

    # Controls

    def pause(self) -> None:
        """Take no further chunk until resume()."""
        self._set(paused=True)

    def resume(self) -> None:
        """Go on after pause()."""
        self._set(paused=False)

    def cancel(self) -> None:
        """End the scan where it is; the map stays valid. Only rescan() takes it back."""
        self._cancelled = True
        self._halt()

    def rescan(self) -> None:
        """Forget all decisions. A running scan begins again at once, else the next run() does."""
        self._cancelled = self._interrupted = False
        if self._crew is not None:
            # The threads have to end first: a decision made of an older read must not come later.
            self._again = True
            self._halt()
        else:
            self._reset()

    def set_rate(self, rate: int | None) -> None:
        """Read at most `rate` bytes a second from each image; None is without limit."""
        if rate is not None and rate <= 0:
            raise ValueError(f"a rate of {rate} bytes a second")
        with self._changed:
            self._pace.set_rate(rate, self._clock())
            self._changed.notify_all()

    def set_workers(self, workers: int) -> None:
        """Read with `workers` threads from now on, at least one."""
        with self._changed:
            self._wanted = _check_workers(workers)
            self._changed.notify_all()
        if self._crew is not None:
            self._crew.wake()

    def wake(self) -> None:
        """Let the workers ask the courtesy at once, which has changed its mind."""
        with self._changed:
            self._changed.notify_all()

    def _set(self, *, paused: bool) -> None:
        with self._changed:
            self._paused = paused
            self._changed.notify_all()

    def _halt(self) -> None:
        with self._changed:
            self._halted = True
            self._changed.notify_all()
        if self._crew is not None:
            self._crew.wake()

    # The supervising task

    async def run(self) -> None:
        """Return when all is decided, after cancel(), or when an image is gone (state `failed`).

        Called again it goes on with what is undecided. When cancelled by trio, it ends its threads
        before it lets go (a read that has begun is waited for); the decisions stay valid. A bug in a
        thread ends the scan as `failed` and is raised.
        """
        if self._crew is not None:
            raise RuntimeError("the scan is running")
        self._crew = crew.Crew(self._work)
        self._interrupted = True
        try:
            while not self._cancelled:
                await self._pass(self._crew)
                if not self._again:
                    break
                self._reset()
            self._interrupted = False
        finally:
            if self._again:
                self._reset()
            self._crew = None
        if self._bug is not None:
            raise self._bug

    async def _pass(self, workers: crew.Crew) -> None:
        """Run threads until they have decided everything or are halted."""
        self._failure = self._bug = None
        self._halted = self._exhausted = False
        self._at_work = 0
        pass_plan = plan.Plan(
            self._live,
            self._reference,
            self.decisions.size,
            self._unit,
            rules=self._rules,
            without=self._without,
            tuning=self._tuning,
        )
        self._chunks = pass_plan.chunks(self.decisions.undecided())
        try:
            while True:
                if not (self._halted or self._exhausted):
                    for number in set(range(self._wanted)) - workers.alive:
                        workers.start(number)
                if not workers.alive:
                    break
                await workers.changed()
        finally:
            self._halt()
            await workers.ended()

    def _reset(self) -> None:
        """Begin from nothing; no thread is alive."""
        self._again = False
        self.decisions.reset()
        with self._changed:
            self._errors.clear()
            self._failure = self._bug = None

    # The threads

    def _work(self, number: int) -> None:
        """Decide chunks until there are none left or this thread is not wanted any more."""
        try:
            priority.lower()
            desk = reader.Reader(
                self._live,
                self._reference,
                self.decisions.granularity,
                self._note_error,
            )
            while (chunk := self._next(number, desk)) is not None:
                self._decide(chunk, desk)
                with self._changed:
                    self._at_work -= 1
                    self._meters["decided"].add(chunk.length, self._clock())
        except base.GoneError as error:
            self._fail(str(error.strerror or error), None)
        except BaseException as error:  # noqa: BLE001  # handed to run(), which raises it
            self._fail(f"{type(error).__name__}: {error}", error)

    def _next(self, number: int, desk: reader.Reader) -> plan.Run | None:
        """Wait until this thread may work and return its next chunk; None when it is to end."""
        with self._changed:
            while True:
                if self.decisions.complete:
                    self._exhaust()
                if self._halted or self._exhausted or number >= self._wanted:
                    return None
                wait = None if self._paused else self._pace.delay(self._clock(), self._at_work)
                if wait == 0:
                    break
                self._changed.wait(wait)
            self._at_work += 1
            desk.gentle = self._pace.gentle
        with self._chunks_lock:
            chunk = next(self._chunks, None)
        if chunk is None:
            with self._changed:
                self._exhaust()
        return chunk

    def _exhaust(self) -> None:
        """End all threads: who rests beside a guest need not find out after the rest."""
        self._exhausted = True
        self._changed.notify_all()

    def _fail(self, failure: str, bug: BaseException | None) -> None:
        with self._changed:
            self._failure = self._failure or failure
            self._bug = self._bug or bug
            self._halted = True
            self._changed.notify_all()

    def _decide(self, chunk: plan.Run, desk: reader.Reader) -> None:
        granularity = self.decisions.granularity
        if chunk.kind is plan.Kind.EQUAL:
            count = -(-chunk.length // granularity)
            self.decisions.equal(chunk.start // granularity, count, chunk.reason)
            return
        one_side = chunk.kind is not plan.Kind.COMPARE
        for start, end in self._unwritten(chunk):
            self._charge(end - start)
            mask = desk.differing(start, end - start, chunk.kind)
            self.decisions.compared(start // granularity, mask, one_side=one_side)

    def _unwritten(self, chunk: plan.Run) -> list[plan.Range]:
        """Return the parts of a chunk to read: not what the write bitmap has, which is dirty anyway.

        Without that shortcut the whole of it: whoever asks for that wants both disks read.
        """
        whole = [(chunk.start, chunk.end)]
        if self._written is None:
            return whole
        granularity = self.decisions.granularity
        first, count = chunk.start // granularity, -(-chunk.length // granularity)
        written = self._written()
        if (written.size, written.granularity) != (self.decisions.size, granularity):
            raise ValueError(f"{written!r} is no write bitmap of this disk")
        if plan.WRITTEN in self._without or not written.any(first, count):
            return whole
        mask = written.unpack(first, count)
        self.decisions.written(first, mask)
        if mask.all():
            return []
        if self._unit > granularity:
            # Blocks known by one hash are read whole; deciding a written segment twice does no harm.
            return whole
        least = self._tuning.least_saving
        return _parts(~mask, chunk.start, chunk.end, granularity, least)

    def _charge(self, length: int) -> None:
        with self._changed:
            now = self._clock()
            self._pace.charge(length, now)
            self._meters["read"].add(length, now)

    def _note_error(self, error: progress.ScanError) -> None:
        self.decisions.failed_read()
        with self._changed:
            if len(self._errors) < _LISTED_ERRORS:
                self._errors.append(error)

    # Looking at it

    @property
    def state(self) -> str:
        """One of progress's five words."""
        if self._failure is not None:
            return progress.FAILED
        if self.decisions.complete and not self._again:
            return progress.COMPLETE
        if self._cancelled or (self._crew is None and self._interrupted):
            return progress.CANCELLED
        return progress.PAUSED if self._paused else progress.SCANNING

    def statistics(self) -> progress.ScanStatistics:
        """Return the scan as it stands; cheap, for the event loop's thread."""
        decided, differing, savings, error_count = self.decisions.figures()
        state = self.state
        with self._changed:
            now = self._clock()
            rate, pace_of_all = (self._meters[name].rate(now) for name in ("read", "decided"))
            left = self.decisions.size - decided
            running = state == progress.SCANNING and pace_of_all > 0
            return progress.ScanStatistics(
                state=state,
                size=self.decisions.size,
                granularity=self.decisions.granularity,
                scanned=decided,
                skipped=sum(savings.values()) - savings[plan.ONE_SIDE],
                differing=differing,
                savings=savings,
                rate=rate,
                rate_limit=self._pace.rate,
                workers=self._wanted,
                eta=left / pace_of_all if running else None,
                errors=tuple(self._errors),
                error_count=error_count,
                beyond=max(0, self._live.size - self._reference.size),
                failure=self._failure,
            )


def _check_workers(workers: int) -> int:
    if workers < 1:
        raise ValueError(f"{workers} workers")
    return workers


def _parts(
    wanted: compare.Mask, start: int, end: int, granularity: int, least: int
) -> list[plan.Range]:
    """Return the byte ranges of [start, end) whose segments are `wanted`, gaps below `least` included."""
    parts: list[plan.Range] = []
    for segment in wanted.nonzero()[0].tolist():
        first = start + segment * granularity
        last = min(first + granularity, end)
        if parts and first - parts[-1][1] < least:
            parts[-1] = (parts[-1][0], last)
        else:
            parts.append((first, last))
    return parts
