"""Where a session can go back to, when tokens of it are taken back.

What a step attends to depends on all that was attended to before it. When an answer is made again, or another prompt shares a
beginning with the one in the store, what the tokens that go have taught must go with them, and the tokens that stay must be those
that the new prompt alone would have left: else the same tokens have another answer, by what was generated in between. So the state
is kept where prompts begin and end, and what lies between is read again, in the batches in which it was read first.

What is gone back to, when the store is cut: the last batch of the prompt that began somewhere before, where it is that prompt once more;
else the last whole batch of what was read from a *held* place - the beginning, and what was evaluated by itself, a document say - as if
the new prompt were the first that was read from there; else, where that is further than ``FURTHEST`` batches, as in a long conversation,
the end of the prompt before.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..gguf.memory import HISTORY_TOKENS

FURTHEST = 2  # batches that are read again at most, to have what a prompt alone would have left
N_KEPT, N_HELD = 4, 2  # checkpoints after the beginning: of prompts of answers, two with their ends, and of what is held
N_NUMBERS = 9  # of a checkpoint in a file
N_RETAKEN = 64  # last tokens of a store of which nothing else is known, run once more for their scores


@dataclass(frozen=True, slots=True)
class State:
    """What the store alone does not give again.

    Attributes
    ----------
    history : dict of arrays
        As ``History.kept`` gives them.
    n_observed : int
    summary : uint8, shape (n_bytes,), or None
        ``NativeContext.summary_state``; None where no channels were chosen yet.
    n_summarised : int
        Tokens in the store when they were chosen.
    poor : bool
        The last step's estimated recovery was below the minimum.
    """

    history: dict[str, npt.NDArray[np.float32]]
    n_observed: int
    summary: npt.NDArray[np.uint8] | None
    n_summarised: int
    poor: bool


@dataclass(slots=True, eq=False)
class Checkpoint:
    """A place in the store.

    Attributes
    ----------
    n_tokens : int
        In the store there.
    state : State or None
        None: nothing was known of attention.
    n_whole : int
        Tokens from here on that were read in whole batches. Every longer text that is read from here has the same ones.
    last_batch, end : int
        Where the batch begins that ended the prompt that began here, and where it ended; -1 without one.
    held : bool
        It was not the prompt of an answer that began or ended here.
    """

    n_tokens: int
    state: State | None = None
    held: bool = True
    n_whole: int = 0
    last_batch: int = -1
    end: int = -1


class Checkpoints:
    """The checkpoints of a store, from its beginning.

    Parameters
    ----------
    n_batch : int
        Tokens of a whole batch.
    """

    def __init__(self, n_batch: int):
        self._n_batch = n_batch
        self._points = [Checkpoint(0)]
        self._n_given = 0  # tokens from the beginning that came from elsewhere, in batches that nobody knows
        self._origin: tuple[Checkpoint, int] | None = None  # what was gone back to, and where reading goes on from there
        self._begun: Checkpoint | None = None  # where the prompt began that has not ended

    def adopt(self, n_tokens: int) -> None:
        """The store now holds ``n_tokens`` of which nothing is known."""
        self._points = [Checkpoint(0)]
        self._n_given, self._origin, self._begun = n_tokens, None, None

    def cut(self, n_tokens: int) -> None:
        """The store ends at ``n_tokens``."""
        self._points = [p for p in self._points if p.n_tokens <= n_tokens]
        last = self._points[-1]
        last.n_whole = min(last.n_whole, (n_tokens - last.n_tokens) // self._n_batch * self._n_batch)
        if n_tokens < last.last_batch:
            last.last_batch = last.end = -1
        self._n_given = min(self._n_given, n_tokens)
        if self._origin is not None and self._origin[1] != n_tokens:
            self._origin = None
        if self._begun is not None and self._begun.n_tokens > n_tokens:
            self._begun = None

    def back(self, n_tokens: int, n_total: int) -> tuple[Checkpoint, int]:
        """Where to go when the store is cut at ``n_tokens``, to be read on to ``n_total``: the checkpoint whose state to take, and the
        tokens that stay."""
        if n_tokens <= self._n_given:
            n_stay = max(0, n_tokens - N_RETAKEN)
            self.cut(n_stay)
            return Checkpoint(n_stay), n_stay
        point, n_stay = self._origin_of(n_tokens, n_total)
        self.cut(n_stay)
        self._origin = point, n_stay
        return point, n_stay

    def _origin_of(self, n_tokens: int, n_total: int) -> tuple[Checkpoint, int]:
        if self._begun is not None:  # a prompt that was not read to its end
            return self._begun, self._whole(self._begun, n_tokens, n_total)
        before = [p for p in reversed(self._points) if p.n_tokens <= n_tokens]
        for point in before:
            if point.end == n_total and point.last_batch <= n_tokens:
                return point, point.last_batch
        for point in before:
            n_stay = self._whole(point, n_tokens, n_total)
            if point.held and n_tokens - n_stay <= FURTHEST * self._n_batch:
                return point, n_stay
        return before[0], self._whole(before[0], n_tokens, n_total)

    def _whole(self, point: Checkpoint, n_tokens: int, n_total: int) -> int:
        """Where the whole batches end that the tokens before a cut and a text of ``n_total`` have in common, read from a checkpoint."""
        past = min(n_tokens, n_total - HISTORY_TOKENS) - point.n_tokens
        return point.n_tokens + min(max(0, past) // self._n_batch * self._n_batch, point.n_whole)

    def ends_a_prompt(self, n_tokens: int) -> bool:
        """Whether the store ends where the prompt of an answer did, and nothing of the answer is in it."""
        return self._points[-1].n_tokens == n_tokens and not self._points[-1].held

    def begin(self, n_tokens: int, held: bool, state: Callable[[], State | None]) -> Checkpoint:
        """A prompt begins where the store ends now; returns its checkpoint, which goes on from what was gone back to."""
        if self._origin is not None and self._origin[1] == n_tokens:
            self._begun = point = self._origin[0]
            point.last_batch = point.end = -1
            return point
        self.cut(n_tokens)
        if self._points[-1].n_tokens < n_tokens:
            self._add(Checkpoint(n_tokens, state(), held))
        self._begun = point = self._points[-1]
        point.n_whole, point.last_batch, point.end = 0, -1, -1
        return point

    def ended(self, point: Checkpoint, last_batch: int, n_tokens: int, held: bool, state: State | None) -> None:
        """The prompt that began at a checkpoint is done."""
        point.last_batch, point.end = last_batch, n_tokens
        self._origin = self._begun = None
        self._add(Checkpoint(n_tokens, state, held))

    def _add(self, point: Checkpoint) -> None:
        self._points.append(point)
        for held, n_most in ((True, N_HELD), (False, N_KEPT)):
            alike = [p for p in self._points[1:] if p.held == held]
            for old in alike[:-n_most]:
                self._points.remove(old)

    # ---- for a file

    def kept(self) -> tuple[list[list[int]], dict[str, npt.NDArray]]:
        """Numbers and arrays that ``take`` takes."""
        rows: list[list[int]] = [[self._n_given]]
        arrays: dict[str, npt.NDArray] = {}
        for i, p in enumerate(self._points):
            s = p.state
            about = [0, 0, 0, 0] if s is None else [1, s.n_observed, s.n_summarised, int(s.poor)]
            rows.append([p.n_tokens, int(p.held), p.n_whole, p.last_batch, p.end, *about])
            if s is not None:
                arrays.update({f"checkpoint{i}_{name}": x for name, x in s.history.items()})
                if s.summary is not None:
                    arrays[f"checkpoint{i}_summary"] = s.summary
        return rows, arrays

    def take(self, rows: Any, arrays: Mapping[str, npt.NDArray], n_tokens: int, fits: Callable[[State, int], bool]) -> None:
        """Go on with what was ``kept`` beside a store of ``n_tokens``; ``fits(state, n_tokens)`` says whether a state can be one of this
        session.

        Raises
        ------
        ValueError
            It is not as ``kept`` left it; the store counts as one of which nothing is known.
        """
        self.adopt(n_tokens)
        self._points, self._n_given = _read(rows, arrays, n_tokens, fits)


def check(rows: Any, arrays: Mapping[str, npt.NDArray], n_tokens: int, fits: Callable[[State, int], bool]) -> None:
    """Whether ``Checkpoints.take`` can take this, of anybody's.

    Raises
    ------
    ValueError
        It cannot.
    """
    _read(rows, arrays, n_tokens, fits)


def _read(rows: Any, arrays: Mapping[str, npt.NDArray], n_tokens: int, fits: Callable[[State, int], bool]) -> tuple[list[Checkpoint], int]:
    if not isinstance(rows, list) or not 2 <= len(rows) <= 2 + N_KEPT + N_HELD or not all(isinstance(row, list) for row in rows):
        raise ValueError("its places to go back to are none")
    given, *places = rows
    if len(given) != 1 or type(given[0]) is not int or not 0 <= given[0] <= n_tokens or any(len(place) != N_NUMBERS for place in places):
        raise ValueError("its places to go back to are none")
    points = [_taken(i, place, arrays, n_tokens, fits) for i, place in enumerate(places)]
    ascending = all(a.n_tokens < b.n_tokens for a, b in itertools.pairwise(points))
    if points[0].n_tokens or points[0].state or not ascending:
        raise ValueError("its places to go back to are in no order")
    known = {f"checkpoint{i}_{name}" for i, p in enumerate(points) if p.state for name in (*p.state.history, "summary")}
    if further := [name for name in arrays if name.startswith("checkpoint") and name not in known]:
        raise ValueError(f"{further[0][:40]} is of no place to go back to")
    return points, given[0]


def _taken(i: int, place: Any, arrays: Mapping[str, npt.NDArray], n_tokens: int, fits: Callable[[State, int], bool]) -> Checkpoint:
    """Checkpoint number i of a file; ValueError when it can be none."""
    if not all(type(x) is int for x in place):
        raise ValueError("no place in the store")
    n, held, n_whole, last_batch, end, known, n_observed, n_summarised, poor = place
    ended = n <= last_batch <= min(end, n_tokens) or last_batch == end == -1  # its end may have been taken back
    if not ended or not 0 <= n <= n + n_whole <= n_tokens or n_whole < 0:
        raise ValueError("no place in the store")
    if not known:
        return Checkpoint(n, None, bool(held), n_whole, last_batch, end)
    prefix = f"checkpoint{i}_"
    mine = {name.removeprefix(prefix): x for name, x in arrays.items() if name.startswith(prefix)}
    state = State(mine, n_observed, mine.pop("summary", None), n_summarised, bool(poor))
    if not fits(state, n):
        raise ValueError("no state of this session")
    return Checkpoint(n, state, bool(held), n_whole, last_batch, end)
