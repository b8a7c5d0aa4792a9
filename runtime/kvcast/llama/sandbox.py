"""Chat templates, which come with model files of strangers: rendered by Jinja, within bounds of time and memory.

Jinja's sandbox keeps a template from Python's insides; it may still loop, repeat and nest for ever. Here every statement looks at the
clock, and whatever makes a text or a list counts what it makes, before it does where that can be many times what is there. A template has
the filters and methods that chat templates use, and no others.
"""

from __future__ import annotations

import functools
import itertools
import re
import threading
import time
import types
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, ValuesView
from contextlib import contextmanager
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, CompilerExit, Frame, operators
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

from ..limits import Limits

PER_GIVEN = 64  # characters that it may make of each that it is given
PER_VALUE = 8  # characters that a value in a list counts as
DEPTH = 500  # of lists inside each other
BITS = 4096  # of a whole number
FILTERS = {
    "abs", "attr", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float", "format", "indent", "int", "items",
    "join", "last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr", "replace", "reverse", "round", "safe", "select",
    "selectattr", "sort", "string", "sum", "title", "tojson", "trim", "truncate", "unique", "upper", "wordcount",
}  # fmt: skip
LOOK_ONLY = {  # filters that neither compare nor write what they get, and tests
    "filter": {
        "attr", "count", "d", "default", "first", "items", "last", "length", "list", "map", "reject", "rejectattr", "reverse", "select",
        "selectattr",
    },
    "test": {
        "boolean", "callable", "defined", "false", "filter", "float", "integer", "iterable", "mapping", "none", "number", "sameas",
        "sequence", "string", "test", "true", "undefined",
    },
}  # fmt: skip
METHODS: dict[type, set[str]] = {
    str: {
        "capitalize", "count", "endswith", "find", "format", "index", "isalnum", "isalpha", "isdigit", "islower", "isspace", "isupper",
        "join", "lower", "lstrip", "partition", "removeprefix", "removesuffix", "replace", "rfind", "rindex", "rpartition", "rsplit",
        "rstrip", "split", "splitlines", "startswith", "strip", "swapcase", "title", "upper",
    },
    dict: {"copy", "get", "items", "keys", "values"},
    list: {"copy", "count", "index"},
    tuple: {"count", "index"},
    int: set(),
    float: set(),
    bytes: set(),
    range: set(),
}  # fmt: skip
_WIDE = re.compile(r"[0-9]{4}|\*|:[^{}]*\{")  # widths of a format, in itself or from a value
Chars = int
Container = list | tuple | dict | set | frozenset | KeysView | ValuesView | ItemsView | Namespace


class OverLimit(Exception):
    """A template wants more than it may have."""


class _Work(threading.local):
    """What is left of a rendering, of this thread."""

    characters: Chars = 1 << 20
    end: float = float("inf")
    failed = False


