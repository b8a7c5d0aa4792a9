"""What is in the pool and what has to move: kernels over block tables, and ``Pool``, which moves blocks.

Kernels take plain arrays and write into the caller's; the naive twins are in tests/helpers/naive.py. Entry i of a table's row is the
block in slot i, -1 for none.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from ..bindings.context import NativeContext
from ..blocks import BLOCK_TOKENS

Ids = npt.NDArray[np.int32]
PART = 512  # blocks whose copying is worth a thread


@numba.njit(nogil=True, cache=True)
def _difference(table, n_slots, wanted, n_wanted, first, which, n_max, rows, slots, blocks):
    """The first ``n_max`` moves, or fewer, that bring the slots [first, n_slots) of the rows ``which`` to what is wanted; how many."""
    n = 0
    resident = np.zeros(wanted.shape[1] + 1, np.uint8)
    for row in which:
        for i in range(n_wanted[row]):
            resident[wanted[row, i]] = 1  # wanted
        for s in range(first, n_slots[row]):
            b = table[row, s]
            if b >= 0 and resident[b] == 1:
                resident[b] = 2  # and there
        s = first
        for i in range(n_wanted[row]):
            b = wanted[row, i]
            if resident[b] == 1:
                # the next slot that holds nothing wanted
                while table[row, s] >= 0 and resident[table[row, s]] == 2:
                    s += 1
                if n == n_max:
                    for j in range(n_wanted[row]):
                        resident[wanted[row, j]] = 0
                    return n
                rows[n], slots[n], blocks[n] = row, s, b
                n += 1
                s += 1
        for i in range(n_wanted[row]):
            resident[wanted[row, i]] = 0
    return n


@numba.njit(nogil=True, cache=True)
def _drop(table, in_use, n_listed, which):
    """Empty the slots [in_use, n_listed) of the rows ``which``."""
    for row in which:
        table[row, in_use[row] : n_listed[row]] = -1


@numba.njit(nogil=True, cache=True)
def _gather(store, offsets, row_bytes, head_bytes, n_head_kv, rows, blocks, out):
    """Copy K or V of blocks, rows of one KV head after another, from the store to out."""
    at = 0
    for i in range(len(rows)):
        layer, head = rows[i] // n_head_kv, rows[i] % n_head_kv
        begin = offsets[layer] + blocks[i] * 16 * row_bytes + head * head_bytes
        for _ in range(16):
            to, source = out[at : at + head_bytes], store[begin : begin + head_bytes]  # as views of a known length, 15 times as fast
            for c in range(len(to)):
                to[c] = source[c]
            at += head_bytes
            begin += row_bytes


class Pool:
    """The slots of the device path, and the movement of blocks into them.

    Parameters
    ----------
    attached : NativeContext
        With a pool.
    spread : callable
        Makes calls, each a function and its arguments, perhaps on several threads.

    Attributes
    ----------
    n_slots : int32, shape (n_rows,)
        Slots of each row, by the plan.
    n_moved : int
        Blocks moved, since the start.
    """

    def __init__(self, attached: NativeContext, spread: Callable[[list[tuple]], Any]):
        info, pool = attached.info, attached.pool_info
        self._attached = attached
        self._spread = spread
        self._n_head_kv = info.n_head_kv
        n_rows = info.n_layer * info.n_head_kv
        self.table = attached.blocks.reshape(n_rows, info.n_blocks)
        self.n_slots = np.zeros(n_rows, np.int32)
        self._first_slot = np.zeros(n_rows, np.int64)
        self.bytes_per_move = pool.k_block_bytes + pool.v_block_bytes
        self.n_moved = 0
        self._store = []
        for kind, row_bytes in enumerate((info.k_row_bytes, info.v_row_bytes)):
            # one array over the layers' rows, wherever they lie
            starts = np.array([attached.rows(layer)[kind].ctypes.data for layer in range(info.n_layer)], np.int64)
            base = starts.min()
            whole = _bytes_at(int(base), int(starts.max() - base) + info.n_cells * row_bytes)
            self._store.append((whole, starts - base, row_bytes, row_bytes // info.n_head_kv))
        n = pool.n_staging
        self.n_staging = n  # blocks that a buffer holds
        self._k_bytes = n * pool.k_block_bytes
        self._moves = [tuple(np.zeros(n, t) for t in (np.int32, np.int32, np.int32)) for _ in (0, 1)]  # rows, slots, blocks

    def plan(self, layer_slots: npt.NDArray[np.int32], n_sink: int, n_window: int) -> None:
        """Give every layer its slots per KV head: shape (n_layer,), multiples of 16. Empties the pool; ValueError when they do not fit."""
        self._attached.plan_pool(layer_slots, n_sink, n_window)
        self.n_slots[:] = np.repeat(layer_slots, self._n_head_kv)
        order = np.argsort(self.n_slots, kind="stable")  # layers with the same slots lie together
        self._first_slot[order] = np.concatenate([[0], np.cumsum(self.n_slots[order])[:-1]])

    def forget_from(self, block: int) -> None:
        """Empty the slots whose blocks lie at or past ``block``."""
        self.table[self.table >= block] = -1

    def stage(self, buffer: int, wanted: Ids, n_wanted: Ids, n_used: Ids, first: int, which: Ids) -> int:
        """Bring what is wanted and not there to a staging buffer on the device. Runs beside a step.

        Parameters
        ----------
        wanted, n_wanted : int32, shapes (n_rows, n_blocks), (n_rows,)
        n_used : int32, shape (n_rows,)
            Slots that will be in use.
        first : int
            Slots before this are left alone.
        which : int32, shape (n,)
            Rows; the others are left alone.

        Returns
        -------
        int
            Moves staged; as many as a buffer holds when there may be more to make.
        """
        rows, slots, blocks = self._moves[buffer]
        n = _difference(self.table, n_used, wanted, n_wanted, first, which, len(rows), rows, slots, blocks)
        self.upload(buffer, n)
        return n

    def upload(self, buffer: int, n: int) -> None:
        """Gather the blocks of a buffer's first n moves (``stage`` or ``put`` made them) and bring them to the device."""
        rows, slots, blocks = self._moves[buffer]
        staged, targets = self._attached.staging[buffer]
        self._spread([(self._copy, rows[:n], blocks[:n], staged, begin) for begin in range(0, max(n, 1), PART)])
        targets[:n] = self._first_slot[rows[:n]] + slots[:n]
        if n:
            self._attached.upload(buffer, n)

    def _copy(self, rows: Ids, blocks: Ids, staged: npt.NDArray[np.uint8], begin: int) -> None:
        """K and V of at most ``PART`` blocks of a buffer's moves, from the store to the buffer."""
        part = slice(begin, begin + PART)
        for (store, offsets, row_bytes, head_bytes), out in zip(self._store, (staged[: self._k_bytes], staged[self._k_bytes :])):
            place = out[begin * BLOCK_TOKENS * head_bytes :]
            _gather(store, offsets, row_bytes, head_bytes, self._n_head_kv, rows[part], blocks[part], place)

    def apply(self, buffer: int, n: int) -> None:
        """Put n staged blocks into their slots and into the table."""
        rows, slots, blocks = self._moves[buffer]
        self._attached.scatter(buffer, n)
        self.table[rows[:n], slots[:n]] = blocks[:n]
        self.n_moved += n

    def move(self, wanted: Ids, n_wanted: Ids, n_used: Ids, first: int, which: Ids) -> None:
        """Bring everything that the rows ``which`` want into the pool, now."""
        buffer, n = 0, self.n_staging
        while n == self.n_staging:
            n = self.stage(buffer, wanted, n_wanted, n_used, first, which)
            self.apply(buffer, n)
            buffer = 1 - buffer

    def drop(self, in_use: Ids, n_listed: Ids, which: Ids) -> None:
        """Empty the slots [in_use, n_listed) of the rows ``which``."""
        _drop(self.table, in_use, n_listed, which)

    def put(self, slot: int, block: int) -> None:
        """Bring one block into the same slot of every row, now."""
        n_rows, n_max = len(self.table), self.n_staging
        for i, begin in enumerate(range(0, n_rows, n_max)):
            rows, slots, blocks = self._moves[i % 2]
            n = min(n_max, n_rows - begin)
            rows[:n] = np.arange(begin, begin + n)
            slots[:n], blocks[:n] = slot, block
            self.upload(i % 2, n)
            self.apply(i % 2, n)


