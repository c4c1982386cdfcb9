# SPDX-License-Identifier: Apache-2.0
"""Runs as numbered pieces, to be drawn from.

runs        |==========|     |==|       |=======|
pieces      |0 |1 |2 |3|     |4 |       |5 |6 |7|        none is in two runs, the last of each may be short
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from scanner import plan


@dataclass(frozen=True)
class Stock:
    """`runs`, cut into pieces of `unit` bytes; use `Stock.of`."""

    runs: tuple[plan.Run, ...]
    unit: int
    _ends: np.ndarray
    """For each run the number of the first piece behind it."""

    @classmethod
    def of(cls, runs: Sequence[plan.Run], unit: int) -> Stock:
        """Return the pieces of `runs`."""
        counts = np.array([-(-run.length // unit) for run in runs], np.int64)
        return cls(tuple(runs), unit, np.cumsum(counts))

    @property
    def count(self) -> int:
        """How many pieces there are."""
        return int(self._ends[-1]) if len(self._ends) else 0

    def piece(self, number: int) -> plan.Run:
        """Return a piece by its number, from 0 on."""
        at = int(np.searchsorted(self._ends, number, side="right"))
        run = self.runs[at]
        start = run.start + (number - (int(self._ends[at - 1]) if at else 0)) * self.unit
        return plan.Run(start, min(start + self.unit, run.end), run.kind)
