"""A conversation about documents, on any ``kvcast.Llama``: the document is read once, answers stream and can be stopped."""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as llama_cpp

from ..engine.stats import StepTimes
from ..errors import GenerationError, ModelError, SessionError
from ..llama.model import Llama
from .documents import DocumentCache

MARK = "\x02question\x02"
HANDLED_S = 0.1  # by which a signal was handled, or is missed
ROLES = ("system", "user", "assistant")
SMALL_BYTES = 1 << 28  # of a state; what is larger takes seconds to write


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


def _messages_of(about: dict[str, Any], path: Path) -> list[dict[str, str]]:
    """The conversation that a session file holds; whoever wrote it, each message is a role that there is and a text that can be one."""
    messages = about.get("messages")
    if not isinstance(messages, list):
        raise SessionError(f"{str(path)!r} holds no conversation; choose another file")
    for message in messages:
        good = isinstance(message, dict) and message.keys() == {"role", "content"} and message["role"] in ROLES
        good = good and isinstance(message["content"], str) and not _SURROGATE.search(message["content"])
        if not good:
            raise SessionError(f"{str(path)!r} holds a conversation that cannot be gone on with: a message is none; choose another file")
    return messages


_SURROGATE = re.compile("[\ud800-\udfff]")  # half of a character, which no tokenizer takes


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
    """What one answer took; seconds and tokens. Times of sparse steps are None when the model runs dense; ``exact``: they were drafts."""

    n_tokens: int
    first_token_s: float
    tok_s: float
    n_context: int
    stopped: bool
    times: StepTimes | None
    exact: bool = False

    def line(self) -> str:
        """One line for people."""
        parts = [
            f"{self.tok_s:.1f} tok/s",
            f"{self.n_tokens} tokens",
            f"first after {self.first_token_s:.1f} s",
            f"context {self.n_context:,}",
        ]
        t = self.times
        if t is not None and self.exact:
            parts.append(f"{t.n_accepted} of {t.n_drafted} drafted tokens accepted")
        elif t is not None and t.n_steps:
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
        self.unsaved = False  # something was read or said since it was saved
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
        self.unsaved = True
        return open_or_read(self.llm, tokens, cache, title)

    def save(self, path: Path) -> None:
        """Keep the conversation in a file, with the model's session; see ``Llama.save_session``."""
        messages = self.messages
        if messages and messages[-1]["role"] == "user":  # its answer was cut off
            messages = messages[:-1]
        self.llm.save_session(path, {"messages": messages})
        self.unsaved = False

    @property
    def is_small(self) -> bool:
        """Whether ``save`` takes no time that one notices."""
        return llama_cpp.llama_state_get_size(self.llm.ctx) <= SMALL_BYTES

    def resume(self, path: Path) -> None:
        """Go on with the conversation in a file; see ``Llama.load_session``.

        Raises
        ------
        SessionError
            Also when the file holds no conversation, or one about another document. The session in hand goes on.
        """
        messages: list[dict[str, str]] = []

        def check(about: dict[str, Any]) -> None:
            messages[:] = _messages_of(about, path)
            if self.messages and self.messages[:1] != messages[:1]:
                raise SessionError(f"{str(path)!r} holds a conversation without this document; choose another file for a new one")

        self.llm.load_session(path, check)
        self.messages = messages
        self.unsaved = False

    def ask(self, question: str, **kwargs: Any) -> Iterator[str]:
        """Answer a question, piece by piece. ``stop``, or to take no more pieces, ends the answer; what was said stays in the conversation.

        ``kwargs`` go to ``create_chat_completion``. ``figures`` holds the answer's figures afterwards. An answer ends where the
        context does.

        Raises
        ------
        GenerationError
            The conversation fills the context; the question is not part of it.
        """
        llm = self.llm
        self.messages.append({"role": "user", "content": question})
        self.stopped, self.unsaved = False, True
        sparse = llm.sparse is not None
        if sparse:
            llm.session.reset_stats()
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
        except GeneratorExit:  # nobody listens any more
            self.messages.append({"role": "assistant", "content": "".join(said)})
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
            exact=sparse and llm.session.config.exact,
        )

    def stop(self) -> None:
        """End the running answer; safe in a signal handler."""
        self.stopped = True
        self.llm.interrupt()


class Signals:
    """Context manager: what signals do to a conversation.

    Ctrl-C stops what is read or answered; a second one raises KeyboardInterrupt, and so does one while nothing runs. SIGTERM and SIGHUP
    (a shutdown, a closed window or a dropped line) stop it too, and then end the conversation: SystemExit with 128 + the signal's number
    from the next ``check``, from ``waiting``, or when the block ends. Signals that the process was started to ignore stay ignored. While
    something is ``keeping``, nothing is raised.

    Parameters
    ----------
    stop : callable
        Called from a signal handler, and from a thread beside, which llama.cpp does not hold up.
    """

    ENDING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name))

    def __init__(self, stop: Callable[[], None]):
        self._stop = stop
        self._number = 0  # of the signal that ends it
        self._stopped = False
        self._waiting = self._keeping = False

    def __enter__(self) -> Signals:
        self._before: dict[int, Any] = {}
        for number in (signal.SIGINT, *self.ENDING):
            if signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._handle)
        self._told, self._tells = socket.socketpair()
        self._tells.setblocking(False)
        self._wakeup_before = signal.set_wakeup_fd(self._tells.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._listen, name="kvcast-signals", daemon=True).start()
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        signal.set_wakeup_fd(self._wakeup_before)
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._tells.close()  # which ends the thread
        if error is None or isinstance(error, (KeyboardInterrupt, OSError)):  # a terminal that is gone fails at every word
            self.check()

    @property
    def ending(self) -> bool:
        """Whether a signal said that the conversation is to end."""
        return self._number != 0

    def check(self) -> None:
        """Raise SystemExit when a signal said so."""
        if self._number:
            raise SystemExit(128 + self._number)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Nothing runs: a signal raises at once."""
        self._stopped = False
        self._waiting = True
        try:
            self.check()
            yield
        finally:
            self._waiting = False

    @contextlib.contextmanager
    def keeping(self) -> Iterator[None]:
        """Something is written that a signal must not cut off."""
        self._keeping = True
        try:
            yield
        finally:
            self._keeping = False

    def _handle(self, number: int, frame: object) -> None:
        again, self._stopped = self._stopped, True
        if number != signal.SIGINT:
            self._number, again = self._number or number, False  # a terminal that is closed sends two
        if self._keeping:
            return
        if self._waiting or again:
            self._waiting = False
            self.check()
            raise KeyboardInterrupt
        self._stop()

    def _listen(self) -> None:
        """Python calls handlers between two instructions of the main thread, which may be in llama.cpp for long; and when the signal comes
        just before it waits for input, not until there is some, or another signal."""
        with self._told:
            while numbers := self._told.recv(64):
                if not set(numbers) & self._before.keys() or self._keeping:
                    continue
                if not self._waiting:
                    self._stop()
                    continue
                time.sleep(HANDLED_S)
                if self._waiting and hasattr(signal, "pthread_kill"):
                    signal.pthread_kill(threading.main_thread().ident or 0, numbers[-1])