def _bytes_at(address: int, n: int) -> npt.NDArray[np.uint8]:
    return np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(ctypes.c_uint8)), shape=(n,))


def plan_slots(mass: npt.NDArray[np.float32], n_mean: int, n_least: int, n_most: int, step: int = 256 // BLOCK_TOKENS) -> Ids:
    """Slots per KV head of each layer, in steps of 256 tokens, the same total as ``n_mean`` for all.

    Parameters
    ----------
    mass : float32, shape (n_layer, n_blocks)
        Predicted attention of every block that competes, the largest first: what one more block of the layer would hold.
    n_mean, n_least, n_most : int
        Blocks; multiples of ``step``.
    """
    n_layer = len(mass)
    n_slots = np.full(n_layer, n_least, np.int32)
    mass = np.pad(mass, ((0, 0), (0, max(0, n_most - mass.shape[1]))))
    held = np.concatenate([np.zeros((n_layer, 1)), np.cumsum(mass, 1, dtype=np.float64)], 1)
    layers = np.arange(n_layer)
    for _ in range((n_mean - n_least) * n_layer // step):
        more = np.minimum(n_slots + step, held.shape[1] - 1)
        gain = np.where(n_slots < n_most, held[layers, more] - held[layers, n_slots], -1)
        n_slots[gain.argmax()] += step
    return n_slots
