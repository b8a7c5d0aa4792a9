"""``kvcast.Llama``: llama-cpp-python's ``Llama`` with sparse attention."""

from __future__ import annotations

import functools
import inspect
import os
import threading
import warnings
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from . import grammar as grammars
from . import native, session_file, sizes
from .config import SparseConfig
from .device import DeviceSession
from .errors import CallbackError, ContextFull, GenerationError, InputError, ModelError, SessionError
from .header import Header, read_header
from .json_schema import take_format
from .lifetime import Closed, Lifetime, inside
from .limits import Limits
from .predictors import LOOK_AHEAD
from .session import AttentionFn, KvFn, Session
from .speculative import VERIFY_TOKENS, ShortDraft
from .support import TESTED, refusal
from .template import ChatTemplate
from .tokenizer import Tokenizer

import llama_cpp  # isort: skip  (after .native, which says where the libraries are)
from llama_cpp.llama_chat_format import guess_chat_format_from_gguf_metadata  # isort: skip
from llama_cpp.llama_tokenizer import LlamaTokenizer  # isort: skip

_ARGUMENTS = inspect.signature(llama_cpp.Llama.__init__).parameters
_CHAT = inspect.signature(llama_cpp.Llama.create_chat_completion)
GIB = 1 << 30
TEMPLATE = "tokenizer.chat_template"
STEP_THREADS = 2  # of a step over a pool on a GPU, of which the CPU computes next to nothing; threads that wait spin, and others select
N_RETAKEN = 64  # last tokens of the store, run once more for their scores
SMALLER = "close something, or use a smaller n_ctx (--context)"
GPU_BATCH = 2048  # tokens; a prompt's batch carries the whole store to the GPU once


