"""What the running session looks like: figures, and maps of which blocks are attended to. Read from any thread.

Everything here is memory of Python's own, so that reading it is safe while the model computes or is replaced; a value may be
a step older than its neighbour.
"""

from __future__ import annotations

import base64
import time
from typing import TYPE_CHECKING, Any

import numba
import numpy as np
import numpy.typing as npt

from predictor_onnx.features import DECAYS

from ..blocks import BLOCK_TOKENS
from ..engine.stats import StepTimes

if TYPE_CHECKING:
    from .served import ServedLlama

DECAY = DECAYS.index(0.9)
DECADES = 5  # of attention that the map shows: 0 is a hundred-thousandth of it or less, 255 is all


@numba.njit(nogil=True, cache=True)
def _mark(blocks, n, step, hold, seen, entered):
    """seen[row, block] = step for the blocks of each row's list; entered = step for those that were in none of the ``hold`` before."""
    for row in range(blocks.shape[0]):
        for i in range(n[row]):
            b = blocks[row, i]
            if seen[row, b] < step - hold:
                entered[row, b] = step
            seen[row, b] = step


class SessionMonitor:
    """Figures of a served model, renewed by its steps.

    Parameters
    ----------
    llm : ServedLlama

    Attributes
    ----------
    version : int
        Grows with every change.
    """

    def __init__(self, llm: ServedLlama):
        self._llm = llm
        self.version = 0
        self._state, self._progress = "idle", (0, 0)
        self._first = self._last = 0.0
        self._n_answer = 0  # tokens
        self._times = StepTimes()
        header, n_ctx = llm.header, llm.n_ctx()
        config = llm.sparse
        params = llm.context_params
        self._facts: dict[str, Any] = {
            "model": llm.name,
            "n_ctx": n_ctx,
            "block_tokens": BLOCK_TOKENS,
            "n_layer": header.n_layer,
            "n_head_kv": header.n_head_kv,
            "path": "dense" if config is None else "device" if config.device else "host",
            "store_bytes": header.store_bytes(n_ctx, params.type_k, params.type_v, None if params.swa_full else params.n_ubatch),
            "pool_bytes": 0,
        }
        if config is not None:
            session = llm.session
            self._facts["pool_bytes"] = session.attached.pool_info.pool_bytes
            self._facts["n_layer"], self._facts["n_head_kv"] = session.attached.info.n_layer, session.attached.info.n_head_kv
            self._history = session.history
            self._seen = np.zeros((session.n_rows, session.path.blocks.shape[1]), np.int32)
            self._entered = np.zeros_like(self._seen)
            self._step = 0
            _mark(session.path.blocks[:0], session.path.n_listed[:0], 1, 1, self._seen[:0], self._entered[:0])  # compile or load it now
            session.observers.on_attended = self._attended
            session.observers.on_progress = self.read

    # ---- called by the model's thread

    def begin(self) -> None:
        """A request begins."""
        self._state, self._progress, self._n_answer = "reading", (0, 0), 0
        if self._llm.sparse is not None:
            self._times = self._llm.session.reset_stats()
            self._step = 0
            self._seen[:] = self._entered[:] = -(1 << 30)
        self.version += 1

    def end(self) -> None:
        """It is over."""
        if self._llm.sparse is not None:
            self._llm.session.take_in()
        self._state = "idle"
        self.version += 1

    def read(self, n_done: int, n_tokens: int) -> None:
        """Tokens of a prompt are done."""
        self._progress = min(n_done, n_tokens), n_tokens
        self.version += 1

    def evaluated(self, n_tokens: int) -> None:
        """A prompt or one token was evaluated."""
        now = time.perf_counter()
        if n_tokens > 1 or self._state != "answering":
            self._state, self._first, self._n_answer = "answering", now, 0
        else:
            self._n_answer += 1
        self._last = now
        self.version += 1

    def _attended(self, position: int) -> None:
        session = self._llm.session
        self._step += 1
        _mark(session.result.blocks, session.result.n_attended, self._step, session.config.steps_held, self._seen, self._entered)

    # ---- called by anybody

    def snapshot(self) -> dict[str, Any]:
        """What ``GET /v1/kv`` returns; see docs/server.md."""
        llm, times, config = self._llm, self._times, self._llm.sparse
        n_tokens = llm.n_tokens
        n_blocks = -(-n_tokens // BLOCK_TOKENS)
        n_answer, seconds = self._n_answer, self._last - self._first
        n_steps = times.n_steps
        drafts = config is not None and config.exact  # an answer reads all and recovers all: what is counted are drafts
        return {
            **self._facts,
            "state": self._state,
            "progress": dict(zip(("n_done", "n_tokens"), self._progress)),
            "n_tokens": n_tokens,
            "n_blocks": n_blocks,
            "budget": None if config is None else config.budget_blocks(n_tokens) * BLOCK_TOKENS,
            "n_answer": n_answer,
            "tok_s": n_answer / seconds if n_answer and seconds > 0 else None,
            "compression": times.blocks_dense / times.blocks_read if times.blocks_read and not drafts else None,
            "recovery": times.share_sum / n_steps if n_steps and not drafts else None,
            "step_ms": _parts(times) if n_steps else None,
            "maps": None if config is None else self._maps(n_blocks, config.steps_held),
        }

    def text(self, block: int) -> str:
        """The text of a block in use. The model must not be closed meanwhile."""
        tokens = self._llm.input_ids[block * BLOCK_TOKENS : min((block + 1) * BLOCK_TOKENS, self._llm.n_tokens)].tolist()
        return self._llm.detokenize(tokens, special=True).decode("utf-8", errors="replace")

    def _maps(self, n_blocks: int, hold: int) -> dict[str, str]:
        step = self._step
        attended = (self._seen[:, :n_blocks] == step) & (step > 0)
        fetched = attended & (self._entered[:, :n_blocks] > max(1, step - hold))
        attention = self._by_layer(self._history.averages[:, DECAY, :n_blocks])
        attention = 1 + np.log10(np.maximum(attention, 10.0**-DECADES)) / DECADES
        return {
            "resident": _bytes(self._by_layer(attended)),
            "fetched": _bytes(self._by_layer(fetched)),
            "attention": _bytes(attention),
        }

    def _by_layer(self, rows: npt.NDArray) -> npt.NDArray:
        """Mean over the KV heads: shape (n_layer, n_blocks)."""
        return rows.reshape(self._facts["n_layer"], self._facts["n_head_kv"], rows.shape[1]).mean(1)


def _bytes(shares: npt.NDArray) -> str:
    return base64.b64encode(np.rint(255 * shares.clip(0, 1)).astype(np.uint8).tobytes()).decode()


def _parts(times: StepTimes) -> dict[str, float]:
    """Milliseconds per sparse step."""
    names = ("total", "predict", "select", "observe", "gather", "calibrate", "wait")
    parts = {name: times.ms(getattr(times, name)) for name in names}
    parts["attention"], parts["choose"] = times.ms(times.attention_us / 1e6), times.ms(times.choose_us / 1e6)
    return {name: round(value, 3) for name, value in parts.items()}