class Environment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with bounds; inside ``bounded``.

    Parameters
    ----------
    limits : Limits
    """

    code_generator_class: type[CodeGenerator]  # set below
    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "%", "**"))

    def __init__(self, limits: Limits):
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[Jinja2ChatFormatter.IgnoreGenerationTags, "jinja2.ext.loopcontrols"],
            finalize=self.written,
        )
        self._limits = limits
        self._work = _Work()
        self.globals = {name: self.globals[name] for name in ("range", "dict", "namespace", "cycler", "joiner")}
        self.filters = {name: self._bounded("filter", name, self.filters[name]) for name in FILTERS - {"tojson"}}
        self.filters["tojson"] = self._bounded("filter", "tojson", Jinja2ChatFormatter.tojson)  # type: ignore[arg-type]
        self.tests = {name: self._bounded("test", name, test) for name, test in self.tests.items()}  # type: ignore[arg-type]

    @contextmanager
    def bounded(self, given: Any) -> Iterator[None]:
        """A rendering of what is given.

        Raises
        ------
        OverLimit
            It went too far.
        """
        work = self._work
        work.characters, work.end, work.failed = 1 << 40, float("inf"), False
        work.characters = self._limits.template_characters + PER_GIVEN * self.size(given)[0]
        work.end = time.thread_time() + self._limits.template_seconds
        try:
            yield
            if work.failed:  # Jinja passes over errors in constants
                raise OverLimit
        finally:
            work.characters, work.end = 1 << 20, float("inf")

    # ---- counting

    def tick(self, n: Chars = 0) -> None:
        """Look at the clock, and count characters that are about to be made."""
        work = self._work
        work.characters -= n
        if work.characters < 0 or time.thread_time() > work.end:
            work.failed = True
            raise OverLimit

    def size(self, value: Any) -> tuple[Chars, int]:
        """Characters that writing it out takes, about, and its depth; what is in it twice counts twice."""
        total, deepest = 0, 0
        most = self._work.characters
        to_see = [(value, 1)]
        while to_see:
            value, depth = to_see.pop()
            deepest = max(deepest, depth)
            if isinstance(value, str | bytes):
                total += len(value)
            elif isinstance(value, dict):
                total += PER_VALUE
                to_see += [(inner, depth + 1) for pair in value.items() for inner in pair]
            elif isinstance(value, Namespace):
                to_see.append((value._Namespace__attrs, depth + 1))  # type: ignore[attr-defined]
            elif isinstance(value, Container):
                total += PER_VALUE
                to_see += [(inner, depth + 1) for inner in value]  # type: ignore[union-attr]
            else:
                total += PER_VALUE
            if total > most or deepest > DEPTH or len(to_see) > most:
                self._work.failed = True
                raise OverLimit
        return total, deepest

    def weighed(self, value: Any) -> Any:
        """A value that is to be compared or written: it may hold itself many times over."""
        self.tick()
        if isinstance(value, Container):
            self.size(value)
        return value

    def made(self, value: Any) -> Any:
        """A value that is new."""
        self.tick(_new(value))
        return value

    def written(self, value: Any) -> str:
        """A value as it is written into the text."""
        text = value if isinstance(value, str) else str(self.weighed(value))
        self.tick(len(text))
        return text

    def _before_format(self, text: str, values: Any) -> None:
        if _WIDE.search(text):
            raise jinja2.TemplateRuntimeError("a format has a width of four digits or more, or one that is a value")
        self.tick(len(text) + (text.count("%") + text.count("{")) * self.size(values)[0])

    # ---- what Jinja asks

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self.tick()
        if operator == "%" and isinstance(left, str):
            self._before_format(left, right)
        elif operator == "*" and isinstance(left, int) != isinstance(right, int):
            times, what = (left, right) if isinstance(left, int) else (right, left)
            if isinstance(times, int) and not isinstance(what, float):
                self.tick(max(0, times) * _new(what))
        elif operator == "+" and not isinstance(left, int | float):
            self.tick(_new(left) + _new(right))
        elif operator == "**" and isinstance(left, int) and isinstance(right, int) and right * left.bit_length() > BITS:
            raise OverLimit
        value = super().call_binop(context, operator, left, right)
        if isinstance(value, int) and value.bit_length() > BITS:
            raise OverLimit
        return value

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        self = __self
        self.tick()
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str):
            self._before_method(owner, __obj.__name__, args, kwargs)
        elif not isinstance(__obj, Macro | type):
            self.size((args, kwargs))
            if isinstance(owner, list | tuple):
                self.size(owner)
        return self.made(super().call(__context, __obj, *args, **kwargs))

    def _before_method(self, text: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if name == "replace" and len(args) > 1:
            self._before_replace(text, args[0], args[1])
        elif name == "join" and args:
            if not isinstance(args[0], str | list | tuple | dict):
                raise jinja2.TemplateRuntimeError("join takes a list here; use the filter join")
            self.tick(self.size(args[0])[0] + len(text) * len(args[0]))
        elif name in ("split", "rsplit", "splitlines"):
            by = next((arg for arg in (*args, *kwargs.values()) if isinstance(arg, str) and arg), None)
            self.tick(PER_VALUE * (text.count(by) if by else len(text) // 2))

    def _before_replace(self, text: str, old: Any, new: Any) -> None:
        self.tick(len(text) + text.count(str(old)) * len(str(new)))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        inner = super().wrap_str_format(value)
        if inner is None:
            return None

        def bounded(*args: Any, **kwargs: Any) -> str:
            self._before_format(value.__self__, (args, kwargs))
            return inner(*args, **kwargs)

        return bounded

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        for kind, known in METHODS.items():
            if isinstance(obj, kind):
                return attr in known
        return super().is_safe_attribute(obj, attr, value)

    def _bounded(self, kind: str, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter or a test that counts."""
        n_own = 1 if hasattr(function, "jinja_pass_arg") else 0  # arguments that are Jinja's
        before: Callable[..., Any] | None = getattr(self, f"_before_{kind}_{name}", None)
        looks_only = name in LOOK_ONLY[kind]

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            self.tick()
            own, args = args[:n_own], args[n_own:]
            if not looks_only:
                if not isinstance(args[0], str | int | float | list | tuple | dict | jinja2.Undefined | None):
                    args = (_items(args[0], self._work.characters // PER_VALUE), *args[1:])
                self.size((args, kwargs))
            if before is not None:
                before(*args, **kwargs)
            return self.made(function(*own, *args, **kwargs))

        return call

    def _before_filter_join(self, value: Any, d: Any = "", attribute: Any = None) -> None:
        self.tick(self.size(value)[0] + len(str(d)) * _length(value))

    def _before_filter_replace(self, s: Any, old: Any, new: Any, count: Any = None) -> None:
        self._before_replace(str(s), old, new)

    def _before_filter_indent(self, s: Any, width: Any = 4, first: bool = False, blank: bool = False) -> None:
        n = width if isinstance(width, int) else len(str(width))
        self.tick(len(str(s)) + max(0, n) * (str(s).count("\n") + 1))

    def _before_filter_tojson(
        self, x: Any, ensure_ascii: Any = False, indent: Any = None, separators: Any = None, sort_keys: Any = False
    ) -> None:
        n, depth = self.size(x)
        wide = indent if isinstance(indent, int) else len(str(indent or ""))
        if n * (1 + depth * max(0, wide)) * (1 + len("".join(map(str, separators or ())))) > PER_GIVEN * self._work.characters:
            raise OverLimit

    def _before_filter_format(self, value: Any, *args: Any, **kwargs: Any) -> None:
        self._before_format(str(value), (args, kwargs))

    def _before_filter_round(self, value: Any, precision: Any = 0, method: Any = "common") -> None:
        if not isinstance(precision, int) or not -50 <= precision <= 50:
            raise jinja2.TemplateRuntimeError("round takes a precision of at most 50")

    def _before_filter_int(self, value: Any, default: Any = 0, base: Any = 10) -> None:
        if isinstance(value, str) and len(value) > 1000:
            raise jinja2.TemplateRuntimeError("int takes a text of at most 1,000 characters")

    def _before_filter_sum(self, iterable: Any, attribute: Any = None, start: Any = 0) -> None:
        if attribute is not None or not all(isinstance(value, int | float) for value in (start, *iterable)):
            raise jinja2.TemplateRuntimeError("sum takes a list of numbers")

    def _before_filter_list(self, value: Any) -> None:
        self.tick(PER_VALUE * _length(value))


class _Generator(CodeGenerator):
    """Jinja's compiler; what it makes of a template counts."""

    def blockvisit(self, nodes: Iterable[nodes.Node], frame: Frame) -> None:
        try:
            self.writeline("pass")
            for node in nodes:
                self.writeline(f"environment.tick({_written_by(node)})")
                self.visit(node, frame)
        except CompilerExit:
            pass

    def _through(self, method: str, visit: Callable[..., None], node: nodes.Node, frame: Frame) -> None:
        self.write(f"environment.{method}(")
        visit(node, frame)
        self.write(")")

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        self._through("made", super().visit_List, node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        self._through("made", super().visit_Dict, node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        if node.ctx == "load":
            self._through("weighed", super().visit_Tuple, node, frame)
        else:
            super().visit_Tuple(node, frame)

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:
        if isinstance(node.arg, nodes.Slice):
            self._through("made", super().visit_Getitem, node, frame)
        else:
            super().visit_Getitem(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.made((markup_join if context.eval_ctx.autoescape else str_join)((")
        for part in node.nodes:
            self._through("weighed", self.visit, part, frame)
            self.write(", ")
        self.write(")))")

    def visit_Compare(self, node: nodes.Compare, frame: Frame) -> None:
        self.write("(")
        self._through("weighed", self.visit, node.expr, frame)
        for operand in node.ops:
            self.write(f" {operators[operand.op]} ")
            self._through("weighed", self.visit, operand.expr, frame)
        self.write(")")


Environment.code_generator_class = _Generator


def _new(value: Any) -> Chars:
    """What a new value adds to what is there already."""
    if isinstance(value, str | bytes):
        return len(value)
    return PER_VALUE * len(value) if isinstance(value, list | tuple | dict | set | frozenset) else 0


def _length(value: Any) -> int:
    return len(value) if hasattr(value, "__len__") else 0


def _items(value: Any, most: int) -> Any:
    """What a generator gives, as a list; anything else as it is."""
    if not isinstance(value, types.GeneratorType | map | filter | zip | reversed):
        return value
    items = list(itertools.islice(value, most + 1))
    if len(items) > most:
        raise OverLimit
    return items


def _written_by(node: nodes.Node) -> Chars:
    """The characters of the template itself that a statement writes."""
    return sum(len(part.data) for part in node.nodes if isinstance(part, nodes.TemplateData)) if isinstance(node, nodes.Output) else 0
