"""What a decode step attends over, and how it comes there: the interface of the host path and the device path."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from ..bindings.context import NativeContext
from ..config import SparseConfig
from ..sparse.history import History
from ..sparse.predictors import Predictor
from .stats import StepTimes
from .worker import Worker


@dataclass(slots=True)
class Policy:
    """What a session and its path go by. The session changes it, between steps.

    Attributes
    ----------
    config : SparseConfig
    predictor : Predictor
    frozen : bool
        Keep the lists and take no scores: the ceiling in benchmarks.
    times : StepTimes
        Sums that the path adds to.
    """

    config: SparseConfig
    predictor: Predictor
    frozen: bool = False
    times: StepTimes = field(default_factory=StepTimes)


@dataclass(slots=True, eq=False)
class StepResult:
    """What a step attended to, and what that teaches.

    Attributes
    ----------
    position : int
        Of its token.
    blocks : int32, shape (n_rows, n_blocks)
        What each row attended to, or of which it attended to some tokens; only the first ``n_attended`` of a row count. The path's own
        array, as all of these: valid until the next step is prepared, but for a result that a step in between has been given.
    n_attended : int32, shape (n_rows,)
    shares : float32, shape (n_rows,)
        Estimated recovery.
    n_read : int
        Blocks that all rows together read; of single tokens, 16 are one.
    at_once : bool
        Its scores lie ready, and cost little to take in.
    """

    position: int
    blocks: np.ndarray
    n_attended: np.ndarray
    shares: np.ndarray
    n_read: int
    at_once: bool
    take: Callable[[StepResult], None]
    taken: bool = False

    def learn(self) -> None:
        """Take its scores into the history, once: whoever asks first. Not from two threads at a time."""
        if not self.taken:
            self.taken = True
            self.take(self)


@dataclass(slots=True)
class Step:
    """A step from when it is prepared until it is finished.

    Attributes
    ----------
    n_tokens, n_used : int
        Tokens in the store before it; blocks in use with its own.
    mode : int
        Of the graph: ``native.SPARSE``, or ``native.HISTORY`` where it runs dense.
    calibrates : bool
        It attends to everything, to renew every score.
    last : StepResult or None
        Of the step before, whose scores are not in the history yet.
    """

    n_tokens: int
    n_used: int
    mode: int
    calibrates: bool
    last: StepResult | None


class AttentionPath(ABC):
    """What the steps of one context attend over.

    The contract. One thread calls, that of the steps; ``Session`` does, in this order: ``prepare``, llama_decode, ``finish``, and again. A
    batch that is no step (a prompt, a draft) is ``before_batch``, llama_decode, ``finish_batch``. Between ``prepare`` and ``finish`` work
    of the path's own may be in flight beside the step, which reads the store before ``n_tokens``, the history and the result of the step
    before, ``Step.last``, and nothing else; so nobody changes those. After ``finish`` nothing of it reads the history; what a path has
    brought ready for the next step is its own. When a call raises, or llama_decode does, the step does not count: ``reset``, then
    ``truncate``, and whatever comes next is as if it had never been tried. A path never calls back.

    Attributes
    ----------
    attached : NativeContext
    n_rows : int
        Served layers times KV heads: rows of the arrays below, which are native memory.
    blocks, n_listed : int32, shapes (n_rows, n_blocks), (n_rows,)
        Host path: the lists of the step, ascending. Device path: the block in each slot of the pool, -1 for none.
    scores, shares : float32, shapes (n_rows, n_blocks), (n_rows,)
        Of the last step, in the order of its lists; of the lists.
    weights, estimates : float32, shape (n_rows, n_blocks), or None
        Of blocks that a step chooses from itself.
    n_topk : int32, shape (n_rows,)
        Of those, how many, in blocks.
    n_chosen : int32, shape (n_rows,)
        Blocks that the last step appended to its lists.
    n_attended : int32, shape (n_rows,)
        Blocks that the step attends to, from where its scores are reported on.
    """

    worker_name: str

    def __init__(self, attached: NativeContext):
        self.attached = attached
        info = attached.info
        self.n_rows = info.n_layer * info.n_head_kv
        self.blocks = attached.blocks.reshape(self.n_rows, info.n_blocks)
        self.n_listed = attached.n_listed.reshape(self.n_rows)
        self.scores = attached.scores.reshape(self.n_rows, info.n_blocks)
        self.weights, self.estimates = (
            None if x is None else x.reshape(self.n_rows, info.n_blocks) for x in (attached.weights, attached.estimates)
        )
        self.n_topk = attached.n_topk.reshape(self.n_rows)
        self.n_chosen = attached.n_chosen.reshape(self.n_rows)
        self.shares = attached.shares.reshape(self.n_rows)
        self.n_attended = np.zeros(self.n_rows, np.int32)
        self.worker = Worker(self.worker_name)

    def start(self, policy: Policy, history: History) -> None:
        """Once, before the first step: compile or load the kernels."""
        self.policy, self.history = policy, history
        self._warm_up()
        self.warm_up_selection()

    @property
    def topk_range(self) -> tuple[int, int]:
        """The blocks that the current lists let steps choose from; (0, 0): none."""
        return 0, 0

    @abstractmethod
    def _warm_up(self) -> None: ...

    @abstractmethod
    def warm_up_selection(self) -> None:
        """Compile or load kernels for the layout of what the policy's predictor yields. Writes no list."""

    @abstractmethod
    def check(self, config: SparseConfig) -> None:
        """ValueError when it cannot go on with these settings."""

    def configured(self, before: SparseConfig) -> None:  # noqa: B027 - a hook
        """The policy has other settings now; the lists were dropped."""

    @abstractmethod
    def prepare(self, n_tokens: int, n_since: int, poor: bool, last: StepResult | None) -> Step:
        """Bring about what a step after ``n_tokens`` attends to, and start what is to run beside it.

        Parameters
        ----------
        n_tokens : int
            In the store.
        n_since : int
            Steps since every score was new, this one included.
        poor : bool
            The last step's estimated recovery was below the minimum: this one attends to everything.
        last : StepResult or None
            Of the step before, if its scores are to be taken in yet; from now on the path does that, by ``finish`` at the latest.

        Raises
        ------
        MemoryError, RuntimeError
        """

    @abstractmethod
    def finish(self, step: Step) -> StepResult:
        """llama_decode has returned: wait for what runs beside, and have the step's rows in the store and its scores.

        Raises
        ------
        RuntimeError
            What ran beside failed, or rows or scores did not come.
        """

    def before_batch(self, n_tokens: int) -> None:  # noqa: B027 - a hook
        """A batch after ``n_tokens`` that is no step begins: its rows come into the store, and nowhere else."""

    def finish_batch(self, last: StepResult | None) -> None:
        """llama_decode has returned from one; raises as ``finish`` does."""
        self._wait()
        if last is not None:
            last.learn()
        self.attached.collect()

    def flush(self, last: StepResult | None) -> None:
        """Have the last step's ``scores``, and the history, up to date now."""
        if last is not None:
            last.learn()

    def forget_query(self) -> None:  # noqa: B027 - a hook
        """The queries of the last step are not to be used again."""

    @abstractmethod
    def drop(self) -> None:
        """Select anew before the next step."""

    @abstractmethod
    def clear(self) -> None:
        """Leave nothing of the current lists, or of what is in a pool, that the next ones might depend on."""

    def settle(self) -> BaseException | None:
        """Wait for what runs beside, whatever becomes of it; returns why it failed."""
        return self.worker.settle()

    def truncate(self, n_tokens: int) -> None:
        """The store ends at ``n_tokens``: drop what is known of the rest. Nothing runs beside."""
        self.drop()
        self.attached.invalidate(n_tokens)

    def reset(self) -> None:
        """Something was ended before its end, anywhere: wait for all that runs, and hold nothing."""
        self.worker.settle(interrupted=True)
        self.settle()
        self.clear()

    def close(self) -> None:
        """End the threads and detach."""
        self.worker.close()
        self.attached.close()

    def _wait(self) -> None:
        """For what runs beside; RuntimeError if it failed."""
        if not self.worker.busy:
            return
        begin = time.perf_counter()
        if (error := self.settle()) is not None:
            self.drop()
            raise RuntimeError(f"what runs beside the step failed: {type(error).__name__}: {error}") from error
        self.policy.times.wait += time.perf_counter() - begin
