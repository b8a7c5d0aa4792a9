"""A conversation about documents, on any ``kvcast.Llama``: the document is read once, answers stream and can be stopped."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .cache import DocumentCache
from .errors import GenerationError, ModelError, SessionError
from .llama import Llama
from .session import StepTimes

MARK = "\x02question\x02"


def around_question(llm: Llama, messages: list[dict[str, str]]) -> tuple[str, str] | None:
    """What the model's chat template writes before and after ``MARK`` in the messages; None without a template."""
    if llm.chat_template is None:
        return None
    text = llm.chat_template(messages=messages).prompt
    before, _, after = text.partition(MARK)
    return before, after


def tokens_before_mark(llm: Llama, messages: list[dict[str, str]]) -> list[int]:
    """The prompt's tokens up to ``MARK`` in the messages; none without a template."""
    texts = around_question(llm, messages)
    return [] if texts is None else llm.tokenize(texts[0].encode(), add_bos=False, special=True)


def open_or_read(llm: Llama, tokens: list[int], cache: DocumentCache | None, title: str) -> bool:
    """Put the model into the state after ``tokens``: from the cache, or by evaluating them, which the cache then keeps.

    Returns
    -------
    bool
        It was in the cache.

    Raises
    ------
    GenerationError
        It was stopped, or does not fit.
    KvcastError
        It was read, but cannot be kept.
    """
    if cache is not None and cache.load(llm, tokens):
        return True
    llm.reset()
    llm.eval(tokens)
    if cache is not None:
        cache.save(llm, tokens, title)
    return False


@dataclass(frozen=True, slots=True)
class Figures:
    """What one answer took; seconds and tokens. Times of sparse steps are None when the model runs dense."""

    n_tokens: int
    first_token_s: float
    tok_s: float
    n_context: int
    stopped: bool
    times: StepTimes | None

    def line(self) -> str:
        """One line for people."""
        parts = [
            f"{self.tok_s:.1f} tok/s",
            f"{self.n_tokens} tokens",
            f"first after {self.first_token_s:.1f} s",
            f"context {self.n_context:,}",
        ]
        if self.times is not None and self.times.n_steps:
            t = self.times
            parts.append(f"KV read {t.blocks_dense / t.blocks_read:.1f}x less than dense")
            parts.append(f"estimated recovery {t.share_sum / t.n_steps:.2f}")
        return " · ".join(parts) + (" · stopped" if self.stopped else "")


class Conversation:
    """Messages and the model that answers them.

    Parameters
    ----------
    llm : Llama
    document : str
        Put before everything else, in the system message; "" for none.
    """

    def __init__(self, llm: Llama, document: str = ""):
        self.llm = llm
        self.messages: list[dict[str, str]] = []
        self.figures: Figures | None = None
        self.stopped = False
        if document:
            self.messages.append({"role": "system", "content": f"Answer from this document.\n\n{document}"})
            n_tokens = len(llm.tokenize(document.encode(), add_bos=False))
            if n_tokens + 256 > llm.n_ctx():
                raise ModelError(
                    f"the document has {n_tokens} tokens and the context holds {llm.n_ctx()}; use a larger --context or a shorter document"
                )

    def read(self, cache: DocumentCache | None = None, title: str = "") -> bool:
        """Process the document now, before any question is known: ``open_or_read``, with its result and its errors."""
        self.stopped = False
        tokens = tokens_before_mark(self.llm, [*self.messages, {"role": "user", "content": MARK}])
        if not self.messages or not tokens:
            return False
        return open_or_read(self.llm, tokens, cache, title)

    def save(self, path: Path) -> None:
        """Keep the conversation in a file, with the model's session; see ``Llama.save_session``."""
        messages = self.messages
        if messages and messages[-1]["role"] == "user":  # its answer was cut off
            messages = messages[:-1]
        self.llm.save_session(path, {"messages": messages})

    def resume(self, path: Path) -> None:
        """Go on with the conversation in a file; see ``Llama.load_session``.

        Raises
        ------
        SessionError
            Also when the file holds no conversation, or one about another document.
        """
        messages = self.llm.load_session(path).get("messages")
        if not isinstance(messages, list):
            raise SessionError(f"{str(path)!r} holds no conversation; choose another file")
        if self.messages and self.messages[:1] != messages[:1]:
            raise SessionError(f"{str(path)!r} holds a conversation without this document; choose another file for a new one")
        self.messages = messages

    def ask(self, question: str, **kwargs: Any) -> Iterator[str]:
        """Answer a question, piece by piece. Ctrl-C, or ``stop``, ends the answer; what was said stays in the conversation.

        ``kwargs`` go to ``create_chat_completion``. ``figures`` holds the answer's figures afterwards. An answer ends where the
        context does.

        Raises
        ------
        GenerationError
            The conversation fills the context; the question is not part of it.
        """
        llm = self.llm
        self.messages.append({"role": "user", "content": question})
        self.stopped = False
        sparse = llm.sparse is not None
        if sparse:
            llm.session.configure(llm.session.config)
        said: list[str] = []
        n_tokens, first = 0, None
        begin = time.perf_counter()
        try:
            for chunk in llm.create_chat_completion(self.messages, stream=True, **kwargs):  # type: ignore[arg-type]
                piece: Any = chunk["choices"][0]["delta"].get("content")  # type: ignore[index,union-attr]
                if piece:
                    first = first or time.perf_counter()
                    n_tokens += 1
                    said.append(piece)
                    yield piece
                if self.stopped:
                    break
        except GenerationError:
            if not self.stopped:
                self.messages.pop()
                raise
        except BaseException as error:
            self.messages.pop()
            if isinstance(error, ValueError) and "context window" in str(error):
                raise GenerationError(
                    f"the context of {llm.n_ctx()} tokens is full; start over, or go on with a larger one (--session, --context)"
                ) from error
            raise
        end = time.perf_counter()
        first = first or end
        self.messages.append({"role": "assistant", "content": "".join(said)})
        self.figures = Figures(
            n_tokens=n_tokens,
            first_token_s=first - begin,
            tok_s=(n_tokens - 1) / (end - first) if n_tokens > 1 else 0.0,
            n_context=llm.n_tokens,
            stopped=self.stopped,
            times=llm.session.times if sparse else None,
        )

    def stop(self) -> None:
        """End the running answer; safe in a signal handler."""
        self.stopped = True
        self.llm.interrupt()


class stop_on_interrupt:
    """Context manager: Ctrl-C calls ``stop`` once; a second one raises KeyboardInterrupt."""

    def __init__(self, stop: Callable[[], None]):
        self._stop = stop
        self._asked = False

    def __enter__(self) -> None:
        self._before = signal.signal(signal.SIGINT, self._handle)

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _handle(self, number: int, frame: object) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        self._stop()
