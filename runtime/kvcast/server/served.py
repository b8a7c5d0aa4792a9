"""The model behind the server: one request at a time uses it, can be stopped at any moment, and opens long documents from disk."""

from __future__ import annotations

import base64
import contextlib
import functools
import logging
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import llama_cpp
import numpy as np

from ..chat.conversation import MARK, open_or_read, tokens_before_mark
from ..chat.documents import MIN_TOKENS, DocumentCache
from ..errors import ContextFull, GenerationError, KvcastError
from ..gguf.reader import GgufFile
from ..llama.model import Llama
from .completions import echoed, in_one_piece, with_offsets
from .monitor import SessionMonitor

log = logging.getLogger("kvcast.server")


@dataclass(eq=False)
class Turn:
    """A request's use of the model; ``messages`` are those of a chat. ``n_``: tokens, those of the prompt that were computed for it, and
    those of the answer."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    stopped: bool = False
    n_prompt: int = 0
    n_computed: int = 0
    n_answer: int = 0

    def accept(self) -> None:
        """The request is one that can be answered."""

    def usage(self) -> dict[str, Any]:
        """The tokens, as OpenAI's API says them."""
        n_cached = max(0, self.n_prompt - self.n_computed)
        return {
            "prompt_tokens": self.n_prompt,
            "completion_tokens": self.n_answer,
            "total_tokens": self.n_prompt + self.n_answer,
            "prompt_tokens_details": {"cached_tokens": n_cached},
        }


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
        self._first: tuple[list[dict[str, Any]], list[int]] | None = None  # messages of the last document, and its tokens
        self.name = name
        super().__init__(*args, **kwargs)
        self.live = SessionMonitor(self)

    @contextlib.contextmanager
    def turn(self, turn: Turn) -> Iterator[None]:
        """Use the model, from one thread at a time."""
        self._turn = turn
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

    def create_chat_completion(self, messages: list[Any], *args: Any, **kwargs: Any) -> Any:
        """As in ``Llama``; what cannot fit into the context is refused before much is done with it.

        Raises
        ------
        ContextFull
            It is far too long.
        """
        texts = [message.get("content") for message in messages]
        self._check_length(max(len(messages), self._n_least(text for text in texts if isinstance(text, str))))
        return super().create_chat_completion(messages, *args, **kwargs)

    def _n_least(self, texts: Iterable[str]) -> int:
        """As many tokens as the texts have at least."""
        n = sum(map(len, texts))
        return n // self._n_longest if n > 16 * self.n_ctx() else 0

    @functools.cached_property
    def _n_longest(self) -> int:
        """Bytes of the longest token, or more."""
        with GgufFile(self.model_path) as gguf:
            return max((len(token) for token in gguf.strings("tokenizer.ggml.tokens")), default=1 << 30)

    def _check_length(self, n_least: int) -> None:
        if n_least >= self.n_ctx():
            raise ContextFull(
                f"the request has {n_least:,} tokens or more and the context holds {self.n_ctx():,}; "
                "shorten it, or start the server with a larger --context"
            )

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
            self.check_grammar(grammar)
        text, tokens = (prompt, prompt) if isinstance(prompt, str) else ("", prompt)
        if text and kwargs.get("suffix") is None:
            self._check_length(self._n_least([text]))
            tokens = self.tokenize(text.encode("utf-8"), special=True)
        if isinstance(tokens, list):
            self._check_tokens(tokens, "prompt")
            if len(tokens) >= self.n_ctx():
                raise ValueError(f"Requested tokens ({len(tokens)}) exceed context window of {self.n_ctx()}")  # as llama-cpp-python says
        elif kwargs.get("echo"):
            raise ValueError("echo does not go with a suffix; leave one out")
        logprobs, echo, stream = kwargs.get("logprobs"), kwargs.pop("echo", False), kwargs.get("stream", False)
        if logprobs is not None and not self._logits_all:
            raise ValueError("logprobs need a model with logits_all true and sparse null; leave them out, or configure one")
        if self._turn is not None:
            self._turn.accept()
            self.live.begin()
            if isinstance(tokens, list) and self._turn.messages:
                self._open_document(tokens, self._turn.messages)
        if logprobs is None and not echo:
            return super().create_completion(tokens, *args, **kwargs)
        if echo:
            text = text or self.detokenize(tokens).decode("utf-8", errors="ignore")
        if echo and logprobs is not None:
            self.reset()  # for the scores of all of it
        chunks = super().create_completion(tokens, *args, **{**kwargs, "stream": True})
        if echo:
            chunks = echoed(self, chunks, tokens, text, logprobs)
        chunks = with_offsets(chunks, 0 if echo else len(text))
        return chunks if stream else {**in_one_piece(chunks), "usage": (self._turn or Turn()).usage()}

    def text_of(self, tokens: list[int]) -> str:
        """The text of tokens.

        Raises
        ------
        ValueError
            The model has no such token: llama.cpp would end the process.
        """
        self._check_tokens(tokens, "tokens")
        return self.detokenize(tokens).decode("utf-8", errors="replace")

    def _check_tokens(self, tokens: list[int], name: str) -> None:
        if wrong := [token for token in tokens if not 0 <= token < self.n_vocab()]:
            raise ValueError(f"{name}: there is no token {wrong[0]}; the model has 0 to {self.n_vocab() - 1}")

    def embeddings(self, texts: list[str], n_dimensions: int | None, as_text: bool) -> dict[str, Any]:
        """The answer to ``POST /v1/embeddings``; ``as_text``: as base64 of float32, where tokens are pooled.

        Raises
        ------
        ValueError
            The model has no embeddings, or of another length; a text is empty or too long.
        """
        if not self.context_params.embeddings:
            raise ValueError("this model has no embeddings; configure one with embedding true and sparse null")
        if n_dimensions not in (None, self.n_embd()):
            raise ValueError(f"dimensions is {n_dimensions}; the model's embeddings have {self.n_embd()}, leave it out")
        data, n_tokens = [], 0
        for i, text in enumerate(texts):
            if self._turn is not None and self._turn.stopped:
                raise GenerationError("the request was stopped")
            self._check_length(self._n_least([text]))
            try:
                vector, n = self.embed(text, truncate=False, return_count=True)
            except ValueError as error:
                raise ValueError(f"input {i}: {error}") from error
            n_tokens += n
            if as_text and np.ndim(vector) == 1:
                vector = base64.b64encode(np.asarray(vector, "<f4").tobytes()).decode()
            data.append({"object": "embedding", "embedding": vector, "index": i})
        usage = {"prompt_tokens": n_tokens, "total_tokens": n_tokens}
        return {"object": "list", "data": data, "model": self.name, "usage": usage}

    def generate(self, tokens: Sequence[int], *args: Any, **kwargs: Any) -> Any:
        """As ``Llama.generate``; the turn's tokens are counted."""
        return self._counted(super().generate(tokens, *args, **kwargs), self._turn or Turn(), len(tokens))

    def _counted(self, generated: Iterator[int], turn: Turn, n_prompt: int) -> Iterator[int]:
        turn.n_prompt = n_prompt
        for token in generated:
            turn.n_answer += not llama_cpp.llama_vocab_is_eog(self._model.vocab, token)
            yield token

    def _open_document(self, prompt: list[int], messages: list[dict[str, Any]]) -> None:
        first, *others = messages
        if self._documents is None or not isinstance(first.get("content"), str):
            return
        # as `kvcast chat` keeps it: with what the template writes before the next message
        marked = [first, {"role": others[0]["role"], "content": MARK}] if others else [{**first, "content": first["content"] + MARK}]
        if self._first is None or self._first[0] != marked:  # most requests go on with the conversation of the one before
            self._first = marked, tokens_before_mark(self, marked)
        tokens = self._first[1]
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
                super().eval(tokens[i : i + self.n_batch])
                self.live.read(i + self.n_batch, len(tokens))
        else:
            super().eval(tokens)
        if self._turn is not None and not self._turn.n_answer:
            self._turn.n_computed += len(tokens)
        self.live.evaluated(len(tokens))

    def _decode(self, tokens: Sequence[int], n_past: int) -> None:
        self._compute(super()._decode, tokens, n_past)

    def _compute(self, run: Callable[..., None], *arguments: Any) -> None:
        with self._guard:
            stopped = self._turn is not None and self._turn.stopped
            self._computing = not stopped
        if stopped:
            raise GenerationError(f"the request was stopped; the store holds the {self.n_tokens} tokens before it")
        try:
            run(*arguments)
        finally:
            with self._guard:
                self._computing = False
