"""Public arguments, checked where they enter: llama.cpp takes them as they come, and some of them end the process."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp.llama_grammar import LlamaGrammar

from ..checks import INT32_MAX, UINT32_MAX, Check, flag, function, functions, made_of, number, one_of, optional, shown, text, whole, wrong

N_CTX_MAX = INT32_MAX - 255  # tokens: the next multiple of 256 is a number, too
N_THREADS_MAX = 512  # ggml's
KV_TYPES = {0: "f32", 1: "f16", 2: "q4_0", 3: "q4_1", 6: "q5_0", 7: "q5_1", 8: "q8_0", 20: "iq4_nl", 30: "bf16"}  # ggml's, of a KV cache
TEMPERATURE_MIN = 1e-9  # logits that are divided by less are no numbers any more
PENALTY_MIN, PENALTY_MAX = 1e-6, 1e6
LAST_N_MAX = 1 << 24  # tokens that penalties look back


def _numa(name: str, value: Any) -> bool | int:
    return value if isinstance(value, bool) else whole(0, 4)(name, value)


def _tensor_split(name: str, value: Any) -> list[float]:
    most = llama_cpp.LLAMA_MAX_DEVICES
    if isinstance(value, str) or not isinstance(value, Sequence | np.ndarray) or len(value) > most:
        raise wrong(name, value, f"a list of at most {most} shares, one of each device")
    return [number(0.0)(f"{name}[{i}]", share) for i, share in enumerate(value)]


def _kv_overrides(name: str, value: Any) -> dict[str, bool | int | float | str]:
    if not isinstance(value, Mapping):
        raise wrong(name, value, "a dict")
    found: dict[str, bool | int | float | str] = {}
    for key, item in value.items():
        if not isinstance(key, str) or not 0 < len(key.encode()) < 128:
            raise wrong(f"a key of {name}", key, "a string of 1 to 127 bytes")
        if isinstance(item, str):
            if len(item.encode()) >= 128:
                raise wrong(f"{name}[{key!r}]", item, "shorter than 128 bytes")
            found[key] = item
        elif isinstance(item, bool | np.bool_):
            found[key] = bool(item)
        elif isinstance(item, int | np.integer):
            found[key] = whole(-(1 << 63), (1 << 63) - 1)(f"{name}[{key!r}]", item)
        else:
            found[key] = float(number()(f"{name}[{key!r}]", item))
    return found


def _tokenizer(name: str, value: Any) -> Any:
    if not (callable(getattr(value, "tokenize", None)) and callable(getattr(value, "detokenize", None))):
        raise wrong(name, value, "a tokenizer with tokenize and detokenize, or None")
    return value


# ---- what Llama is loaded with

_threads = whole(0, N_THREADS_MAX, ", or None for as many as there are cores")
_kv_type = one_of(KV_TYPES)
_LOADING: dict[str, Check] = {
    "n_gpu_layers": whole(-INT32_MAX - 1, INT32_MAX),
    "split_mode": one_of({0: "none", 1: "layer", 2: "row", 3: "tensor"}),
    "main_gpu": whole(-INT32_MAX - 1, INT32_MAX),
    "tensor_split": optional(_tensor_split),
    "vocab_only": flag,
    "use_mmap": flag,
    "use_mlock": flag,
    "kv_overrides": optional(_kv_overrides),
    "seed": optional(whole(-(1 << 63), (1 << 63) - 1)),
    "n_ctx": whole(0, N_CTX_MAX, " (0: what the model was trained for)"),
    "n_batch": whole(1, INT32_MAX),
    "n_ubatch": whole(0, INT32_MAX, " (0: as n_batch)"),
    "n_threads": optional(_threads),
    "n_threads_batch": optional(_threads),
    "rope_scaling_type": optional(one_of({-1: "the model's", 0: "none", 1: "linear", 2: "yarn", 3: "longrope"})),
    "pooling_type": one_of({-1: "the model's", 0: "none", 1: "mean", 2: "cls", 3: "last", 4: "rank"}),
    "attention_type": one_of({-1: "the model's", 0: "causal", 1: "not causal"}),
    "rope_freq_base": number(0.0, why=" (0: the model's)"),
    "rope_freq_scale": number(0.0, why=" (0: the model's)"),
    "yarn_ext_factor": number(),
    "yarn_attn_factor": number(),
    "yarn_beta_fast": number(),
    "yarn_beta_slow": number(),
    "yarn_orig_ctx": whole(0, UINT32_MAX),
    "logits_all": flag,
    "embedding": flag,
    "offload_kqv": flag,
    "flash_attn": flag,
    "op_offload": optional(flag),
    "swa_full": optional(flag),
    "no_perf": flag,
    "last_n_tokens_size": whole(-INT32_MAX - 1, LAST_N_MAX),
    "lora_base": optional(text),
    "lora_scale": number(),
    "lora_path": optional(text),
    "numa": _numa,
    "chat_format": optional(text),
    "chat_handler": optional(function),
    "draft_model": optional(function),
    "tokenizer": optional(_tokenizer),
    "type_k": optional(_kv_type),
    "type_v": optional(_kv_type),
    "spm_infill": flag,
    "verbose": flag,
}


def of_loading(given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of ``llama_cpp.Llama``, checked one by one.

    Raises
    ------
    TypeError
        There is no argument of that name.
    ArgumentError
        A value cannot be.
    """
    for name in given:
        if name not in _LOADING:
            close = difflib.get_close_matches(name, [*_LOADING, "sparse"], n=1)
            raise TypeError(f"Llama has no argument {name!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
    return {name: _LOADING[name](name, value) for name, value in given.items()}


def refuse_contradictions(given: Mapping[str, Any]) -> None:
    """ValueError for an argument that does not go with ``sparse``."""
    contradicting: dict[str, tuple[Callable[[Any], bool], str]] = {
        "offload_kqv": (lambda v: bool(v), "the KV cache lies in host memory"),
        "flash_attn": (lambda v: not v, "V must be stored row by row"),
        "embedding": (lambda v: bool(v), "embeddings have no decode steps"),
        "vocab_only": (lambda v: bool(v), "a vocabulary has no decode steps"),
        "chat_handler": (lambda v: v is not None, "multimodal handlers bring another libllama"),
    }
    for name, (contradicts, why) in contradicting.items():
        if name in given and contradicts(given[name]):
            raise ValueError(f"{name}={given[name]!r} contradicts sparse=SparseConfig(...): {why}; leave it out or use sparse=None")


# ---- what an answer is sampled with


def _temperature(name: str, value: Any) -> float:
    checked = number()(name, value)
    if 0 < checked < TEMPERATURE_MIN:
        raise wrong(name, value, f"0, or {TEMPERATURE_MIN:g} or more")
    return checked


_penalty = number(-PENALTY_MAX, PENALTY_MAX)
_SAMPLING: dict[str, Check] = {
    "top_k": whole(-INT32_MAX - 1, INT32_MAX),
    "top_p": number(),
    "min_p": number(),
    "typical_p": number(),
    "temp": _temperature,
    "repeat_penalty": number(PENALTY_MIN, PENALTY_MAX),
    "frequency_penalty": _penalty,
    "presence_penalty": _penalty,
    "tfs_z": number(),
    "mirostat_mode": one_of({0: "off", 1: "mirostat", 2: "mirostat 2"}),
    "mirostat_eta": number(),
    "mirostat_tau": number(),
    "penalize_nl": flag,
    "logits_processor": optional(functions),
    "grammar": optional(made_of(LlamaGrammar, "a llama_cpp.LlamaGrammar, or None")),
}


def of_sampling(given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of llama-cpp-python's samplers, checked one by one; ArgumentError for a value that cannot be."""
    return {name: _SAMPLING[name](name, value) for name, value in given.items()}


def logit_bias(name: str, value: Any, n_vocab: int) -> dict[int, float]:
    """By token; ids may be written as strings, as in JSON. Minus infinity forbids a token."""
    if not isinstance(value, Mapping):
        raise wrong(name, value, "a dict of numbers by token")
    found = {}
    for token, bias in value.items():
        number_of = int(token) if isinstance(token, str) and token.isdecimal() and len(token) < 20 else token
        if not (isinstance(bias, float | np.floating) and bias == -np.inf):
            bias = number()(f"{name}[{shown(token)}]", bias)
        found[token_id(f"a token of {name}", number_of, n_vocab)] = float(bias)
    return found


# ---- tokens


def token_id(name: str, value: Any, n_vocab: int) -> int:
    """A token that the model has."""
    return whole(0, n_vocab - 1, ", a token of the model")(name, value)


def token_ids(name: str, values: Any, n_vocab: int) -> list[int]:
    """Tokens that the model has."""
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable) or getattr(values, "ndim", 1) != 1:
        raise wrong(name, values, "a list of tokens")
    found = values if isinstance(values, list | np.ndarray) else list(values)
    if len(found) == 0:
        return []
    try:
        array = np.asarray(found)
        good = array.ndim == 1 and array.dtype.kind in "iu" and 0 <= array.min() and array.max() < n_vocab
    except ValueError:  # lists of different lengths
        good = False
    if good:
        return array.tolist()
    return [token_id(f"{name}[{i}]", value, n_vocab) for i, value in enumerate(found)]
