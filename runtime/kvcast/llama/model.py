"""``kvcast.Llama``: llama-cpp-python's ``Llama`` with sparse attention."""

from __future__ import annotations

import contextlib
import os
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

from ..bindings.log import MutedLog
from ..checks import function_or_address, optional, wrong
from ..config import SparseConfig
from ..engine.observers import AttentionFn, KvFn
from ..engine.session import Session
from ..errors import ContextFull, GenerationError, ModelError
from ..gguf import identity
from ..gguf import memory as sizes
from ..limits import Limits
from . import arguments, session_file
from .callbacks import attention_caller, kv_caller
from .checked import CheckedLlama
from .exact import attention_row
from .failures import of_step
from .handle import ClosedHandle, NativeHandle, in_turn
from .loading import SMALLER, prepared
from .speculative import VERIFY_TOKENS, ShortDraft, SparseDraft


@dataclass(frozen=True, slots=True)
class Context:
    """What a generation needs to go on after others have used the model.

    Attributes
    ----------
    tokens : int32, shape (n_tokens,)
        In the store.
    n_last : int
        Of them, those that were evaluated last, together.
    mark
        Of the evaluation that was the last one.
    of_sampling : dict
        llama-cpp-python's attributes.
    """

    tokens: np.ndarray
    n_last: int
    mark: object
    of_sampling: dict[str, Any]


