"""The configured models, one of them loaded at a time: llama-cpp-python's ``LlamaProxy`` with ``kvcast.Llama`` in it."""

from __future__ import annotations

import inspect
import logging
import threading
from collections.abc import Callable
from typing import Any

import llama_cpp
from llama_cpp import llama_chat_format
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding
from llama_cpp.server.model import LlamaProxy

from .. import models
from ..chat.documents import DocumentCache
from ..errors import KvcastError
from ..gguf.header import read_header
from ..gguf.support import sparse_if_tested
from ..llama.notes import notes_on
from .errors import ApiError
from .served import ServedLlama
from .settings import ModelSettings, short_name

log = logging.getLogger("kvcast.server")
CONTEXT_MAX = 32768  # tokens, when none is asked for
_ARGUMENTS = set(inspect.signature(llama_cpp.Llama.__init__).parameters) - {"self", "model_path", "kwargs"}
_KINDS = {"bool": lambda v: v.lower() in ("true", "1"), "int": int, "float": float, "str": str}


class ModelManager(LlamaProxy):
    """See ``LlamaProxy``. ``lock`` is held while the model is replaced.

    Parameters
    ----------
    settings : list of ModelSettings
        The first is loaded now, and used for names that are unknown.
    documents : DocumentCache or None
    say : callable
        Told when a model runs dense that was to run sparse.
    """

    def __init__(self, settings: list[ModelSettings], documents: DocumentCache | None, say: Callable[[str], None] = print):
        self._documents = documents
        self._say = say
        self._loading = True
        self.lock = threading.Lock()
        for one in settings:  # a path is nobody else's business
            one.model_alias = one.model_alias or short_name(one.model)
        self._names = {known: one.model_alias for one in settings for known in (one.model, one.model_alias)}
        super().__init__(settings)
        self._loading = False

    def __call__(self, model: str | None = None) -> ServedLlama:
        """The model of that name; it may have to be loaded first.

        Raises
        ------
        ApiError
            It cannot be loaded, which the log explains. Where its file is missing or damaged, the one before stays.
        """
        name = self._names.get(model, self._default_model_alias)
        with self.lock:
            try:
                if name != self._current_model_alias or self._current_model is None:
                    self._loading = True
                    read_header(models.resolve(self._model_settings_dict[name].model))
                return super().__call__(name)
            except (KvcastError, ValueError, OSError, MemoryError) as error:
                log.error("%s cannot be loaded: %s", name, error)
                raise ApiError(500, f"the model {name!r} cannot be loaded; the server's log says why", code="model_not_loaded") from error
            finally:
                self._loading = False

    @property
    def current(self) -> ServedLlama | None:
        """The loaded model; None while it is replaced, and where that failed."""
        return self._current_model

    @property
    def state(self) -> str:
        """``ok``, ``loading`` or ``failed``; a model that failed is tried again when one is asked for."""
        return "loading" if self._loading else "failed" if self._current_model is None else "ok"

    def load_llama_from_model_settings(self, settings: ModelSettings) -> ServedLlama:
        """Load a model.

        Raises
        ------
        KvcastError
            It cannot be loaded, or cannot run sparse.
        ValueError
            A setting contradicts ``sparse``.
        """
        path = models.resolve(settings.model)
        given: dict[str, Any] = {name: getattr(settings, name) for name in settings.model_fields_set & _ARGUMENTS}
        given.update(
            n_ctx=settings.n_ctx or min(read_header(path).n_ctx_train, CONTEXT_MAX),
            verbose=settings.verbose,
        )
        sparse = sparse_if_tested(path, settings.sparse, lambda text: self._say(f"{settings.model_alias}: {text}"))
        if sparse is None:
            given.setdefault("flash_attn", True)
            given.setdefault("n_threads", settings.n_threads)
        if settings.draft_model is not None:
            given["draft_model"] = LlamaPromptLookupDecoding(num_pred_tokens=settings.draft_model_num_pred_tokens)
        if settings.kv_overrides is not None:
            given["kv_overrides"] = dict(_override(text) for text in settings.kv_overrides)
        llm = ServedLlama(path, sparse=sparse, limits=settings.limits, name=settings.model_alias, documents=self._documents, **given)
        for note in notes_on(llm, given["n_ctx"], given):
            self._say(f"{settings.model_alias}: {note}")
        if settings.chat_template_kwargs:
            _pass_to_template(llm, settings.chat_template_kwargs)
        if settings.cache:
            llm.set_cache(llama_cpp.LlamaRAMCache(capacity_bytes=settings.cache_size))
        return llm


def _override(text: str) -> tuple[str, bool | int | float | str]:
    """``key=type:value``, as in llama-cpp-python's settings."""
    key, _, typed = text.partition("=")
    kind, _, value = typed.partition(":")
    if kind not in _KINDS:
        raise ValueError(f"kv_overrides has {text!r}; write it as key=type:value, type one of {', '.join(_KINDS)}")
    return key, _KINDS[kind](value)


def _pass_to_template(llm: ServedLlama, values: dict[str, Any]) -> None:
    handler = llm.chat_handler or llm._chat_handlers.get(llm.chat_format) or llama_chat_format.get_chat_completion_handler(llm.chat_format)
    llm.chat_handler = lambda *args, **kwargs: handler(*args, **{**values, **kwargs})
