"""What is remembered of attention: a few exponential averages of each block's score, per layer and KV head.

A score is the sum of attention probability over a block's tokens, mean over the query heads of the group. Blocks that a
step did not attend to keep their last known averages (never zeros for what was not seen). Kernels take plain arrays; the
naive twins are in tests/helpers/naive.py.
"""

from __future__ import annotations

import numba
import numpy as np
import numpy.typing as npt

from predictor_onnx.features import DECAYS

from ..blocks import BLOCK_TOKENS

ALL = slice(None)
MOST_WAITING = 8  # steps of one list
SCORE_MAX = 2.0  # in a file; the attention of a block is at most 1, and rounding adds little


@numba.njit(nogil=True, cache=True)
def _observe_listed(averages, seen, now, decays, blocks, n_listed, scores, shares):
    for row in range(blocks.shape[0]):
        for i in range(n_listed[row]):
            b = blocks[row, i]
            seen[row, b] = now
            score = scores[row, i] * shares[row]
            for d in range(decays.shape[0]):
                averages[row, d, b] = decays[d] * averages[row, d, b] + (np.float32(1) - decays[d]) * score


@numba.njit(nogil=True, cache=True)
def _catch_up(averages, seen, now, decays, lists, lengths, waiting, n_waiting):
    """Take in the steps that wait: what ``_observe_listed`` makes of them one after another."""
    listed = np.empty(lists.shape[1], np.float32)
    for row in range(averages.shape[0]):
        if n_waiting[row] == 0:
            continue
        n = lengths[row]
        for i in range(n):
            seen[row, lists[row, i]] = now
        for d in range(decays.shape[0]):
            keep = decays[d]
            add = np.float32(1) - keep
            for i in range(n):
                listed[i] = averages[row, d, lists[row, i]]
            for step in range(n_waiting[row]):
                for i in range(n):
                    listed[i] = keep * listed[i] + add * waiting[row, step, i]
            for i in range(n):
                averages[row, d, lists[row, i]] = listed[i]
        n_waiting[row] = 0


@numba.njit(nogil=True, cache=True)
def _observe_later(blocks, n_listed, scores, shares, averages, seen, now, decays, lists, lengths, waiting, n_waiting):
    for row in range(averages.shape[0]):
        n = n_listed[row]
        same = n_waiting[row] < waiting.shape[1] and lengths[row] == n
        for i in range(n if same else 0):
            same &= lists[row, i] == blocks[row, i]
        if not same:
            one = slice(row, row + 1)
            _catch_up(averages[one], seen[one], now, decays, lists[one], lengths[one], waiting[one], n_waiting[one])
            lists[row, :n] = blocks[row, :n]
            lengths[row] = n
        for i in range(n):
            waiting[row, n_waiting[row], i] = scores[row, i] * shares[row]
        n_waiting[row] += 1


@numba.njit(nogil=True, cache=True)
def _observe_all(averages, decays, scores, begin, end, n_blocks):
    n_layer, _, n_head_kv, _ = scores.shape
    for layer in range(n_layer):
        for tap in range(begin, end):
            for head in range(n_head_kv):
                row = layer * n_head_kv + head
                for d in range(decays.shape[0]):
                    keep = decays[d]
                    add = np.float32(1) - keep
                    for b in range(n_blocks):
                        averages[row, d, b] = keep * averages[row, d, b] + add * scores[layer, tap, head, b]


@numba.njit(nogil=True, cache=True)
def _keep_listed(before, now, blocks, n_listed, scores, shares):
    now[:] = before
    for row in range(blocks.shape[0]):
        for i in range(n_listed[row]):
            now[row, blocks[row, i]] = scores[row, i] * shares[row]