class Llama(CheckedLlama):
    """A llama-cpp-python ``Llama`` whose decode steps attend to a predicted set of KV blocks.

    Parameters
    ----------
    model_path : str
        A GGUF file.
    sparse : SparseConfig or None
        None is stock behaviour, to the bit. With a config the KV cache is kept in host memory and flash attention is on. With a GPU,
        ``n_batch`` and ``n_ubatch`` are 2048 unless one is given. Sliding-window layers keep the end of the context only, unless
        ``swa_full`` is given.
    limits : Limits or None
        Bounds on texts, grammars, schemas and chat templates; None: the defaults.
    **kwargs
        Those of ``llama_cpp.Llama``. Unless ``n_threads`` is given, all physical cores that this process may use are (for steps over
        a pool on a GPU two); unless ``n_threads_batch`` is, prompts take as many. Unknown ones are an error.

    Raises
    ------
    TypeError
        An unknown keyword argument.
    ValueError
        An argument that contradicts ``sparse``.
    ModelError
        The file is missing or damaged, or its KV cache does not fit into memory.
    SparseUnsupported
        The model cannot run sparse; it can with ``sparse=None``. ``SparseUntested``: nobody has tried, and ``sparse.untested`` is not set.
    """

    def __init__(
        self, model_path: str | os.PathLike[str], *, sparse: SparseConfig | None = None, limits: Limits | None = None, **kwargs: Any
    ):
        self._config = sparse
        self._session: Session | None = None
        self._callback_error: BaseException | None = None
        self._n_cached = -1  # tokens in the KV cache, as far as is certain
        self._n_last = 0  # tokens that were evaluated last, together
        self._mark = object()  # of that evaluation
        self._muted: MutedLog | None = None  # until the next step: llama.cpp calls a stopped one an error, in three lines
        if not isinstance(sparse, SparseConfig | None):
            raise wrong("sparse", sparse, "a SparseConfig, or None")
        path = os.fsdecode(model_path)
        header, kwargs, n_ctx = prepared(path, sparse, kwargs)
        self._stamps = identity.stamps(identity.files_of(path, header.n_split))
        self._lora_stamps = identity.stamps([kwargs["lora_path"]] if kwargs.get("lora_path") else [])
        super().__init__(path, header, limits or Limits(), kwargs)
        try:
            if sparse is not None:
                decode: Any = weakref.WeakMethod(self._decode)  # or a model that nobody refers to would live on
                self._session = Session(
                    self.ctx,
                    lambda tokens, n_past: decode()(tokens, n_past),
                    sparse,
                    self.n_batch,
                    sizes.tap_bytes(header, self.n_ctx()),
                    header.embedded,
                )
                self._session.attached.set_watch(self._watch.address)
                self._bind_to_process()
                if self._session.attached.info.pinned_bytes < 0:
                    warnings.warn("the KV cache could not be pinned (locked in memory); copies to the GPU will be slower", stacklevel=2)
        except MemoryError as error:
            self.close()
            raise ModelError(f"memory ran out beside the KV cache of {n_ctx} tokens; {SMALLER}") from error
        except BaseException:
            self.close()
            raise
        self._n_verify = min(VERIFY_TOKENS, self.n_batch, self._session.attached.info.max_taps if self._session else VERIFY_TOKENS)
        if self.draft_model is not None:
            self.draft_model = ShortDraft(self.draft_model, self._n_verify - 1)
        elif sparse is not None and sparse.exact:
            self.draft_model = SparseDraft(self, self._n_verify - 1)
        if self.draft_model is not None:
            # unless they were asked for, logits stay with llama.cpp: `scores` has rows for n_batch tokens only
            self._logits_all = bool(kwargs.get("logits_all"))

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "sparse": self._config}

    # ---- evaluation

    def eval(self, tokens: Sequence[int]) -> None:
        """Evaluate tokens; single ones sparse once the history knows something of the context, a token with its draft dense.

        Raises
        ------
        ArgumentError
            Something else than tokens of the model.
        GenerationError
            It failed, was interrupted, the model was closed or another thread uses it; ``n_tokens`` says what the store holds.
        """
        tokens = arguments.token_ids("tokens", tokens, self._n_vocab)
        with self._in_turn(refuse=True):
            if self._ctx.memory is None:
                raise GenerationError("this model has no context to evaluate in: it was loaded for its vocabulary, or for embeddings, only")
            self._n_last, self._mark = len(tokens), object()
            if self._session is None:
                for i in range(0, max(1, len(tokens)), self.n_batch):
                    self._eval_dense(tokens[i : i + self.n_batch])
            elif tokens:
                self._eval_sparse(self._session, tokens)

    def _eval_dense(self, tokens: list[int]) -> None:
        self._n_cached = -1  # as llama-cpp-python, which looks at every cell
        try:
            if tokens:
                self._decode(tokens, self.n_tokens)
            else:
                super().eval(tokens)
        except BaseException as error:
            self._requires_eval = True  # the logits are those of what failed
            self._raise_signal()
            if isinstance(error, RuntimeError) and "returned 2" in str(error):
                raise GenerationError(f"the step was stopped; the store holds the {self.n_tokens} tokens before it") from error
            raise

    def _eval_sparse(self, session: Session, tokens: list[int]) -> None:
        if self.n_tokens + len(tokens) > self._n_ctx:
            raise ContextFull(
                f"the context is full: {self.n_tokens} + {len(tokens)} tokens do not fit n_ctx={self._n_ctx}; "
                "start over, shorten the text or load the model with a larger n_ctx"
            )
        n_whole = 1 if self.draft_model is None else self._n_verify
        with self._undone_on_failure(session):
            session.evaluate(tokens, self.n_tokens, self.input_ids, n_whole=n_whole, held=not self._turns.answers)

    @contextlib.contextmanager
    def _undone_on_failure(self, session: Session) -> Iterator[None]:
        """The one place where a step or a prompt that did not come to its end is undone, whatever ended it: this model and its session
        hold what was done with before, and go on from there as if nothing had been."""
        try:
            yield
            self._raise_signal()
        except BaseException as error:
            self._n_cached = -1
            signal, of_callback, said = self._watch.take_raised(), self._callback_error, session.attached.last_error
            self._callback_error = None
            self._clear_abort()
            if session.busy:
                self._requires_eval = True
                self._n_tokens = min(self.n_tokens, session.n_done)
                session.undo(self.n_tokens)
            raised, cause = of_step(error, signal, of_callback, said, self.n_tokens)
            if raised is error:
                raise
            raise raised from cause

    def _decode(self, tokens: Sequence[int], n_past: int) -> None:
        """llama_decode on one batch, after the first ``n_past`` tokens; the session calls it. Of a token and its draft every token's logits
        are kept, by llama.cpp. For a token after the last one nothing past the end is removed, which looks at every cell."""
        drafted = self.draft_model is not None and len(tokens) <= self._n_verify
        if len(tokens) > 1 or self._n_cached != n_past:
            self._ctx.kv_cache_seq_rm(-1, n_past, -1)
        self._n_cached = -1
        self._batch.set_batch(batch=tokens, n_past=n_past, logits_all=self._logits_all or drafted)
        self._ctx.decode(self._batch)
        self._raise_signal()
        n = n_past + len(tokens)
        self.input_ids[n_past:n] = tokens
        if self._logits_all:
            logits = np.ctypeslib.as_array(self._ctx.get_logits(), shape=(len(tokens), self._n_vocab))
            self.scores[n_past:n] = logits
        self._n_cached = self._n_tokens = n
        self._requires_eval = False

    @in_turn
    def draft(self, token: int, n: int) -> list[int]:
        """What sparse steps say comes after the tokens in the store and ``token``: up to ``n`` tokens, each the likeliest, the last of them
        one that ends an answer if there is one. The store is as it was."""
        session, n_tokens = self.session, self.n_tokens
        with self._undone_on_failure(session):
            if n < 1 or not session.goes_on(n_tokens) or not session.history.primed:
                return []
            self._requires_eval = True

            def following() -> int:
                return int(np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self.ctx, -1), shape=(self._n_vocab,)).argmax())

            try:
                return session.draft(token, n, following, lambda t: bool(llama_cpp.llama_vocab_is_eog(self._model.vocab, t)))
            finally:
                self._n_tokens, self._n_cached = n_tokens, -1

    @in_turn
    def dense_eval(self, token: int) -> None:
        """Evaluate one token dense, with a session that is otherwise sparse. For evaluation; ``eval`` goes on sparse."""
        session = self.session
        token = arguments.token_id("token", token, self._n_vocab)
        with self._undone_on_failure(session):
            session.dense_step(token)

    # ---- turns

    def _begin_turn(self) -> None:
        self._clear_abort()

    def _context(self) -> Context:
        names = ("_sampler", "_processors", "_mirostat_mu", "_seed")
        of_sampling = {name: getattr(self, name, None) for name in names}
        return Context(self.input_ids[: self.n_tokens].copy(), self._n_last, self._mark, of_sampling)

    def _go_on(self, context: Context) -> None:
        for name, value in context.of_sampling.items():
            setattr(self, name, value)
        if context.mark is self._mark:
            return
        n = len(context.tokens)
        same = context.tokens[: self.n_tokens] == self.input_ids[: min(n, self.n_tokens)]
        n_same = len(same) if same.all() else int(same.argmin())
        n_last = context.n_last if context.n_last <= self._n_verify else 1
        self.n_tokens = min(n_same, n - n_last)
        self.eval(context.tokens[self.n_tokens : n - n_last].tolist())
        self.eval(context.tokens[n - n_last :].tolist())

    # ---- state

    def _forget(self) -> None:
        self._n_cached, self._mark = -1, object()
        if self._session is not None:
            self._session.forget()

    @in_turn
    def save_session(self, path: str | os.PathLike[str], about: dict[str, Any] | None = None) -> None:
        """Keep the whole session in a file: tokens, store, and what is remembered of attention.

        After ``load_session`` the same tokens yield the same logits, to the bit, as they do here from now on, with the same
        settings on the same machine. For that, saving ends the current set here too: the next step selects anew, and the device
        path fills its pool anew, as after a prompt. Logits themselves are not kept, nor those of earlier tokens
        (``logits_all``): ``generate`` with exactly the saved tokens runs the last one again.

        The file is written beside ``path`` and takes its place when it is whole and on the disk: whatever happens, ``path`` is
        the old session or the new one. It is its owner's alone (0600), or has the permissions of the one that was there; a link is
        followed.

        Parameters
        ----------
        path : str or path
        about : dict or None
            Anything JSON can hold, for ``load_session`` to return.

        Raises
        ------
        SessionError
            It cannot be written; the session goes on, and an older file stays as it was.
        """
        session_file.save(self, Path(path), about or {})

    @in_turn
    def load_session(self, path: str | os.PathLike[str], check: Callable[[dict[str, Any]], None] | None = None) -> dict[str, Any]:
        """Go on with a session that ``save_session`` kept; what this one held is gone.

        The context may be of another size. A session that was saved dense, or with settings that remember less than these, is
        taken in without a history, which the next evaluation makes again from the last 64 tokens.

        Everything in the file is checked before this session is touched: it may be anybody's, and a checksum that fits means nothing.

        Parameters
        ----------
        path : str or path
        check : callable or None
            Called with the ``about`` of ``save_session`` when the file is known to be whole; what it raises refuses the file.

        Returns
        -------
        dict
            The ``about`` of ``save_session``.

        Raises
        ------
        SessionError
            The file is missing, of another version, model or KV settings, or does not fit the context, or (``SessionDamaged``) holds
            what no session of this model does; the session in hand goes on.
        """
        return session_file.load(self, Path(path), check)

    def close(self) -> None:
        """Free everything. Safe to call twice, and at any moment from any thread or callback: what runs is stopped, and freed when it ends;
        later use raises ``GenerationError``."""
        super().close()

    def _free(self) -> None:
        self._clear_abort()
        if self._session is not None:
            self._session.close()
        self._forget_native()
        if hasattr(self, "_stack"):
            super(NativeHandle, self).close()
        if hasattr(self, "_watch"):
            self._watch.close()

    def _leave_to_parent(self) -> None:
        for part in (self._batch, self._ctx, self._model, self):
            getattr(part, "_stack" if part is self else "_exit_stack").pop_all()
        self._forget_native()

    def _forget_native(self) -> None:
        self._session = None
        if hasattr(self, "_ctx"):
            closed: Any = ClosedHandle()
            self._ctx = self._model = self._batch = self.tokenizer_ = closed

    # ---- kvcast's own

    @property
    def sparse(self) -> SparseConfig | None:
        """The configuration this model was loaded with."""
        return self._config

    @property
    def session(self) -> Session:
        """The running sparse session: times, history, lists.

        Raises
        ------
        ValueError
            The model was loaded with ``sparse=None``, or closed.
        """
        if self._session is None:
            raise ValueError("this model was closed" if self._freed else "this model runs dense; load it with sparse=SparseConfig()")
        return self._session

    def interrupt(self) -> None:
        """Stop the running step, or the next one of a generation that has begun, from a signal handler or another thread; generation
        ends with ``GenerationError``, between two operations of what the CPU computes."""
        with self._lock:
            if self._freed:
                return
            self._muted = MutedLog()
            self._watch.stop()
            if self._session is not None:
                self._session.attached.abort()

    def _clear_abort(self) -> None:
        with self._lock:
            self._muted = None
            if self._closing:
                return
            self._watch.go_on()
            if self._session is not None:
                self._session.attached.clear_abort()

    def attention_row(self, layer: int) -> np.ndarray:
        """The exact attention of the newest token over every token before it, whatever the step attended to.

        Computed from the step's query and the keys of the store; slow. Load the model with ``SparseConfig(trace=True)``.

        Parameters
        ----------
        layer : int
            Of the model.

        Returns
        -------
        float32, shape (n_head, n_tokens)

        Raises
        ------
        ValueError
            The model keeps no queries, its store is not f16, or nothing was evaluated.
        IndexError
            There is no such layer, or it is a sliding-window layer.
        """
        return attention_row(self.session, layer)

    def on_kv(self, fn: KvFn | int | None) -> None:
        """Call ``fn(layer, block, k, v)`` for every served layer when a block of 16 tokens is complete in the store.

        Layers have the model's numbers; sliding-window layers are not served.

        Parameters
        ----------
        fn : callable, int or None
            k and v: float16, shape (16, n_head_kv, head_dim), when the store is f16, else its raw rows, uint8, shape (16,
            row_bytes); the callee's to keep. An int is the address of a C function (a Numba ``cfunc``) ``int fn(int32
            layer, int32 block, void * k, void * v, int64 k_row_bytes, int64 v_row_bytes)``, which gets the store's own rows
            and returns 0. None removes the callback. Blocks are reported once, those of an edited part again.

        Raises
        ------
        CallbackError
            From the call that evaluates, when ``fn`` raised or returned something else; the tokens are in the store.
        """
        fn = optional(function_or_address)("on_kv's function", fn)
        self.session.observers.on_kv = None if fn is None else kv_caller(self.session.attached, fn, self._calling_back)

    def on_attention(self, fn: AttentionFn | int | None) -> None:
        """Call ``fn(layer, step, block_scores)`` as each layer's attention of a history or sparse step is done.

        Parameters
        ----------
        fn : callable, int or None
            An int is the address of a C function (a Numba ``cfunc``) of the type ``kvcast_attention_callback`` in kvcast.h,
            which gets the scores in list order. Otherwise ``layer`` (the model's) and ``step`` (position of the newest token) are ints;
            ``block_scores`` is float32, shape (n_head_kv, n_blocks), the attention probability of each block, 0 where a
            sparse step did not attend. The array is the callee's to keep. None removes the callback.

        Raises
        ------
        CallbackError
            From the call that generates, when ``fn`` raised; its exception is the ``__cause__``.
        """
        fn = optional(function_or_address)("on_attention's function", fn)
        if fn is None or isinstance(fn, int):
            self.session.attached.set_attention_callback(fn)
            return

        def failed(error: BaseException) -> int:
            self._callback_error = error  # raised again when the step has been undone
            self._muted = MutedLog()
            return 1

        self.session.attached.set_attention_callback(attention_caller(self.session, fn, self._calling_back), failed)
