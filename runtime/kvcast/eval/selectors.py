"""Ways to choose what is attended, by name: other methods in their published form, and ours, through the same runtime.

A published method here is what it chooses, at blocks of 16 tokens and the same budget, not how its authors store or compute it:
evicting methods run on a store that is complete, from which they do not read what they threw away.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from ..config import OLD_NAMES, SparseConfig


@dataclass(frozen=True, slots=True)
class Selector:
    """A way to choose what is attended.

    Parameters
    ----------
    name : str
        As written in reports.
    config : SparseConfig or None
        None: dense.
    evicts : bool
        What it left out is gone. A later turn is then read through its set, token by token.
    """

    name: str
    config: SparseConfig | None
    evicts: bool = False


FRESH = dict(calibrate="off", budget_allocation="uniform", hold=1)  # decided anew for every step, the same budget everywhere
OBSERVED = dict(calibrate="dense:16", budget_allocation="uniform", hold=1)
# name: settings, and one line for reports
SELECTORS: dict[str, tuple[dict[str, Any] | None, str]] = {
    "dense": (None, "attends to everything"),
    "default": ({}, "kvcast as shipped"),
    "stream": (
        dict(predictor="onnx:stream", calibrate="dense:16", budget_allocation="spread", hold=8),
        "our network without the newest query",
    ),
    "paper": (dict(predictor="onnx:paper", **OBSERVED), "AttentionPredictor's network (2502.04077), one step in 16 dense"),
    "ema": (dict(predictor="ema", **OBSERVED), "average .9 of block scores, one step in 16 dense"),
    "last": (dict(predictor="last", **OBSERVED), "scores of the last step, one step in 16 dense"),
    "quest": (dict(predictor="quest", **FRESH), "Quest (2406.10774): bounds from smallest and largest keys, and the step's query"),
    "streaming": (dict(predictor="streaming", **FRESH), "StreamingLLM (2309.17453), simulated: sink and most recent; positions kept"),
    "h2o": (
        dict(predictor="h2o", **FRESH),
        "H2O (2306.14048), simulated: attention accumulated from the last 64 prompt tokens on, evicting",
    ),
    "snapkv": (dict(predictor="snapkv", **FRESH), "SnapKV (2404.14469), simulated: what the last 64 prompt tokens saw"),
    "window": (dict(predictor="window", **FRESH), "sink and window only"),
    "oracle": (
        dict(predictor="oracle", calibrate="off", budget_allocation="spread", hold=1),
        "the step's own attention, known beforehand: the best a budget can do",
    ),
}
EVICTING = ("streaming", "h2o", "snapkv")


def selector(name: str, budget: int) -> Selector:
    """By name, ``default+min_recovery=0.9+hold=8`` with settings of SparseConfig after it.

    Raises
    ------
    ValueError
        There is no such selector or setting, or a value is out of its range.
    """
    base, *changes = name.split("+")
    if base not in SELECTORS:
        raise ValueError(f"there is no selector {base!r}; choose of {', '.join(SELECTORS)}")
    settings = SELECTORS[base][0]
    if settings is None:
        if changes:
            raise ValueError(f"selector {name!r}: dense has no settings")
        return Selector(name, None)
    config = SparseConfig(budget=budget, **settings)
    kinds = {f.name: str(f.type) for f in fields(SparseConfig)}
    for change in changes:
        key, _, value = change.partition("=")
        key = OLD_NAMES.get(key, key)
        if key not in kinds or not value:
            raise ValueError(f"selector {name!r}: {change!r} is not SETTING=VALUE; settings are {', '.join(kinds)}")
        try:
            made: Any = float(value) if "float" in kinds[key] else int(value) if "int" in kinds[key] else value
        except ValueError:
            raise ValueError(f"selector {name!r}: {value!r} is not a number") from None
        if kinds[key] == "bool":
            made = value.lower() in ("1", "true", "yes")
        config = replace(config, **{key: made})
    return Selector(name, config, base in EVICTING)


def budget_tokens(text: str, n_context: int) -> int:
    """``512``, or ``1/13`` of the context in whole blocks.

    Raises
    ------
    ValueError
        It is neither.
    """
    numerator, _, denominator = text.partition("/")
    try:
        if not denominator:
            return int(numerator)
        return int(n_context * int(numerator) / int(denominator)) // 16 * 16
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"budget {text!r} is neither tokens nor a share of the context; use 512 or 1/13") from None