class Llama(Lifetime, llama_cpp.Llama):
    """A llama-cpp-python ``Llama`` whose decode steps attend to a predicted set of KV blocks.

    Parameters
    ----------
    model_path : str
        A GGUF file.
    sparse : SparseConfig or None
        None is stock behaviour, to the bit. With a config the KV cache is kept in host memory, flash attention is on
        and, unless ``n_threads`` is given, all physical cores are used (for steps over a pool on a GPU two). With a GPU,
        ``n_batch`` and ``n_ubatch`` are 2048 unless one is given. Sliding-window layers keep the end of the context only, unless
        ``swa_full`` is given.
    limits : Limits or None
        Bounds on texts, grammars, schemas and chat templates; None: the defaults.
    **kwargs
        Those of ``llama_cpp.Llama``. Unknown ones are an error.

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
        Lifetime.__init__(self)
        self.limits = limits or Limits()
        self.chat_template: ChatTemplate | None = None  # the file's own
        self._has_templates = False
        self._grammar_checked: tuple[str, str] | None = None
        self._session: Session | None = None
        self._n_cached = -1  # tokens in the KV cache, as far as is certain
        self._hushed = False  # llama.cpp's messages are silenced
        self._evaluator: int | None = None  # the thread that is in eval
        unknown = [name for name in kwargs if name not in _ARGUMENTS or name == "kwargs"]
        if unknown:
            close = _closest(unknown[0])
            raise TypeError(f"Llama has no argument {unknown[0]!r}" + (f"; did you mean {close!r}?" if close else ""))
        if sparse is not None:
            _refuse_contradictions(kwargs)
            n_cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
            on_gpu = llama_cpp.llama_supports_gpu_offload() and kwargs.get("n_gpu_layers", 0)
            kwargs = {"n_threads": STEP_THREADS if sparse.device and on_gpu else n_cores, **kwargs}
            if llama_cpp.llama_supports_gpu_offload() and not {"n_batch", "n_ubatch"} & kwargs.keys():
                kwargs.update(n_batch=GPU_BATCH, n_ubatch=GPU_BATCH)
            kwargs = {"swa_full": False, **kwargs, "offload_kqv": False, "flash_attn": True}
        header = read_header(model_path)
        if sparse is not None and not sparse.untested and header.arch not in TESTED:
            if error := refusal(model_path):
                raise error
        n_ctx = kwargs.get("n_ctx", 512) or header.n_ctx_train
        _check_memory(header, n_ctx, kwargs, sparse is not None and sparse.keeps_summary)
        try:
            super(Lifetime, self).__init__(os.fspath(model_path), **kwargs)
        except UnicodeDecodeError as error:
            raise ModelError(f"a text in {os.fspath(model_path)!r} cannot be read ({error}); fetch the file again") from error
        except ValueError as error:
            if "load model" in str(error) or "create llama_context" in str(error):
                raise ModelError(
                    f"llama.cpp could not load {os.fspath(model_path)!r}: the file is damaged, of an unknown family, or "
                    "memory ran out; verbose=True shows its own words"
                ) from error
            raise
        except MemoryError as error:
            raise ModelError(f"memory ran out while {os.fspath(model_path)!r} was loaded; {SMALLER}") from error
        if type(self.tokenizer_) is LlamaTokenizer:
            self.tokenizer_ = Tokenizer(self, self.limits.text_bytes)
        try:
            self._take_templates(kwargs.get("chat_format") is None and kwargs.get("chat_handler") is None)
        except BaseException:
            self.close()
            raise
        self.header = header
        self._n_swa = llama_cpp.llama_model_n_swa(self.model)
        self._config = sparse
        self._callback_error: BaseException | None = None
        if sparse is not None:
            try:
                kind = DeviceSession if sparse.device else Session
                self._session = kind(self.ctx, sparse, self.n_batch, sizes.tap_bytes(header, self.n_ctx()), header.embedded)
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
            # unless they were asked for, logits stay with llama.cpp: `scores` has rows for n_batch tokens only
            self._logits_all = bool(kwargs.get("logits_all"))

    @property
    def metadata(self) -> dict[str, str]:
        """What the file says, as in llama-cpp-python."""
        if self._has_templates:
            return self._metadata
        # llama-cpp-python makes Jinja templates of these while it loads, without bounds: they are kept back until it is done
        return {key: text for key, text in self._metadata.items() if not key.startswith(TEMPLATE)}

    @metadata.setter
    def metadata(self, found: dict[str, str]) -> None:
        self._metadata = found

    def _take_templates(self, choose: bool) -> None:
        """The chat formats of the file; ``choose``: one of them is the model's, as llama-cpp-python would have it."""
        self._has_templates = True
        bos, eos = (self._model.token_get_text(i) if i != -1 else "" for i in (self.token_bos(), self.token_eos()))
        templates = {key: text for key, text in self.metadata.items() if key.startswith(TEMPLATE)}
        if (n := sum(map(len, templates.values()))) > self.limits.template_length:
            raise ModelError(
                f"the model's chat templates have {n:,} characters, and at most {self.limits.template_length:,} are taken; "
                "use another file, or larger limits"
            )
        for key, text in templates.items():
            made = ChatTemplate(text, eos, bos, [self.token_eos()], self.limits)
            name = key.removeprefix("tokenizer.")
            if key == TEMPLATE:
                name, self.chat_template = "chat_template.default", made
            self._chat_handlers[name] = made.to_chat_handler()
        if choose and self.chat_template is not None:
            self.chat_format = guess_chat_format_from_gguf_metadata(self.metadata) or "chat_template.default"

    # ---- evaluation

    def eval(self, tokens: Sequence[int]) -> None:
        """Evaluate tokens; single ones sparse once the history knows something of the context, a token with its draft dense.

        Raises
        ------
        GenerationError
            It failed, was interrupted, the model was closed or another thread uses it; ``n_tokens`` says what the store holds.
        """
        self._bind_to_process()
        me = threading.get_ident()
        if self._evaluator not in (None, me):
            raise GenerationError("another thread evaluates with this model, which holds one sequence; take turns, or load it twice")
        self._evaluator = me
        in_generation = self._n_inside > 0  # then an interrupt since its last step counts
        try:
            if self._session is None:
                for i in range(0, max(1, len(tokens)), self.n_batch):
                    with self._using():
                        self._evaluate(tokens[i : i + self.n_batch])
            elif len(tokens) > 0:
                with self._using():
                    if not in_generation:
                        self._clear_abort()
                    self._advance(self._session, list(tokens))
        finally:
            self._evaluator = None

    def _advance(self, session: Session, tokens: list[int]) -> None:
        if self.n_tokens + len(tokens) > self._n_ctx:
            raise ContextFull(
                f"the context is full: {self.n_tokens} + {len(tokens)} tokens do not fit n_ctx={self._n_ctx}; "
                "start over, shorten the text or load the model with a larger n_ctx"
            )
        n_before, whole = self.n_tokens, False  # whether what is run is taken whole or not at all
        try:
            if session.n_tokens != self.n_tokens or not session.history.primed:
                session.truncate(self.n_tokens if self.n_tokens <= session.n_tokens else 0)
                if self.n_tokens and not session.history.primed:
                    tokens = self._take_back(N_RETAKEN) + tokens
            if self._window_is_gone():
                tokens = self._take_back(self.n_tokens) + tokens
            whole = session.history.primed and len(tokens) <= (1 if self.draft_model is None else self._n_verify)
            if not whole:
                session.prompt(tokens, self._decode)
            elif len(tokens) > 1:
                session.verify(tokens, self._decode)
            else:
                if session.config.predictor in LOOK_AHEAD:
                    self._look_ahead(tokens[0])
                session.step(tokens[0], self._decode)
        except GenerationError:  # undone by _decode; or a KV callback's, and the tokens stay
            raise
        except BaseException as error:  # before or after the decode itself
            if whole:
                self.n_tokens = min(self.n_tokens, n_before)
            self._after_failure()
            if not isinstance(error, Exception):
                raise
            said = str(error) if isinstance(error, RuntimeError) else f"evaluating failed: {type(error).__name__}: {error}"
            raise GenerationError(f"{said}; the store holds the {self.n_tokens} tokens before it") from error

    def _evaluate(self, tokens: Sequence[int]) -> None:
        """llama-cpp-python's eval of a batch, but for two kinds: of a token and its draft every token's logits are kept, by llama.cpp; and
        for the token after the last nothing past the end is removed, which looks at every cell."""
        next_one = len(tokens) == 1 and self._n_cached == self.n_tokens
        drafted = self.draft_model is not None and len(tokens) <= self._n_verify
        if self._logits_all or not (next_one or drafted):
            return super().eval(tokens)
        if not next_one:
            self._ctx.kv_cache_seq_rm(-1, self.n_tokens, -1)
        self._batch.set_batch(batch=tokens, n_past=self.n_tokens, logits_all=drafted)
        self._ctx.decode(self._batch)
        self.input_ids[self.n_tokens : self.n_tokens + len(tokens)] = tokens
        self.n_tokens += len(tokens)
        self._requires_eval = False

    @functools.wraps(llama_cpp.Llama.generate)
    def generate(self, *args: Any, **kwargs: Any) -> Generator[int, Sequence[int] | None, None]:  # type: ignore[override]
        if self._session is not None:
            self._clear_abort()
        return self._in_turns(super().generate(*args, **kwargs))

    def _create_completion(self, *args: Any, **kwargs: Any) -> Generator[Any, None, None]:
        return self._in_turns(super()._create_completion(*args, **kwargs))  # type: ignore[arg-type]  # a generator

    def create_chat_completion(self, *args: Any, **kwargs: Any) -> Any:
        """As in llama-cpp-python. The schema of a ``response_format``, ``json_object`` or ``json_schema``, is held as json_schema.py says.

        Raises
        ------
        InputError
            The schema cannot be held, or the template cannot write the messages.
        """
        given = _CHAT.bind(self, *args, **kwargs).arguments
        given.pop("self")
        take_format(given, self.limits)
        return super().create_chat_completion(**given)

    def _init_sampler(self, *args: Any, **kwargs: Any) -> Any:
        if (grammar := kwargs.get("grammar")) is not None:
            self._check_grammar(grammar)
        native.kvcast_grammar_error()
        return super()._init_sampler(*args, **kwargs)

    def _check_grammar(self, grammar: llama_cpp.LlamaGrammar) -> None:
        """Refuse a grammar that llama.cpp cannot take, or would never end with."""
        if not isinstance(grammar, llama_cpp.LlamaGrammar):
            raise InputError(f"grammar is a {type(grammar).__name__}; give a LlamaGrammar, as LlamaGrammar.from_string(text) makes it")
        text, root = grammar._grammar, grammar._root
        if (text, root) == self._grammar_checked:
            return
        grammars.check(text, root, self.limits, self.n_vocab(), lambda name: len(self.tokenize(name.encode(), False, True)))
        sampler = llama_cpp.llama_sampler_init_grammar(self._model.vocab, text.encode(), root.encode())
        if not sampler:
            raise InputError("llama.cpp does not take the grammar; verbose=True shows its own words")
        llama_cpp.llama_sampler_free(sampler)
        self._grammar_checked = text, root

    @inside
    def sample(self, *args: Any, **kwargs: Any) -> int:
        """As in llama-cpp-python.

        Raises
        ------
        GenerationError
            The grammar cannot be followed any further.
        """
        token: int = super().sample(*args, **kwargs)
        if kwargs.get("grammar") is not None and (why := native.kvcast_grammar_error()) is not None:
            raise GenerationError(f"the answer cannot go on as its grammar says: {why.decode()}; change the grammar, or ask again")
        return token

    tokenize = inside(llama_cpp.Llama.tokenize)
    detokenize = inside(llama_cpp.Llama.detokenize)
    embed = inside(llama_cpp.Llama.embed)

    @inside
    def dense_eval(self, token: int) -> None:
        """Evaluate one token dense, with a session that is otherwise sparse. For evaluation; ``eval`` goes on sparse."""
        self._clear_abort()
        self.session.dense_step(token, self._decode)

    def _take_back(self, n_most: int) -> list[int]:
        """Drop the last tokens of the store; they are returned, to be run once more."""
        assert self._session is not None
        n_back = min(self.n_tokens, n_most)
        again = self.input_ids[self.n_tokens - n_back : self.n_tokens].tolist()
        self.n_tokens -= n_back
        self._session.truncate(self.n_tokens)
        return again

    def _window_is_gone(self) -> bool:
        """Whether sliding-window layers have dropped keys that the next token attends to: after a long way back."""
        if not self._n_swa or not self.n_tokens:
            return False
        first = llama_cpp.llama_memory_seq_pos_min(llama_cpp.llama_get_memory(self.ctx), 0)
        return not 0 <= first <= max(0, self.n_tokens - self._n_swa)

    def _look_ahead(self, token: int) -> None:
        """The token's true scores and queries, from a dense step that is taken back."""
        assert self._session is not None
        self._session.observe_truth(token, self._decode)
        self.n_tokens -= 1
        self._session.n_tokens -= 1

    def _decode(self, tokens: Sequence[int]) -> None:
        session = self._session
        assert session is not None
        n_before = self.n_tokens
        try:
            self._evaluate(tokens)
            session.finish_decode()
            self._n_cached = self.n_tokens
        except RuntimeError as error:
            self.n_tokens = n_before
            reason = session.attached.last_error or "the step was stopped" if "returned 2" in str(error) else str(error)
            self._after_failure()
            cause, self._callback_error = self._callback_error, None
            if cause is not None and not isinstance(cause, Exception):  # Ctrl-C, say
                raise cause from None
            if cause is not None:
                raise CallbackError(f"an attention callback raised {type(cause).__name__}: {cause}; the step was not taken") from cause
            raise GenerationError(f"{reason}; the store holds the {self.n_tokens} tokens before it") from error
        except BaseException:
            self.n_tokens = min(self.n_tokens, n_before)
            self._after_failure()
            raise

    def _after_failure(self) -> None:
        assert self._session is not None
        self._n_cached = -1
        self._requires_eval = True  # the logits are those of what failed
        self._clear_abort()
        self._session.truncate(self.n_tokens)

    # ---- state

    @inside
    def save_state(self) -> llama_cpp.LlamaState:
        """As in llama-cpp-python: a copy of the whole state in memory.

        Raises
        ------
        SessionError
            There is no memory for it; the session in hand goes on.
        """
        try:
            return super().save_state()
        except MemoryError as error:
            raise SessionError("there is no memory for a copy of the state; save_session writes it to a file without one") from error

    @inside
    def load_state(self, state: llama_cpp.LlamaState) -> None:
        """As in llama-cpp-python; the history is made again at the next evaluation, from the last 64 tokens.

        Raises
        ------
        SessionError
            There is no memory to take it in, or it does not fit, and the session in hand goes on; or it is of another model or
            other settings, which shows late: the context is empty then.
        """
        before = self.n_tokens, self.input_ids, self._seed, self._requires_eval
        try:
            super().load_state(state)
        except (MemoryError, ValueError) as error:
            self.n_tokens, self.input_ids, self._seed, self._requires_eval = before
            why = "there is no memory to take the state in" if isinstance(error, MemoryError) else f"the state does not fit ({error})"
            raise SessionError(f"{why}; the session in hand goes on") from error
        except RuntimeError as error:
            self.reset()
            self._forget()
            raise SessionError("the state is of another model, or of other settings; the context is empty now, start over") from error
        ids = before[1]  # llama-cpp-python takes over the array of a state, which may be of a smaller context
        ids[: self.n_tokens] = self.input_ids[: self.n_tokens]
        self.input_ids = ids
        self._forget()

    def _forget(self) -> None:
        self._n_cached = -1
        if self._session is not None:
            self._session.forget()

    @inside
    def save_session(self, path: str | os.PathLike[str], about: dict[str, Any] | None = None) -> None:
        """Keep the whole session in a file: tokens, store, and what is remembered of attention.

        After ``load_session`` the same tokens yield the same logits, to the bit, as they do here from now on, with the same
        settings on the same machine. For that, saving ends the current set here too: the next step selects anew, and the device
        path fills its pool anew, as after a prompt. Logits themselves are not kept, nor those of earlier tokens
        (``logits_all``): ``generate`` with exactly the saved tokens runs the last one again.

        The file is written beside ``path`` and takes its place when it is whole and on the disk: whatever happens, ``path`` is
        the old session or the new one.

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

    @inside
    def load_session(self, path: str | os.PathLike[str]) -> dict[str, Any]:
        """Go on with a session that ``save_session`` kept; what this one held is gone.

        The context may be of another size. A session that was saved dense, or with settings that remember less than these, is
        taken in without a history, which the next evaluation makes again from the last 64 tokens.

        Returns
        -------
        dict
            The ``about`` of ``save_session``.

        Raises
        ------
        SessionError
            The file is missing, damaged, of another version, model or KV settings, or does not fit the context; the session in
            hand goes on.
        """
        return session_file.load(self, Path(path))

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
            super(Lifetime, self).close()

    def _leave_to_parent(self) -> None:
        for part in (self._batch, self._ctx, self._model, self):
            getattr(part, "_stack" if part is self else "_exit_stack").pop_all()
        self._forget_native()

    def _forget_native(self) -> None:
        self._session = None
        if hasattr(self, "_ctx"):
            closed: Any = Closed()
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
        ends with ``GenerationError``. Nothing is stopped with ``sparse=None``."""
        with self._lock:
            if self._session is None or self._freed:
                return
            self._hush()
            self._session.attached.abort()

    def _hush(self) -> None:
        """Until the next step: llama.cpp calls a stopped one an error, in three lines."""
        with self._lock:
            if not self._hushed:
                self._hushed = True
                native.hush()

    def _clear_abort(self) -> None:
        with self._lock:
            if self._hushed:
                self._hushed = False
                native.speak()
            if self._session is not None and not self._closing:
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
        attached, n = self.session.attached, self.session.n_tokens
        layer = attached.index_of(layer)
        info = attached.info
        if attached.trace_q is None or info.type_k != 1:
            raise ValueError("exact attention rows need the queries and an f16 store; load the model with sparse=SparseConfig(trace=True)")
        if n == 0:
            raise ValueError("nothing has been evaluated yet; call eval or generate first")
        keys = attached.rows_of(layer, 0, n)[0].astype(np.float32)  # (n, n_head_kv, d)
        tap = 0 if self.session.in_sparse_step else self.session.n_history_taps - 1
        q = attached.trace_q[layer, tap].reshape(info.n_head_kv, -1, info.head_dim_k) * info.kq_scale
        logits = np.einsum("hgd,nhd->hgn", q, keys).reshape(info.n_head, n)
        weights = np.exp(logits - logits.max(1, keepdims=True))
        return weights / weights.sum(1, keepdims=True)

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
        self.session.on_kv = fn if fn is None else self._kv_caller(fn)

    def _kv_caller(self, fn: KvFn | int) -> Callable[[int, int], None]:
        attached = self.session.attached
        info = attached.info
        native_fn = native.kv_callback(fn) if isinstance(fn, int) else None

        def call(index: int, block: int) -> None:
            try:
                layer = int(attached.layers[index])
                if native_fn is None:
                    assert not isinstance(fn, int)
                    fn(layer, block, *attached.rows_of(index, block * native.BLOCK_TOKENS, (block + 1) * native.BLOCK_TOKENS))
                    return
                k, v = (rows[block * native.BLOCK_TOKENS :].ctypes.data for rows in attached.rows(index))
                failed = native_fn(layer, block, k, v, info.k_row_bytes, info.v_row_bytes)
            except Exception as error:
                raise CallbackError(f"a KV callback raised {type(error).__name__}: {error}; the tokens are in the store") from error
            if failed:
                raise CallbackError(f"a KV callback returned {failed}; the tokens are in the store")

        return call

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
        attached = self.session.attached
        if fn is None or isinstance(fn, int):
            attached.set_attention_callback(fn)
            return
        session = self.session

        def call(_user, layer, pos, scores, n_taps, n_head_kv, stride) -> int:
            try:
                given = np.ctypeslib.as_array(scores, shape=(n_taps, n_head_kv, stride))[-1]
                n_used = pos // native.BLOCK_TOKENS + 1
                if session.in_sparse_step:
                    full = np.zeros((n_head_kv, n_used), np.float32)
                    index = attached.index_of(layer)
                    for head in range(n_head_kv):
                        n = session.n_attended[index * n_head_kv + head]
                        full[head, attached.blocks[index, head, :n]] = given[head, :n]
                else:
                    full = given[:, :n_used].copy()
                fn(layer, pos, full)
                return 0
            except BaseException as error:  # noqa: BLE001 - must not pass through native code; raised again by _decode
                self._callback_error = error
                self._hush()
                return 1

        attached.set_attention_callback(call)


