"""How sparse attention is run: one frozen dataclass, validated when it is made."""

from __future__ import annotations

import functools
import operator
import re
import warnings
from dataclasses import dataclass
from typing import Any, TypeVar

from .blocks import BLOCK_TOKENS
from .checks import BELOW_1, INT32_MAX, Check, flag, number, optional, shown, text, whole
from .errors import ArgumentError

GRAINS = (1, 4, BLOCK_TOKENS)
POOL_STEP = 256  # tokens: of the device path's budgets
PUBLISHED = ("quest", "streaming", "h2o", "snapkv")  # other methods, for evaluation
PREDICTORS = ("auto", "ema", "last", "window", "oracle", *PUBLISHED)


TOKENS_MAX = 1 << 30
_tokens = whole(-INT32_MAX, TOKENS_MAX)  # the least is said in a sentence of its own
_CHECKS: dict[str, Check] = {
    "budget": _tokens,
    "compression": optional(number(1.0, TOKENS_MAX)),
    "predictor": text,
    "predictor_device": text,
    "sink": _tokens,
    "window": _tokens,
    "hold": optional(whole(1, TOKENS_MAX)),
    "calibrate": text,
    "budget_allocation": text,
    "grain": whole(1, BLOCK_TOKENS),
    "dense_layers": whole(0, TOKENS_MAX),
    "min_recovery": number(0.0, BELOW_1),
    "trace": flag,
    "path": text,
    "prefetch": flag,
    "untested": flag,
    "exact": flag,
}


OLD_NAMES = {"budgets": "budget_allocation", "predictor_on": "predictor_device"}
_C = TypeVar("_C", bound=type)


def _deprecated(old: str, new: str, n_frames: int) -> None:
    warnings.warn(f"{old} of SparseConfig is now {new}", DeprecationWarning, stacklevel=n_frames + 1)


def _with_old_names(cls: _C) -> _C:
    """Fields can be given and read by their old names."""
    init = cls.__init__  # type: ignore[misc]

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **values: Any) -> None:
        for old, new in OLD_NAMES.items():
            if old in values:
                _deprecated(old, new, 2)
                if new in values:
                    raise ArgumentError(f"{old} is the old name of {new}; give one of them")
                values[new] = values.pop(old)
        init(self, *args, **values)

    cls.__init__ = __init__  # type: ignore[misc]
    for old, new in OLD_NAMES.items():
        setattr(cls, old, property(operator.attrgetter(new)))
    return cls


