"""The model behind the server: one request at a time uses it, can be stopped at any moment, and opens long documents from disk."""

from __future__ import annotations

import contextlib
import logging
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..cache import MIN_TOKENS, DocumentCache
from ..chat import MARK, open_or_read, tokens_before_mark
from ..errors import GenerationError, KvcastError
from ..llama import Llama
from .live import Live

import llama_cpp  # isort: skip

log = logging.getLogger("kvcast.server")


@dataclass(eq=False)
class Turn:
    """A request's use of the model; ``messages`` are those of a chat."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    stopped: bool = False


class ServedLlama(Llama):
    """A ``Llama`` whose requests take turns; see ``Llama`` for the parameters.

    Parameters
    ----------
    name : str
        What clients call it.
    documents : DocumentCache or None
        Where long first messages are kept.
    """

    def __init__(self, *args: Any, name: str, documents: DocumentCache | None = None, **kwargs: Any):
        self._turn: Turn | None = None
        self._computing = False
        # an interrupt hits only the batch of the turn that it was meant for; a signal may come while its thread holds this
        self._guard = threading.RLock()
        self._documents = documents
        self.name = name
        super().__init__(*args, **kwargs)
        self.live = Live(self)

    @contextlib.contextmanager
    def turn(self, turn: Turn) -> Iterator[None]:
        """Use the model, from one thread at a time."""
        self._turn = turn
        self.live.begin()
        try:
            yield
        finally:
            self._turn = None
            self.live.end()

    def stop(self, turn: Turn) -> None:
        """End a turn, from any thread: what it runs now is interrupted, and it will run nothing more. Other turns go on."""
        turn.stopped = True
        with self._guard:
            if self._turn is turn and self._computing:
                self.interrupt()

    def create_completion(self, prompt: Any, *args: Any, **kwargs: Any) -> Any:
        """As in llama-cpp-python; a long first message is opened from disk, or read and kept there.

        Raises
        ------
        ValueError
            The grammar, a token of ``logit_bias`` or a number is wrong.
        """
        for name in ("presence_penalty", "frequency_penalty"):
            if kwargs.get(name, 0.0) is None:
                kwargs[name] = 0.0
        bias = kwargs.get("logit_bias") or {}
        if wrong := [token for token in bias if not 0 <= int(token) < self.n_vocab()]:
            raise ValueError(f"logit_bias names the token {wrong[0]}; the model has 0 to {self.n_vocab() - 1}")
        if wrong := [value for value in bias.values() if not abs(value) <= 100]:
            raise ValueError(f"logit_bias has the value {wrong[0]}; values lie between -100 and 100")
        for name in ("temperature", "min_p", "repeat_penalty"):
            if not math.isfinite(kwargs.get(name, 1.0)):
                raise ValueError(f"{name} is {kwargs[name]}; it must be a finite number")
        if kwargs.get("repeat_penalty", 1.0) <= 0:
            raise ValueError(f"repeat_penalty is {kwargs['repeat_penalty']}; it must be more than 0, and 1 is none")
        if (grammar := kwargs.get("grammar")) is not None:
            if kwargs.get("logits_processor"):  # no token is left where the grammar ends: llama.cpp would end the process
                raise ValueError("min_tokens does not go with a grammar, a response_format or a tool that is called; leave it out")
            self._check_grammar(grammar)
        if isinstance(prompt, list) and self._turn is not None and self._turn.messages and len(prompt) < self.n_ctx():
            self._open_document(prompt, self._turn.messages)
        return super().create_completion(prompt, *args, **kwargs)

    def _check_grammar(self, grammar: llama_cpp.LlamaGrammar) -> None:
        """llama-cpp-python 0.3.36 does not look whether llama.cpp took it, and crashes at the first token."""
        sampler = llama_cpp.llama_sampler_init_grammar(self._model.vocab, grammar._grammar.encode(), grammar._root.encode())
        if not sampler:
            raise ValueError("the grammar cannot be parsed; correct it (GBNF, with a rule root)")
        llama_cpp.llama_sampler_free(sampler)

    def _open_document(self, prompt: list[int], messages: list[dict[str, Any]]) -> None:
        first, *others = messages
        if self._documents is None or not isinstance(first.get("content"), str):
            return
        # as `kvcast chat` keeps it: with what the template writes before the next message
        marked = [first, {"role": others[0]["role"], "content": MARK}] if others else [{**first, "content": first["content"] + MARK}]
        tokens = tokens_before_mark(self, marked)
        known = self.longest_token_prefix(self.input_ids[: self.n_tokens].tolist(), tokens)
        # the last token may differ where a question begins with white space
        if len(tokens) - known < MIN_TOKENS or prompt[: len(tokens) - 1] != tokens[:-1]:
            return
        title = " ".join(first["content"].removeprefix("Answer from this document.").split()[:8])
        try:
            open_or_read(self, tokens, self._documents, title)
        except GenerationError:
            raise
        except KvcastError as error:  # it was read all the same
            log.warning("%s", error)

    def eval(self, tokens: Sequence[int]) -> None:
        """As ``Llama.eval``; a dense model looks between batches whether it is to stop."""
        if self.sparse is None:
            for i in range(0, len(tokens), self.n_batch):
                self._compute(super().eval, tokens[i : i + self.n_batch])
                self.live.read(i + self.n_batch, len(tokens))
        else:
            super().eval(tokens)
        self.live.evaluated(len(tokens))

    def _decode(self, tokens: Sequence[int]) -> None:
        self._compute(super()._decode, tokens)

    def _compute(self, run: Callable[[Sequence[int]], None], tokens: Sequence[int]) -> None:
        with self._guard:
            stopped = self._turn is not None and self._turn.stopped
            self._computing = not stopped
        if stopped:
            raise GenerationError(f"the request was stopped; the store holds the {self.n_tokens} tokens before it")
        try:
            run(tokens)
        finally:
            with self._guard:
                self._computing = False
