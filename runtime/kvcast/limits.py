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
        Characters, classes and rules that it names, after repetitions are written out.
    grammar_ways : int
        Places of a grammar at which an answer may be at its next character.
    schema_depth, schema_parts : int
        Levels of a JSON schema, and its objects, lists and values.
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
    grammar_rules: int = 20_000
    grammar_depth: int = 64
    grammar_elements: int = 200_000
    grammar_ways: int = 20_000
    schema_depth: int = 64
    schema_parts: int = 10_000
    template_length: int = 128 << 10
    template_seconds: float = 5.0
    template_characters: int = 16 << 20

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            whole = field.type == "int"
            if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or not value > 0:
                raise ValueError(f"{field.name} is {value!r}; it must be a {'whole ' if whole else ''}number above 0")
