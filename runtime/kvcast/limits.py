"""What is taken of texts from outside before it is refused, all in one place."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on what comes from requests and from model files; ``Llama(limits=...)``, and ``limits`` of a model in the server's file.

    Parameters
    ----------
    text_bytes : int
        A text that is made into tokens at once.
    grammar_bytes : int
        A grammar, in UTF-8; one that a JSON schema becomes, too.
    grammar_rules : int
        Its rules; each group in parentheses is one.
    grammar_depth : int
        Parentheses inside each other.
    grammar_elements : int
        Characters, ranges and rules that it names, after repetitions are written out. One element takes 8 bytes, three times.
    grammar_ways : int
        Places of a grammar at which an answer may be at its next character.
    schema_depth, schema_parts : int
        Schemas inside each other, and schemas in a JSON schema; one that is referred to counts once.
    template_length : int
        Of a file's chat templates together.
    template_seconds : float
        Of processor time, to write the messages with it.
    template_characters : int
        That it may make while it does, and 64 times those of the messages; a value in a list counts as 8.

    Raises
    ------
    ValueError
        One is not a number above 0.
    """

    text_bytes: int = 16 << 20
    grammar_bytes: int = 256 << 10
    grammar_rules: int = 10_000
    grammar_depth: int = 100
    grammar_elements: int = 300_000
    grammar_ways: int = 1_000
    schema_depth: int = 64
    schema_parts: int = 5_000
    template_length: int = 128 << 10
    template_seconds: float = 5.0
    template_characters: int = 16 << 20

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            whole = field.type == "int"
            if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or not value > 0:
                raise ValueError(f"{field.name} is {value!r}; it must be a {'whole ' if whole else ''}number above 0")
