"""Which blocks to keep: ``select(scores, ...)`` writes block lists. It knows nothing of predictors or of storage."""

from __future__ import annotations

import numba
import numpy as np
import numpy.typing as npt

FLOOR = np.float32(1e-6)  # weight of a block that history calls dead, squared
SPREAD_FLOOR, SPREAD_CAP = 4, 8  # a row's critical blocks: from a quarter of the mean to eight times it


@numba.njit(nogil=True, cache=True)
def _spread(scores, begin, end, total, floor, cap, keep):
    """keep[row]: how many of the blocks [begin, end) each row keeps, so that the kept scores sum to most."""
    n_rows, n = scores.shape[0], end - begin
    pool = np.empty(n_rows * (cap - floor), np.float32)
    n_pool = 0
    for row in range(n_rows):
        # the best `floor` are kept in any case, those past the best `cap` in none: the others compete
        best = -scores[row, begin:end]
        if cap < n:
            best = np.partition(best, cap - 1)[:cap]
        if floor > 0:
            best = np.partition(best, floor - 1)
        for i in range(floor, cap):
            pool[n_pool] = best[i]
            n_pool += 1
        keep[row] = floor
    free = total - n_rows * floor
    if free <= 0:
        return
    if free >= n_pool:
        keep[:] = cap
        return
    threshold = np.partition(pool, free - 1)[free - 1]
    n_kept = 0
    for i in range(n_pool):
        if pool[i] < threshold:
            keep[i // (cap - floor)] += 1
            n_kept += 1
    for i in range(n_pool):  # ties go to the earlier rows
        if n_kept == free:
            break
        if pool[i] == threshold:
            keep[i // (cap - floor)] += 1
            n_kept += 1


@numba.njit(nogil=True, cache=True)
def _largest(values, n, counts, inside):
    """The n-th largest of ``values``, and how many are larger. ``counts`` (4096,) and ``inside`` (len(values),) are scratch."""
    # floats from zero up are ordered as their bits are: count by the upper ones, then look into one group
    counts[:] = 0
    for i in range(len(values)):
        inside[i] = values[i] if values[i] > 0 else np.float32(0)
    bits = inside.view(np.uint32)
    for i in range(len(bits)):
        counts[bits[i] >> 20] += 1
    group, n_larger = 4095, 0
    while n_larger + counts[group] < n:
        n_larger += counts[group]
        group -= 1
    m = 0
    for i in range(len(values)):
        if bits[i] >> 20 == group:
            inside[m] = inside[i]
            m += 1
    largest = -np.partition(-inside[:m], n - n_larger - 1)[n - n_larger - 1]
    for i in range(m):
        n_larger += inside[i] > largest
    return largest, n_larger


@numba.njit(nogil=True, cache=True)
def _select(scores, n_sink, window_begin, n_used, keep, blocks, n_listed, shares):
    n_middle = window_begin - n_sink
    counts, inside = np.empty(4096, np.int64), np.empty(n_middle, np.float32)
    for row in range(scores.shape[0]):
        n = 0
        for b in range(n_sink):
            blocks[row, n] = b
            n += 1
        # the score of the last block that gets in
        n_keep = min(keep[row], n_middle)
        threshold = np.float32(np.inf)
        n_equal = 0
        if n_keep > 0:
            threshold, n_larger = _largest(scores[row, n_sink:window_begin], n_keep, counts, inside)
            n_equal = n_keep - n_larger
        for b in range(n_sink, window_begin):
            s = scores[row, b]
            take = s > threshold
            if s == threshold and n_equal > 0:
                take = True
                n_equal -= 1
            if take and s >= 0:
                blocks[row, n] = b
                n += 1
        for b in range(window_begin, n_used):
            blocks[row, n] = b
            n += 1
        n_listed[row] = n
        # share of the predicted attention that the list holds
        total = np.float32(0)
        for b in range(n_used):
            total += max(scores[row, b], np.float32(0))
        held = np.float32(0)
        for i in range(n):
            held += max(scores[row, blocks[row, i]], np.float32(0))
        shares[row] = held / total if total > 0 else np.float32(1)


def select(
    scores: npt.NDArray[np.float32],
    n_used: int,
    n_budget: int,
    n_sink: int,
    n_window: int,
    blocks: npt.NDArray[np.int32],
    n_listed: npt.NDArray[np.int32],
    shares: npt.NDArray[np.float32],
    allocation: str = "uniform",
) -> None:
    """Write the list of every row: sink, the best ``n_budget - n_sink - n_window`` between, window. Ids ascend.

    With ``allocation="spread"`` the rows together keep ``n_rows`` times as many, each between a quarter of that number and
    eight times it, chosen by score over all rows: scores are shares of attention, so the rows where attention is wide get
    more (DESIGN.md 7).

    Parameters
    ----------
    scores : float32, shape (n_rows, >= n_used)
        Negative scores are never selected. Ties go to the earlier block.
    n_used, n_budget, n_sink, n_window : int
        Blocks in use; blocks per row, in the mean; of these at the start and at the end of the context.
    blocks : int32, shape (n_rows, >= n_used), out
    n_listed : int32, shape (n_rows,), out
    shares : float32, shape (n_rows,), out
        Share of the (non-negative) scores that the listed blocks hold: the estimate of the step's recovery.
    """
    if n_budget >= n_used:
        list_all(n_used, blocks, n_listed)
        shares[:] = 1.0
        return
    n_sink = min(n_sink, n_used)
    window_begin = max(n_sink, n_used - n_window)
    n_middle = window_begin - n_sink
    n_critical = min(n_budget - n_sink - n_window, n_middle)
    keep = _keep(scores, n_sink, window_begin, n_critical, allocation)
    _select(scores, n_sink, window_begin, n_used, keep, blocks, n_listed, shares)


@numba.njit(nogil=True, cache=True)
def _weigh(scores, begin, end, weights):
    for row in range(scores.shape[0]):
        for b in range(begin, end):
            weights[row, b] = np.sqrt(max(scores[row, b], np.float32(0)) + FLOOR)


def select_candidates(
    scores: npt.NDArray[np.float32],
    n_used: int,
    n_budget: int,
    n_sink: int,
    n_window: int,
    blocks: npt.NDArray[np.int32],
    n_listed: npt.NDArray[np.int32],
    n_topk: npt.NDArray[np.int32],
    weights: npt.NDArray[np.float32],
    allocation: str = "uniform",
) -> tuple[int, int]:
    """As ``select``, but list sink and window only: the steps choose the critical blocks, by their own queries.

    Parameters
    ----------
    n_topk : int32, shape (n_rows,), out
        How many they choose.
    weights : float32, shape (n_rows, >= n_used), out
        The square root of the score, by which they multiply the attention that they estimate.

    Returns
    -------
    begin, end : int
        The blocks to choose from; both 0 when everything is listed.
    """
    if n_budget >= n_used:
        list_all(n_used, blocks, n_listed)
        n_topk[:] = 0
        return 0, 0
    window_begin = max(n_sink, n_used - n_window)
    n_critical = min(n_budget - n_sink - n_window, window_begin - n_sink)
    ends = np.r_[0:n_sink, window_begin:n_used]
    blocks[:, : len(ends)] = ends
    n_listed[:] = len(ends)
    n_topk[:] = _keep(scores, n_sink, window_begin, n_critical, allocation)
    _weigh(scores, n_sink, window_begin, weights)
    return n_sink, window_begin


def _keep(scores, begin, end, n_critical, allocation):
    """int64, shape (n_rows,): critical blocks of each row."""
    keep = np.full(len(scores), n_critical, np.int64)
    if allocation == "spread" and n_critical > 0:
        floor, cap = n_critical // SPREAD_FLOOR, min(end - begin, n_critical * SPREAD_CAP)
        _spread(scores, begin, end, n_critical * len(scores), floor, cap, keep)
    return keep


def list_all(n_used: int, blocks: npt.NDArray[np.int32], n_listed: npt.NDArray[np.int32]) -> None:
    """Every block in use, for every row."""
    blocks[:, :n_used] = np.arange(n_used, dtype=np.int32)
    n_listed[:] = n_used


def append_block(block: int, blocks: npt.NDArray[np.int32], n_listed: npt.NDArray[np.int32]) -> None:
    """Add a newly opened block, larger than all listed, to the end of every list."""
    blocks[np.arange(len(blocks)), n_listed] = block
    n_listed += 1