@_with_old_names
@dataclass(frozen=True, slots=True)
class SparseConfig:
    """Settings of sparse attention; the defaults are what the published figures were measured with.

    ``budgets``, ``predictor_on`` and ``calibrate="host:M"`` are older names, which work with a DeprecationWarning.

    Parameters
    ----------
    budget : int
        Tokens per KV head and layer that a step attends to, sink and window included; where budgets are spread
        (``budget_allocation``) in the mean over the model.
    compression : float or None
        Instead of ``budget``: the budget is context / compression, renewed at each selection.
    predictor : str
        ``auto`` (the network in the model's file, else ``onnx:stream``; ``ema`` without ONNX Runtime), ``ema`` (average of past
        block scores),
        ``last`` (scores of the last step), ``window`` (sink and window only),
        ``onnx:NAME`` (a network of predictor_onnx, or a path to one). For evaluation: ``oracle`` and ``quest`` (run each step twice,
        to see its true scores or its query), ``streaming``, ``h2o``, ``snapkv`` (published methods, simulated; ``kvcast eval``).
    predictor_device : str
        Where a network runs: ``cpu``, or ``cuda`` through ONNX Runtime's CUDA provider (onnxruntime-gpu), on a stream of its own;
        on the CPU, with a warning, where that cannot be used.
    sink, window : int
        First and most recent tokens that are always attended to.
    hold : int or None
        Steps for which a prediction is kept, and with it, unless ``calibrate`` is ``summary``, the set. None: 32 with a
        summary, where steps see for themselves, else 8.
    calibrate : str
        How blocks outside the set are seen. ``summary``: each step estimates the attention to every token from a summary
        of the keys and its own query, and chooses by that; costs host memory, 8 % of an f16 store.
        ``dense:M``: one step in M attends to everything and so renews every score. ``layers:M``: the same, one M-th of
        the layers at each step; on the device path computed on the host, beside the steps. ``off``. ``auto`` is ``summary`` on the
        host path and ``off`` on the device path, whose sets are a step old: there a single query says little (docs/device.md).
    budget_allocation : str
        ``spread`` (one total, given to the layers and KV heads where attention is predicted to be wide) or ``uniform``
        (the same for all). ``auto`` is ``uniform`` where steps choose single tokens, and ``spread`` elsewhere (docs/tuning.md).
    dense_layers : int
        The first layers, which attend to everything; they come on top of the budget.
    min_recovery : float
        When a step's estimated recovery is below this, the next one attends to everything; 0: never.
    trace : bool
        Keep the queries of each step, for ``Llama.attention_row``.
    path : str
        ``host``: attention on the CPU beside the store. ``device``: a pool of ``budget`` tokens on the device that computes the
        layers, filled from the store; ``hold`` is then the steps for which a set is kept (None: 8), and ``spread`` budgets are by
        layer, in steps of 256 tokens, fixed for a prompt. ``auto`` is ``host``.
    prefetch : bool
        Device path: predict, select and upload beside the step before; False does it between two steps.
    untested : bool
        Run families sparse, too, that no test covers (docs/coverage.md).
    grain : int
        Tokens that a step chooses together, where it chooses itself (``calibrate="summary"``): single ones (1), pieces of 4, or
        blocks of 16, which follow the forecast too. The budget is as many tokens in each case (docs/tuning.md).
    exact : bool
        Answers are those of dense attention: sparse steps draft some tokens, one dense batch checks them, and what it does not confirm is
        taken back (speculative decoding, arXiv 2211.17192, with the model as its own draft). Greedy answers are equal but where two tokens
        are as likely within rounding; sampled ones follow the dense distribution.

    Raises
    ------
    ArgumentError
        A value is of another type than it must be, or out of its range; the message names it and what would be right. It is a
        ValueError and a TypeError.
    """

    budget: int = 512
    compression: float | None = None
    predictor: str = "auto"
    predictor_device: str = "cpu"
    sink: int = 16
    window: int = 64
    hold: int | None = None
    calibrate: str = "auto"
    budget_allocation: str = "auto"
    dense_layers: int = 0
    min_recovery: float = 0.0
    trace: bool = False
    path: str = "auto"
    prefetch: bool = True
    untested: bool = False
    grain: int = 1
    exact: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.calibrate, str) and self.calibrate.startswith("host:"):
            _deprecated('calibrate="host:M"', 'calibrate="layers:M"', 4)
            object.__setattr__(self, "calibrate", "layers:" + self.calibrate.removeprefix("host:"))
        for name, check in _CHECKS.items():
            object.__setattr__(self, name, check(name, getattr(self, name)))
        for name in ("sink", "window"):
            value = getattr(self, name)
            if value < BLOCK_TOKENS or value % BLOCK_TOKENS:
                raise ArgumentError(f"{name} is {value} tokens; it must be a multiple of {BLOCK_TOKENS}, at least {BLOCK_TOKENS}")
        least = self.sink + self.window + BLOCK_TOKENS
        if self.budget < least:
            raise ArgumentError(
                f"budget is {self.budget} tokens; it must be at least {least}: sink ({self.sink}), window ({self.window}) "
                f"and one block of {BLOCK_TOKENS}"
            )
        if self.predictor not in PREDICTORS and not re.fullmatch("onnx:.+", self.predictor):
            raise ArgumentError(f"predictor is {shown(self.predictor)}; choose one of {', '.join(PREDICTORS)}, or onnx:NAME")
        if self.predictor_device not in ("cpu", "cuda"):
            raise ArgumentError(f"predictor_device is {shown(self.predictor_device)}; use 'cpu' or 'cuda'")
        if not re.fullmatch(r"auto|summary|off|(dense|layers):[1-9]\d{0,8}", self.calibrate, re.ASCII):
            raise ArgumentError(
                f"calibrate is {shown(self.calibrate)}; use 'auto', 'summary', 'dense:M' or 'layers:M' with M >= 1, or 'off'"
            )
        if self.budget_allocation not in ("auto", "spread", "uniform"):
            raise ArgumentError(f"budget_allocation is {shown(self.budget_allocation)}; use 'auto', 'spread' or 'uniform'")
        if self.grain not in GRAINS:
            raise ArgumentError(f"grain is {self.grain}; use 1, 4 or {BLOCK_TOKENS}")
        if self.path not in ("auto", "host", "device"):
            raise ArgumentError(f"path is {shown(self.path)}; use 'auto', 'host' or 'device'")
        if self.device:
            if self.budget % POOL_STEP:
                raise ArgumentError(f"budget is {self.budget} tokens; with path='device' it must be a multiple of {POOL_STEP}")
            if self.window < 2 * BLOCK_TOKENS:  # what leaves the window has to be complete in the store a step before
                raise ArgumentError(f"window is {self.window} tokens; with path='device' it must be at least {2 * BLOCK_TOKENS}")
            if self.calibrate == "summary":
                raise ArgumentError(
                    "calibrate='summary' is for path='host', where a step chooses for itself; use 'layers:M', 'dense:M' or 'off'"
                )
            if self.compression is not None or self.dense_layers:
                name = "dense_layers" if self.compression is None else "compression"
                raise ArgumentError(f"{name} does not go with path='device', whose pool is as large as the budget; leave it out")

    def budget_blocks(self, n_tokens: int) -> int:
        """Blocks per layer and KV head at a context of ``n_tokens``."""
        tokens = self.budget
        if self.compression is not None:
            tokens = max(self.sink + self.window + BLOCK_TOKENS, int(n_tokens / self.compression))
        return tokens // BLOCK_TOKENS

    @property
    def steps_held(self) -> int:
        """``hold``, or what None stands for."""
        return self.hold or (32 if self.summary else 8)

    @property
    def device(self) -> bool:
        """Whether the device path is meant."""
        return self.path == "device"

    @property
    def keeps_summary(self) -> bool:
        """Whether a summary of the keys is kept."""
        return self.calibrate in ("auto", "summary") and not self.device

    @property
    def summary(self) -> bool:
        """Whether steps choose blocks themselves; not where the predictor sees the step itself or wants nothing."""
        return self.keeps_summary and self.predictor not in ("oracle", "window", *PUBLISHED)

    @property
    def chooses_tokens(self) -> bool:
        """Whether steps choose single tokens, or pieces of a block."""
        return self.summary and self.grain < BLOCK_TOKENS

    @property
    def allocation(self) -> str:
        """``spread`` or ``uniform``: ``budget_allocation``, or what ``auto`` stands for."""
        if self.budget_allocation != "auto":
            return self.budget_allocation
        return "uniform" if self.chooses_tokens else "spread"

    @property
    def calibrate_every(self) -> int:
        """M of ``dense:M`` and ``layers:M``, else 0."""
        return int(self.calibrate.partition(":")[2] or 0)