def _refuse_contradictions(kwargs: dict[str, Any]) -> None:
    wrong: dict[str, tuple[Callable[[Any], bool], str]] = {
        "offload_kqv": (lambda v: bool(v), "the KV cache lies in host memory"),
        "flash_attn": (lambda v: not v, "V must be stored row by row"),
        "embedding": (lambda v: bool(v), "embeddings have no decode steps"),
        "chat_handler": (lambda v: v is not None, "multimodal handlers bring another libllama"),
    }
    for name, (is_wrong, why) in wrong.items():
        if name in kwargs and is_wrong(kwargs[name]):
            raise ValueError(f"{name}={kwargs[name]!r} contradicts sparse=SparseConfig(...): {why}; leave it out or use sparse=None")


def _closest(name: str) -> str | None:
    import difflib

    found = difflib.get_close_matches(name, [*_ARGUMENTS, "sparse"], n=1)
    return found[0] if found else None


def _check_memory(header: Header, n_ctx: int, kwargs: dict[str, Any], summary: bool) -> None:
    """Refuse a KV cache that memory cannot hold: allocating it would get the process killed."""
    if kwargs.get("vocab_only"):
        return
    n_ubatch = kwargs.get("n_ubatch", 512) if kwargs.get("swa_full") is False else None
    need = header.store_bytes(n_ctx, kwargs.get("type_k") or 1, kwargs.get("type_v") or 1, n_ubatch)
    if summary:
        need += sizes.summary_bytes(header, n_ctx)
    free = psutil.virtual_memory().available
    if need > free and not (kwargs.get("n_gpu_layers") and kwargs.get("offload_kqv", True)):
        per_token = header.store_bytes(256) / 256
        raise ModelError(
            f"a context of {n_ctx} tokens needs {need / GIB:.1f} GiB for its KV cache, and {free / GIB:.1f} GiB are free; "
            f"n_ctx={int(free * 0.8 / per_token) // 256 * 256} would fit"
        )
