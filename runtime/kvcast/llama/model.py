"""``kvcast.Llama``: llama-cpp-python's ``Llama`` with sparse attention."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp.llama_chat_format import guess_chat_format_from_gguf_metadata
from llama_cpp.llama_tokenizer import LlamaTokenizer

from ..bindings import api as native
from ..bindings.log import Hush, quiet
from ..bindings.watch import Watch
from ..blocks import BLOCK_TOKENS
from ..checks import INT32_MAX, function, function_or_address, optional, whole, wrong
from ..config import SparseConfig
from ..cores import usable_cores
from ..engine.device_path import DeviceSession
from ..engine.session import AttentionFn, KvFn, Session
from ..errors import ArgumentError, CallbackError, ContextFull, GenerationError, ModelError, SessionError
from ..gguf import identity
from ..gguf import memory as sizes
from ..gguf.header import read_header
from ..gguf.support import TESTED, refusal
from ..limits import Limits
from ..sparse.predictors import LOOK_AHEAD
from . import arguments, session_file
from .gbnf import GrammarError
from .grammar import check_grammar, grammar_of_schema
from .lifetime import Closed, Lifetime, in_turn, inside
from .loading import SMALLER, _check_adapter, _check_memory, _explained, _of_sparse
from .messages import for_template
from .sampling import Processors
from .speculative import VERIFY_TOKENS, ShortDraft
from .template import ChatTemplate
from .tokenizer import Tokenizer
from .tool_calls import OWN_WAYS, take_choice
from .vocabulary import CheckedModel

_CHAT = inspect.signature(llama_cpp.Llama.create_chat_completion)
TEMPLATE = "tokenizer.chat_template"


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


class Llama(Lifetime, llama_cpp.Llama):
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
        Lifetime.__init__(self)
        self.limits = limits or Limits()
        self.chat_template: ChatTemplate | None = None  # the file's own
        self._has_templates = False
        self._session: Session | None = None
        self._n_tokens = 0
        self._n_cached = -1  # tokens in the KV cache, as far as is certain
        self._n_last = 0  # tokens that were evaluated last, together
        self._mark = object()  # of that evaluation
        self._hush: Hush | None = None  # until the next step: llama.cpp calls a stopped one an error, in three lines
        self._processors: Processors | None = None  # of the generation that runs
        if not isinstance(sparse, SparseConfig | None):
            raise wrong("sparse", sparse, "a SparseConfig, or None")
        kwargs = arguments.of_loading(kwargs)
        if sparse is not None:
            kwargs = _of_sparse(kwargs, sparse)
        kwargs["n_threads"] = kwargs.get("n_threads") or usable_cores()
        kwargs["n_threads_batch"] = kwargs.get("n_threads_batch") or kwargs["n_threads"]
        path = os.fsdecode(model_path)
        header = read_header(path, kwargs.get("kv_overrides"))
        if adapter := kwargs.get("lora_path"):
            _check_adapter(adapter, header)
        self._stamps = identity.stamps(identity.files_of(path, header.n_split))
        self._lora_stamps = identity.stamps([adapter] if adapter else [])
        if sparse is not None and not sparse.untested and header.arch not in TESTED:
            if error := refusal(path):
                raise error
        n_ctx = sizes.n_cells(kwargs.get("n_ctx", 512) or header.n_ctx_train)
        _check_memory(header, n_ctx, kwargs, sparse is not None and sparse.keeps_summary)
        self._watch = Watch()
        try:
            super(Lifetime, self).__init__(path, **kwargs)
            self._raise_signal()
        except Exception as error:  # noqa: BLE001 - raised again
            if (raised := self._watch.take_raised()) is not None:  # Ctrl-C, say, while it was loaded
                raise raised from None
            explained = _explained(error, path)
            raise explained from (None if explained is error else error)
        if type(self.tokenizer_) is LlamaTokenizer:
            self.tokenizer_ = Tokenizer(self, self.limits.text_bytes)
        try:
            self._take_templates(kwargs.get("chat_format") is None and kwargs.get("chat_handler") is None)
        except BaseException:
            self.close()
            raise
        self.header = header
        self._model.__class__ = CheckedModel
        self._watch.over_context(self.ctx)
        # llama.cpp rounds the context up, to whole 256 tokens; llama-cpp-python 0.3.36 has arrays of the size that was asked for
        self.input_ids = np.zeros(self._n_ctx, np.intc)
        if len(self.scores) < self._n_ctx and kwargs.get("logits_all"):
            self.scores = np.zeros((self._n_ctx, self._n_vocab), np.single)
        self._n_swa = llama_cpp.llama_model_n_swa(self.model)
        self._config = sparse
        self._callback_error: BaseException | None = None
        try:
            self._refuse_pieces()
            if sparse is not None:
                kind = DeviceSession if sparse.device else Session
                self._session = kind(self.ctx, sparse, self.n_batch, sizes.tap_bytes(header, self.n_ctx()), header.embedded)
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
            # unless they were asked for, logits stay with llama.cpp: `scores` has rows for n_batch tokens only
            self._logits_all = bool(kwargs.get("logits_all"))

    def _refuse_pieces(self) -> None:
        """Attention that is not causal sees a text in one piece; llama.cpp ends the process when it is cut."""
        params = self.context_params
        causal = params.attention_type == 0
        if params.attention_type == -1:  # the model's
            causal = self.metadata.get(f"{self.header.arch}.attention.causal") != "false"
        if not causal and 0 < params.n_ubatch < params.n_batch:
            raise ArgumentError(
                f"n_ubatch is {params.n_ubatch} and n_batch {params.n_batch}; without causal attention a text is read in one piece: "
                "make them equal"
            )

    @property
    def model_params(self) -> llama_cpp.llama_model_params:
        """As in llama-cpp-python."""
        return self._model_params

    @model_params.setter
    def model_params(self, params: llama_cpp.llama_model_params) -> None:
        self._watch.over_loading(params)
        self._model_params = params

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "sparse": self._config}

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
            guessed = guess_chat_format_from_gguf_metadata(self.metadata)
            self.chat_format = guessed if guessed and self.chat_template.takes_system else "chat_template.default"

    # ---- evaluation

    @property
    def n_tokens(self) -> int:
        """Tokens in the context. A smaller number takes the last ones back, at the next evaluation; ArgumentError for what is none."""
        return self._n_tokens

    @n_tokens.setter
    def n_tokens(self, n_tokens: int) -> None:
        n_tokens = whole(0, getattr(self, "_n_ctx", 0), ", what the context holds")("n_tokens", n_tokens)
        if n_tokens < self._n_tokens:
            self._requires_eval = True  # the logits are those of a token that is gone
        self._n_tokens = n_tokens

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
                    self._advance_dense(tokens[i : i + self.n_batch])
            elif len(tokens) > 0:
                self._advance(self._session, tokens)

    def _advance_dense(self, tokens: list[int]) -> None:
        try:
            self._evaluate(tokens)
            self._raise_signal()
        except BaseException as error:
            self._requires_eval = True  # the logits are those of what failed
            self._raise_signal()
            if isinstance(error, RuntimeError) and "returned 2" in str(error):
                raise GenerationError(f"the step was stopped; the store holds the {self.n_tokens} tokens before it") from error
            raise

    def _advance(self, session: Session, tokens: list[int]) -> None:
        n, n_total = self.n_tokens, self.n_tokens + len(tokens)
        if n_total > self._n_ctx:
            raise ContextFull(
                f"the context is full: {n} + {len(tokens)} tokens do not fit n_ctx={self._n_ctx}; "
                "start over, shorten the text or load the model with a larger n_ctx"
            )
        with self._undone_on_failure(session):
            n_whole = 1 if self.draft_model is None else self._n_verify  # taken whole or not at all: a token, or one with its draft
            goes_on = session.goes_on(n) and (len(tokens) <= n_whole or not session.checkpoints.ends_a_prompt(n))
            n_stay = n if goes_on else session.go_back(n, n_total)
            if self._window_is_gone(n_stay):
                n_stay = session.go_back(0, n_total)
            if n_stay < n:
                tokens = self.input_ids[n_stay:n].tolist() + tokens
                self.n_tokens = n_stay
            if not session.history.primed or len(tokens) > n_whole:
                session.prompt(tokens, self._decode, held=not self._turns.answers)
            elif len(tokens) > 1:
                session.verify(tokens, self._decode)
            else:
                if session.config.predictor in LOOK_AHEAD:
                    self._look_ahead(tokens[0])
                session.step(tokens[0], self._decode)

    @contextlib.contextmanager
    def _undone_on_failure(self, session: Session) -> Iterator[None]:
        """The one place where a step or a prompt that did not come to its end is undone, whatever ended it: this model and its session
        hold what was done with before, and go on from there as if nothing had been."""
        try:
            yield
        except BaseException as error:
            self._n_cached = -1
            self._clear_abort()
            if session.busy:
                self.n_tokens = min(self.n_tokens, session.n_done)
                session.undo(self.n_tokens)
            if isinstance(error, GenerationError) or not isinstance(error, Exception):
                raise
            cause: BaseException = error
            while isinstance(cause, SystemError) and cause.__cause__ is not None:
                cause = cause.__cause__
            if cause is not error:
                raise cause from None  # a signal handler raised it in the middle of a compiled kernel, which Numba passes on so
            said = str(error) if isinstance(error, RuntimeError) else f"evaluating failed: {type(error).__name__}: {error}"
            raise GenerationError(f"{said}; the store holds the {self.n_tokens} tokens before it") from error

    def _decode(self, tokens: Sequence[int]) -> None:
        """llama_decode, and what must succeed for its tokens to count."""
        session = self._session
        assert session is not None
        n_before = self.n_tokens
        try:
            self._evaluate(tokens)
            session.finish_decode()
            self._raise_signal()
            self._n_cached = self.n_tokens
        except BaseException as error:
            self.n_tokens, self._requires_eval = n_before, True
            self._raise_signal()
            cause, self._callback_error = self._callback_error, None
            if cause is not None and not isinstance(cause, Exception):  # Ctrl-C, say
                raise cause from None
            if cause is not None:
                raise CallbackError(f"an attention callback raised {type(cause).__name__}: {cause}; the step was not taken") from cause
            if isinstance(error, RuntimeError) and "returned 2" in str(error):
                raise RuntimeError(session.attached.last_error or "the step was stopped") from error
            raise

    def _raise_signal(self) -> None:
        """What a signal handler raised in the middle of a native call."""
        if (raised := self._watch.take_raised()) is not None:
            raise raised from None

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
    def generate(self, tokens: Sequence[int], *args: Any, **kwargs: Any) -> Generator[int, Sequence[int] | None, None]:  # type: ignore[override]
        checked = arguments.token_ids("tokens", tokens, self._n_vocab)
        if not checked and (kwargs.get("reset", True) or not self.n_tokens):
            raise ArgumentError("the prompt is empty; give it a token at least")
        optional(function)("stopping_criteria", kwargs.get("stopping_criteria"))
        return self._in_turns(super().generate(checked, *args, **kwargs))

    def _create_completion(self, *args: Any, **kwargs: Any) -> Generator[Any, None, None]:
        if kwargs.get("logit_bias") is not None:
            kwargs["logit_bias"] = arguments.logit_bias("logit_bias", kwargs["logit_bias"], self._n_vocab)
        return self._in_turns(super()._create_completion(*args, **kwargs))  # type: ignore[arg-type]  # a generator

    def _init_sampler(self, **kwargs: Any) -> Any:  # type: ignore[override]  # as it is called
        """Every grammar comes through here; see ``grammar.check_grammar``."""
        kwargs = arguments.of_sampling(kwargs)
        if kwargs.get("grammar") is not None:
            self.check_grammar(kwargs["grammar"])
        self._processors = None
        if kwargs.get("logits_processor") is not None:
            self._processors = Processors(kwargs["logits_processor"], kwargs.get("grammar") is not None)
            kwargs["logits_processor"] = [self._processors]
        return super()._init_sampler(**kwargs)

    def check_grammar(self, grammar: llama_cpp.LlamaGrammar) -> None:
        """Whether answers can be held to a grammar.

        Raises
        ------
        GrammarError
            llama.cpp does not take it, or it would need too much time or memory.
        """
        check_grammar(grammar._grammar, grammar._root, self.n_vocab(), self.limits)
        with quiet():
            sampler = llama_cpp.llama_sampler_init_grammar(self._model.vocab, grammar._grammar.encode(), grammar._root.encode())
        reason = native.kvcast_grammar_error().decode(errors="replace")
        if not sampler:
            raise GrammarError(f"llama.cpp cannot read the grammar{f' ({reason})' if reason else ''}; correct it (GBNF, with a rule root)")
        llama_cpp.llama_sampler_free(sampler)

    def create_chat_completion(self, messages: list[Any], *args: Any, parallel_tool_calls: bool = True, **kwargs: Any) -> Any:  # type: ignore[override]
        """As in llama-cpp-python, with what OpenAI's clients send beyond it: messages whose content is null, parts of text, the role
        ``developer``, a ``response_format`` with a ``json_schema``, ``logprobs`` without ``top_logprobs``, ``tool_choice`` "required" and
        "none". Calls of tools come as ``tool_calls`` also where the model chose to call; see tool_calls.py for the ways it may write them.

        Raises
        ------
        ValueError
            A tool is to be called that is not there, or beside a grammar or a format; the messages do not fit the template.
        """
        given = _CHAT.bind(self, messages, *args, **kwargs).arguments
        given.pop("self")
        given["messages"] = for_template(messages)
        form = given.get("response_format") or {}
        if form.get("type") == "json_schema":
            schema = (form.get("json_schema") or {}).get("schema")
            given["response_format"] = {"type": "json_object", **({} if schema is None else {"schema": schema})}
        if given.get("logprobs") and given.get("top_logprobs") is None:
            given["top_logprobs"] = 0
        for schema in _schemas(given):  # the chat formats would fall back to any JSON without a word
            grammar_of_schema(schema, self.limits)
        if self.chat_format in OWN_WAYS:
            return super().create_chat_completion(**given)
        choice = take_choice(given, parallel_tool_calls)
        for schema in _schemas(given):
            grammar_of_schema(schema, self.limits)
        answer: Any = super().create_chat_completion(**given)
        if choice is None:
            return answer
        return choice.chunks(answer) if given.get("stream") else choice.message(answer)

    @in_turn
    def embed(self, input: str | list[str], normalize: bool = False, truncate: bool = True, return_count: bool = False) -> Any:
        """As in llama-cpp-python, which writes beside its memory for a text without tokens, and mixes up texts where tokens are not pooled.

        Raises
        ------
        ValueError
            There is no text, or one without tokens or with more than a batch holds.
        """
        if not self.context_params.embeddings:
            raise RuntimeError("this model was loaded without embeddings; load it with embedding=True")
        texts = [input] if isinstance(input, str) else list(input)
        if not texts:
            raise ValueError("there is no text to embed; give at least one")
        if wrong := [text for text in texts if not isinstance(text, str)]:
            raise wrong("a text of input", wrong[0], "a string")
        # a batch of tokens that all see one another is computed at once, or llama.cpp ends the process
        n_most = self.n_batch if llama_cpp.llama_get_causal_attn(self.ctx) else self.context_params.n_ubatch
        for i, text in enumerate(texts):
            n, which = len(self.tokenize(text.encode("utf-8"))), f"text {i}" if len(texts) > 1 else "the text"
            if n == 0:
                raise ValueError(f"{which} is empty; there is nothing to embed")
            if n > n_most and not (truncate and n_most == self.n_batch):
                raise ValueError(
                    f"{which} has {n:,} tokens and {n_most:,} can be embedded; shorten it, or use a larger n_batch and n_ubatch"
                )
        together = self.pooling_type() != llama_cpp.LLAMA_POOLING_TYPE_NONE and n_most == self.n_batch
        vectors, n_tokens = [], 0
        for some in [texts] if together else [[text] for text in texts]:
            more, n = super().embed(some, normalize, truncate, return_count=True)  # type: ignore[misc]  # a pair
            vectors += more
            n_tokens += n
        found = vectors[0] if isinstance(input, str) else vectors
        return (found, n_tokens) if return_count else found

    @inside
    def sample(self, *args: Any, idx: int | None = None, **kwargs: Any) -> int:
        """As in llama-cpp-python.

        Raises
        ------
        GenerationError
            There are no logits to choose a token by.
        CallbackError
            A logits processor raised; its exception is the ``__cause__``.
        """
        at = -1 if idx is None else whole(0, INT32_MAX)("idx", idx) - self.n_tokens
        if self.n_tokens == 0 or not self._ctx.get_logits_ith(at):
            raise GenerationError("there are no logits to choose a token by; evaluate one first")
        token = super().sample(*args, **{**kwargs, "idx": idx})
        if self._processors is not None:
            self._processors.check()
        if error := native.kvcast_grammar_error():
            reason = error.decode(errors="replace")[:200]
            raise GenerationError(f"the grammar cannot go on here ({reason}); ask again, or change the grammar")
        return token

    def set_seed(self, seed: int) -> None:
        """As in llama-cpp-python."""
        super().set_seed(whole(-(1 << 63), (1 << 63) - 1)("seed", seed))

    tokenize = inside(llama_cpp.Llama.tokenize)
    detokenize = inside(llama_cpp.Llama.detokenize)
    reset = in_turn(llama_cpp.Llama.reset)

    @in_turn
    def dense_eval(self, token: int) -> None:
        """Evaluate one token dense, with a session that is otherwise sparse. For evaluation; ``eval`` goes on sparse."""
        session = self.session
        token = arguments.token_id("token", token, self._n_vocab)
        with self._undone_on_failure(session):
            session.dense_step(token, self._decode)

    def _window_is_gone(self, n_tokens: int) -> bool:
        """Whether sliding-window layers have dropped keys that the token after so many attends to: after a long way back."""
        if not self._n_swa or not n_tokens:
            return False
        first = llama_cpp.llama_memory_seq_pos_min(llama_cpp.llama_get_memory(self.ctx), 0)
        return not 0 <= first <= max(0, n_tokens - self._n_swa)

    def _look_ahead(self, token: int) -> None:
        """The token's true scores and queries, from a dense step that is taken back."""
        assert self._session is not None
        self._session.observe_truth(token, self._decode)
        self._n_tokens -= 1
        self._session.n_tokens -= 1

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

    @in_turn
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

    @in_turn
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
            super(Lifetime, self).close()
        if hasattr(self, "_watch"):
            self._watch.close()

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
        ends with ``GenerationError``, between two operations of what the CPU computes."""
        with self._lock:
            if self._freed:
                return
            self._hush = Hush()
            self._watch.stop()
            if self._session is not None:
                self._session.attached.abort()

    def _clear_abort(self) -> None:
        with self._lock:
            self._hush = None
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
        self.session.on_kv = fn if fn is None else self._kv_caller(function_or_address("on_kv's function", fn))

    def _kv_caller(self, fn: KvFn | int) -> Callable[[int, int], None]:
        attached = self.session.attached
        info = attached.info
        native_fn = native.kv_callback(fn) if isinstance(fn, int) else None

        def call(index: int, block: int) -> None:
            try:
                layer = int(attached.layers[index])
                if native_fn is None:
                    assert not isinstance(fn, int)
                    rows = attached.rows_of(index, block * BLOCK_TOKENS, (block + 1) * BLOCK_TOKENS)
                    with self._calling_back():
                        fn(layer, block, *rows)
                    return
                k, v = (rows[block * BLOCK_TOKENS :].ctypes.data for rows in attached.rows(index))
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
        fn = optional(function_or_address)("on_attention's function", fn)
        if fn is None or isinstance(fn, int):
            attached.set_attention_callback(fn)
            return
        session = self.session

        def call(of: native.AttentionCall) -> int:
            given = np.ctypeslib.as_array(of.scores, shape=(of.n_taps, of.n_head_kv, of.stride))[-1]
            n_used = of.pos // BLOCK_TOKENS + 1
            if session.in_sparse_step:
                full = np.zeros((of.n_head_kv, n_used), np.float32)
                index = attached.index_of(of.layer)
                for head in range(of.n_head_kv):
                    n = session.n_attended[index * of.n_head_kv + head]
                    full[head, attached.blocks[index, head, :n]] = given[head, :n]
            else:
                full = given[:, :n_used].copy()
            with self._calling_back():
                fn(of.layer, of.pos, full)
            return 0

        def failed(error: BaseException) -> int:
            self._callback_error = error  # raised again by _decode
            self._hush = Hush()
            return 1

        attached.set_attention_callback(call, failed)


def _schemas(given: dict[str, Any]) -> Iterator[Any]:
    """JSON schemas that an answer is to follow, of the arguments of ``create_chat_completion``."""
    form = given.get("response_format") or {}
    if form.get("type") == "json_object" and "schema" in form:
        yield form["schema"]
    choice = given.get("tool_choice") or given.get("function_call")
    if isinstance(choice, dict) or choice in ("required", "any"):
        functions = [tool.get("function") or {} for tool in given.get("tools") or []] + list(given.get("functions") or [])
        yield from (function["parameters"] for function in functions if function.get("parameters"))