@numba.njit(nogil=True, cache=True)
def _changed(seen, since, n_blocks, reach):
    """int64, shape (n, 3): row, first block and end of the segments whose prediction is not that of ``since``; see ``History.changed``."""
    segments = np.empty((seen.shape[0] * (n_blocks // (4 * reach + 2) + 1), 3), np.int64)
    n = 0
    for row in range(seen.shape[0]):
        b = 0
        while b < n_blocks:
            if seen[row, b] <= since[row]:
                b += 1
                continue
            begin = end = b
            while b < min(n_blocks, end + 4 * reach + 1):  # what lies nearer would be read twice
                if seen[row, b] > since[row]:
                    end = b + 1
                b += 1
            segments[n, 0], segments[n, 1], segments[n, 2] = row, max(0, begin - reach), min(n_blocks, end + reach)
            n += 1
    return segments[:n]


@numba.njit(nogil=True, cache=True)
def _gather(averages, segments, n_blocks, reach):
    """One segment after another, each with ``reach`` blocks at either side; zeros where a row ends: (len(DECAYS), n)."""
    n = 0
    for i in range(len(segments)):
        n += segments[i, 2] - segments[i, 1] + 2 * reach
    out = np.zeros((averages.shape[1], (n + 255) // 256 * 256), np.float32)  # few different lengths
    at = 0
    for i in range(len(segments)):
        row, begin, end = segments[i]
        low, high = max(0, begin - reach), min(n_blocks, end + reach)
        for d in range(averages.shape[1]):
            out[d, at + low - begin + reach : at + high - begin + reach] = averages[row, d, low:high]
        at += end - begin + 2 * reach
    return out


@numba.njit(nogil=True, cache=True)
def _gather_changed(since, n_blocks, reach, averages, seen, now, decays, lists, lengths, waiting, n_waiting):
    _catch_up(averages, seen, now, decays, lists, lengths, waiting, n_waiting)
    segments = _changed(seen, since, n_blocks, reach)
    return segments, _gather(averages, segments, n_blocks, reach)


@numba.njit(nogil=True, cache=True)
def _scatter(predicted, segments, reach, scores):
    at = reach
    for i in range(len(segments)):
        row, begin, end = segments[i]
        scores[row, begin:end] = predicted[at : at + end - begin]
        at += end - begin + 2 * reach


class History:
    """Averages of block scores, updated in place; and the scores of the last steps themselves where a predictor asks for them.

    Parameters
    ----------
    n_layer, n_head_kv, n_blocks : int
        Shape of the cache; a *row* is one KV head of one layer.

    Attributes
    ----------
    averages : float32, shape (n_layer * n_head_kv, len(DECAYS), n_blocks)
        Without what ``observe_later`` was given since the last ``catch_up``.
    n_observed : int
        Steps since the last reset.
    epoch : int
        Counts the edits that dropped something.
    """

    def __init__(self, n_layer: int, n_head_kv: int, n_blocks: int):
        self.averages = np.zeros((n_layer * n_head_kv, len(DECAYS), n_blocks), np.float32)
        self._decays = np.array(DECAYS, np.float32)
        self._seen = np.zeros((n_layer * n_head_kv, n_blocks), np.int32)  # when each block was observed last
        self.clock = 0  # counts what was observed, calibration included
        self._ring: npt.NDArray[np.float32] | None = None  # (n_steps, n_rows, n_blocks), step number n at n % n_steps
        self._n_in_ring = 0
        self._n_waiting = np.zeros(n_layer * n_head_kv, np.int32)  # steps that are not yet in a row's averages
        self._lists, self._lengths = np.zeros((n_layer * n_head_kv, 0), np.int32), self._n_waiting.copy()  # what they attended to
        self._waiting = np.zeros((n_layer * n_head_kv, MOST_WAITING, 0), np.float32)
        self.n_observed = 0
        self.epoch = 0

    @property
    def primed(self) -> bool:
        """Whether anything is known."""
        return self.n_observed > 0

    def keep_steps(self, n_steps: int) -> bool:
        """From now on keep the scores of so many steps, at least. Blocks that a step did not see keep their last known score. True: these
        are more than before, and none is there yet."""
        if n_steps <= (0 if self._ring is None else len(self._ring)):
            return False
        self.catch_up()
        n_rows, _, n_blocks = self.averages.shape
        self._ring = np.zeros((n_steps, n_rows, n_blocks), np.float32)
        self._n_in_ring = 0
        return True

    def last_rows(self, n_steps: int) -> npt.NDArray[np.float32]:
        """float32, shape (n, n_rows, n_blocks), oldest first: at most ``n_steps``, and one at least."""
        assert self._ring is not None
        return self._ring[self._places(max(1, min(n_steps, self._n_in_ring)))]

    def _places(self, n_steps: int) -> npt.NDArray[np.int64]:
        """Where in the ring the last steps are, oldest first."""
        assert self._ring is not None
        return np.arange(self.n_observed - n_steps, self.n_observed) % len(self._ring)

    def observe_listed(self, blocks: npt.NDArray, n_listed: npt.NDArray, scores: npt.NDArray, shares: npt.NDArray) -> None:
        """Take in a sparse step.

        Parameters
        ----------
        blocks : int32, shape (n_rows, n_blocks)
        n_listed : int32, shape (n_rows,)
        scores : float32, shape (n_rows, n_blocks), in list order
        shares : float32, shape (n_rows,)
            Estimated share of the whole attention that the listed blocks hold: scores of a sparse step sum to one over
            the listed blocks, those of a dense step over all.
        """
        self.catch_up()
        self.clock += 1
        _observe_listed(self.averages, self._seen, self.clock, self._decays, blocks, n_listed, scores, shares)
        if self._ring is not None:
            n = len(self._ring)
            _keep_listed(self._ring[(self.n_observed - 1) % n], self._ring[self.n_observed % n], blocks, n_listed, scores, shares)
            self._n_in_ring += 1
        self.n_observed += 1

    def observe_later(self, blocks: npt.NDArray, n_listed: npt.NDArray, scores: npt.NDArray, shares: npt.NDArray) -> None:
        """As ``observe_listed``, for lists that seldom change: the averages follow at ``catch_up``, of several steps in one go."""
        if self._ring is not None:
            return self.observe_listed(blocks, n_listed, scores, shares)
        longest = int(n_listed.max(initial=0))
        if longest > self._lists.shape[1]:
            self.catch_up()
            n = -(-longest // 64) * 64
            lists = np.zeros((len(n_listed), n), np.int32)
            self._waiting = np.empty((len(n_listed), MOST_WAITING, n), np.float32)
            self._lists = lists  # last: its width says that both are there
        self.clock += 1
        self.n_observed += 1
        _observe_later(blocks, n_listed, scores, shares, *self._rows(ALL))

    def catch_up(self, rows: slice = ALL) -> None:
        """Bring the averages of some rows up to date; several threads may do so for rows of their own."""
        _catch_up(*self._rows(rows))

    def _rows(self, rows: slice) -> tuple:
        """What kernels take of some rows, last."""
        waiting = self._lists[rows], self._lengths[rows], self._waiting[rows], self._n_waiting[rows]
        return self.averages[rows], self._seen[rows], self.clock, self._decays, *waiting

    def observe_all(self, scores: npt.NDArray, begin: int, end: int, n_used_blocks: int) -> None:
        """Take in the tokens [begin, end) of a history batch: scores float32, shape (n_layer, max_taps, n_head_kv, n_blocks)."""
        self.catch_up()
        self.clock += 1
        self._seen[:, :n_used_blocks] = self.clock
        _observe_all(self.averages, self._decays, scores, begin, end, n_used_blocks)
        if self._ring is not None:
            for tap in range(begin, end):
                self._ring[(self.n_observed + tap - begin) % len(self._ring)] = scores[:, tap].reshape(self.averages[:, 0].shape)
            self._n_in_ring += end - begin
        self.n_observed += end - begin

    def observe_rows(self, layer: int, scores: npt.NDArray, n_used_blocks: int) -> None:
        """Take in the exact scores of one layer, float32, shape (1, n_head_kv, n_blocks), beside those of a sparse step."""
        rows = slice(layer * scores.shape[1], (layer + 1) * scores.shape[1])
        self.catch_up(rows)
        self.clock += 1
        self._seen[rows, :n_used_blocks] = self.clock
        _observe_all(self.averages[rows], self._decays, scores[None], 0, 1, n_used_blocks)

    def changed(
        self, rows: slice, n_blocks: int, since: npt.NDArray[np.int64], reach: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Catch up; where a prediction that looks ``reach`` blocks to either side differs from an earlier one, and what it looks at.

        Parameters
        ----------
        since : int64, shape (n_rows,)
            ``clock`` at that time, of the rows asked for; negative: never.

        Returns
        -------
        segments : int64, shape (n, 3)
            Row among those asked for, first block and end of each segment, in order.
        averages : float32, shape (len(DECAYS), n_gathered)
            Of the segments, each with ``reach`` blocks more at either side, zeros past a row's ends; and zeros after the last.
        """
        return _gather_changed(since, n_blocks, reach, *self._rows(rows))

    @staticmethod
    def scatter(predicted: npt.NDArray[np.float32], segments: npt.NDArray[np.int64], reach: int, scores: npt.NDArray[np.float32]) -> None:
        """Put what was predicted of what ``changed`` yields where it belongs."""
        _scatter(predicted, segments, reach, scores)

    def save(self) -> tuple:
        """What ``restore`` takes."""
        self.catch_up()
        return self.averages.copy(), None if self._ring is None else self._ring.copy(), self._n_in_ring, self.n_observed

    def restore(self, saved: tuple) -> None:
        """Back to what was saved; counts as an edit."""
        self.catch_up()
        averages, ring, self._n_in_ring, self.n_observed = saved
        self.averages[:] = averages
        self.change_from(0)
        if self._ring is None or ring is None or self._ring.shape != ring.shape:
            self._n_in_ring = 0
        else:
            self._ring[:] = ring
        self.epoch += 1

    def renew(self) -> None:
        """Whatever a predictor has kept of before is void."""
        self.change_from(0)
        self.epoch += 1

    def change_from(self, block: int) -> None:
        """What a predictor has kept of the blocks from this one on is void."""
        self.clock += 1
        self._seen[:, block:] = self.clock

    def kept(self, n_blocks: int) -> dict[str, npt.NDArray[np.float32]]:
        """What ``take`` takes, of the first ``n_blocks`` blocks; for a file."""
        self.catch_up()
        arrays = {"averages": self.averages[:, :, :n_blocks]}
        if self._ring is not None:
            n_steps = min(len(self._ring), self._n_in_ring)
            arrays["last_steps"] = self._ring[self._places(n_steps), :, :n_blocks]
        return arrays

    def check(self, arrays: dict[str, npt.NDArray], n_blocks: int) -> None:
        """Whether ``take`` can take this, of anybody's: what a history of this shape has ``kept`` of ``n_blocks`` blocks.

        Raises
        ------
        ValueError
            It is of another type or shape, or is no share of attention.
        """
        n_rows, n_decays, _ = self.averages.shape
        for name, shape in (("averages", (n_rows, n_decays, n_blocks)), ("last_steps", (-1, n_rows, n_blocks))):
            x = arrays.get(name)
            if x is None:
                continue
            if x.dtype != np.float32 or x.ndim != 3 or any(n not in (-1, m) for n, m in zip(shape, x.shape)):
                raise ValueError(f"{name} is of another shape")
            if not ((x >= 0) & (x <= SCORE_MAX)).all():  # nor nan
                raise ValueError(f"{name} holds what is no share of attention")

    def take(self, arrays: dict[str, npt.NDArray[np.float32]], n_observed: int) -> bool:
        """Go on from what was ``kept``, on a history of which nothing is known. False: it lacks something, and nothing was taken."""
        averages, steps = arrays.get("averages"), arrays.get("last_steps")
        if averages is None or averages.shape[:2] != self.averages.shape[:2] or averages.shape[2] > self.averages.shape[2]:
            return False
        if self._ring is not None and steps is None:
            return False
        n_blocks = averages.shape[2]
        self.averages[:, :, :n_blocks] = averages
        self.n_observed = n_observed
        if self._ring is not None and steps is not None:
            steps = steps[-len(self._ring) :]
            self._ring[self._places(len(steps)), :, :n_blocks] = steps
            self._n_in_ring = len(steps)
        self.epoch += 1
        self.change_from(0)
        return True

    def truncate(self, n_tokens: int) -> None:
        """Drop what is known of blocks at or past the cell ``n_tokens``; everything when it is 0."""
        self.catch_up()
        first = n_tokens // BLOCK_TOKENS
        self.averages[:, :, first:] = 0
        self.change_from(first)
        if self._ring is not None:
            self._ring[:, :, first:] = 0
        if n_tokens == 0:
            self.n_observed = self._n_in_ring = 0
        self.epoch += 1
