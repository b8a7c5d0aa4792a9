"""Planning: tokens per second of the device path over a given link, from a recorded trace of moves.

A step takes what it takes with a frozen set. Beside it, a selection is made, its blocks are gathered and uploaded; the next step
waits for that if it is late. What shares cores with the compute makes the step itself slower.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..engine.device_path import DevicePath


@dataclass(frozen=True, slots=True)
class Link:
    """From host memory to the device.

    Parameters
    ----------
    bytes_per_s : float
    latency_s : float
        Of one upload, however small.
    """

    bytes_per_s: float
    latency_s: float

    def seconds(self, n_bytes: float) -> float:
        return self.latency_s + n_bytes / self.bytes_per_s if n_bytes else 0.0


@dataclass(frozen=True, slots=True)
class Forecast:
    """Tokens per second, and milliseconds and bytes of a step."""

    tok_s: float
    wait_ms: float  # per step, for a late prefetch
    bytes_per_step: float


def simulate(
    moves: Sequence[int],
    bytes_per_move: int,
    link: Link,
    step_s: float,
    after_s: float,
    select_s: float,
    *,
    prefetch: bool = True,
    shared: float = 0.0,
) -> Forecast:
    """Replay a trace.

    Parameters
    ----------
    moves : sequence of int
        Blocks moved at each step; 0 where the set was held.
    bytes_per_move : int
    link : Link
    step_s : float
        A step with a frozen set.
    after_s : float
        What every step does for the history, on the host.
    select_s : float
        One selection: predict, select, gather.
    prefetch : bool
        Whether selections run beside the step before.
    shared : float
        Share of a selection that it takes away from the compute, when it runs on the same cores: 0 on a GPU, 1 where all
        cores compute.

    Returns
    -------
    Forecast
    """
    total = wait = 0.0
    for n in moves:
        beside = select_s + link.seconds(n * bytes_per_move) if n else 0.0
        if prefetch:
            late = max(0.0, beside - step_s)
            total += step_s + after_s + late + shared * min(beside, step_s)
            wait += late
        else:
            total += step_s + after_s + beside
            wait += beside
    return Forecast(len(moves) / total, 1e3 * wait / len(moves), bytes_per_move * float(np.mean(moves)))


def measure_link(path: DevicePath) -> Link:
    """Time uploads of this path's staging buffer, medians of 20. What is staged is lost; select anew after it."""
    n_max = path.attached.pool_info.n_staging
    seconds = []
    for n in (1, n_max):
        times = []
        for _ in range(20):
            begin = time.perf_counter()
            path.attached.upload(0, n)
            times.append(time.perf_counter() - begin)
        seconds.append(float(np.median(times)))
    n_bytes = (n_max - 1) * path.pool.bytes_per_move
    return Link(n_bytes / max(1e-9, seconds[1] - seconds[0]), seconds[0])
