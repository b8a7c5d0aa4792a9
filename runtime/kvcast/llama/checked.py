"""llama-cpp-python's ``Llama``, made safe: what comes from outside is checked before llama.cpp sees it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp.llama_chat_format import guess_chat_format_from_gguf_metadata
from llama_cpp.llama_grammar import LlamaGrammar
from llama_cpp.llama_tokenizer import LlamaTokenizer

from ..bindings import api as native
from ..bindings.log import muted_llama_log
from ..bindings.watch import Watch
from ..checks import INT32_MAX, function, optional, whole, wrong
from ..errors import ArgumentError, GenerationError, ModelError, SessionError
from ..gguf.header import Header
from ..limits import Limits
from . import arguments
from .gbnf import GrammarError
from .grammar import check_grammar, grammar_of_schema
from .handle import NativeHandle, in_turn, inside
from .loading import explained
from .messages import for_template
from .sampling import Processors
from .template import ChatTemplate
from .tokenizer import Tokenizer
from .tool_calls import OWN_WAYS, take_choice
from .vocabulary import CheckedModel

_CHAT = inspect.signature(llama_cpp.Llama.create_chat_completion)
TEMPLATE = "tokenizer.chat_template"


class CheckedLlama(NativeHandle, llama_cpp.Llama):
    """A dense model, of anybody's file, for anybody's requests.

    Parameters
    ----------
    path : str
        A GGUF file.
    header : Header
        Of that file.
    limits : Limits
        Bounds on texts, grammars, schemas and chat templates.
    kwargs : dict
        Those of ``llama_cpp.Llama``, checked (``arguments.of_loading``).

    Raises
    ------
    ModelError
        The file cannot be loaded.
    ArgumentError
        The arguments do not fit the model.
    """

    def __init__(self, path: str, header: Header, limits: Limits, kwargs: dict[str, Any]):
        NativeHandle.__init__(self)
        self.header, self.limits = header, limits
        self.chat_template: ChatTemplate | None = None  # the file's own
        self._has_templates = False
        self._n_tokens = 0
        self._processors: Processors | None = None  # of the generation that runs
        self._watch = Watch()
        try:
            super(NativeHandle, self).__init__(path, **kwargs)
            self._raise_signal()
        except Exception as error:  # noqa: BLE001 - raised again
            if (raised := self._watch.take_raised()) is not None:  # Ctrl-C, say, while it was loaded
                raise raised from None
            failure = explained(error, path)
            raise failure from (None if failure is error else error)
        if type(self.tokenizer_) is LlamaTokenizer:
            self.tokenizer_ = Tokenizer(self, self.limits.text_bytes)
        try:
            self._take_templates(kwargs.get("chat_format") is None and kwargs.get("chat_handler") is None)
            self._refuse_pieces()
        except BaseException:
            self.close()
            raise
        self._model.__class__ = CheckedModel
        self._watch.over_context(self.ctx)
        # llama.cpp rounds the context up, to whole 256 tokens; llama-cpp-python 0.3.36 has arrays of the size that was asked for
        self.input_ids = np.zeros(self._n_ctx, np.intc)
        if len(self.scores) < self._n_ctx and kwargs.get("logits_all"):
            self.scores = np.zeros((self._n_ctx, self._n_vocab), np.single)

    @property
    def model_params(self) -> llama_cpp.llama_model_params:
        """As in llama-cpp-python."""
        return self._model_params

    @model_params.setter
    def model_params(self, params: llama_cpp.llama_model_params) -> None:
        self._watch.over_loading(params)
        self._model_params = params

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
    def n_tokens(self) -> int:
        """Tokens in the context. A smaller number takes the last ones back, at the next evaluation; ArgumentError for what is none."""
        return self._n_tokens

    @n_tokens.setter
    def n_tokens(self, n_tokens: int) -> None:
        n_tokens = whole(0, getattr(self, "_n_ctx", 0), ", what the context holds")("n_tokens", n_tokens)
        if n_tokens < self._n_tokens:
            self._requires_eval = True  # the logits are those of a token that is gone
        self._n_tokens = n_tokens

    def _raise_signal(self) -> None:
        """What a signal handler raised in the middle of a native call."""
        if (raised := self._watch.take_raised()) is not None:
            raise raised from None

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

    def check_grammar(self, grammar: LlamaGrammar) -> None:
        """Whether answers can be held to a grammar.

        Raises
        ------
        GrammarError
            llama.cpp does not take it, or it would need too much time or memory.
        """
        check_grammar(grammar._grammar, grammar._root, self.n_vocab(), self.limits)
        with muted_llama_log():
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
        if odd := [text for text in texts if not isinstance(text, str)]:
            raise wrong("a text of input", odd[0], "a string")
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
        together = self.pooling_type() != llama_cpp.LLAMA_POOLING_TYPE_NONE and n_most == self.n_batch  # type: ignore[comparison-overlap]
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
        """What the context holds now came from elsewhere."""

    tokenize = inside(llama_cpp.Llama.tokenize)
    detokenize = inside(llama_cpp.Llama.detokenize)
    reset = in_turn(llama_cpp.Llama.reset)


def _schemas(given: dict[str, Any]) -> Iterator[Any]:
    """JSON schemas that an answer is to follow, of the arguments of ``create_chat_completion``."""
    form = given.get("response_format") or {}
    if form.get("type") == "json_object" and "schema" in form:
        yield form["schema"]
    choice = given.get("tool_choice") or given.get("function_call")
    if isinstance(choice, dict) or choice in ("required", "any"):
        functions = [tool.get("function") or {} for tool in given.get("tools") or []] + list(given.get("functions") or [])
        yield from (function["parameters"] for function in functions if function.get("parameters"))
