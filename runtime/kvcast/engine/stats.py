"""What sparse steps took, in sums."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..bindings import api as native


@dataclass
class StepTimes:
    """Sums over sparse steps, seconds."""

    n_steps: int = 0
    n_calibrations: int = 0
    total: float = 0.0
    predict: float = 0.0
    select: float = 0.0
    observe: float = 0.0
    gather: float = 0.0  # device path: from the store, and up
    wait: float = 0.0  # for what runs beside the step, after the step's own computing was done; an upper bound where that is a GPU's
    calibrate: float = 0.0  # whole duration of the calibrating steps
    blocks_read: int = 0
    blocks_dense: int = 0  # that a dense step would have read
    share_sum: float = 0.0  # of the estimated recovery
    attention_us: int = 0
    choose_us: int = 0
    summary_bytes_read: int = 0
    n_drafted: int = 0  # tokens of drafts that were checked
    n_checks: int = 0
    n_accepted: int = 0  # of them, those that dense attention says too
    moves: list[int] = field(default_factory=list)  # device path: blocks brought into the pool, by step

    def count(
        self,
        begin: float,
        observed: float,
        n_read: int,
        n_dense: int,
        share: float,
        calibrated: bool,
        before: native.kvcast_stats,
        after: native.kvcast_stats,
    ) -> None:
        """Add a step.

        Parameters
        ----------
        begin, observed : float
            When it began, and when llama_decode was done with; seconds of ``time.perf_counter``.
        n_read, n_dense : int
            Blocks of all rows that it read, and that a dense one would have.
        share : float
            Estimated recovery.
        calibrated : bool
            It attended to everything.
        before, after : kvcast_stats
            Native sums before and after it.
        """
        end = time.perf_counter()
        self.n_steps += 1
        self.observe += end - observed
        self.total += end - begin
        self.blocks_read += n_read
        self.blocks_dense += n_dense
        self.share_sum += share
        self.attention_us += after.attention_us - before.attention_us
        self.choose_us += after.choose_us - before.choose_us
        self.summary_bytes_read += after.summary_bytes_read - before.summary_bytes_read
        if calibrated:
            self.n_calibrations += 1
            self.calibrate += end - begin

    def ms(self, seconds: float) -> float:
        return 1e3 * seconds / max(1, self.n_steps)
