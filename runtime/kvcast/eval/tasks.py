"""RULER-style tasks: structure, parameters and metric of RULER's published configuration (Hsieh et al. 2024, arXiv 2404.06654), in words of
our own. Scores are compared with our own dense runs, not with published tables.

A sample is made from (task, seed, index) alone; its length from what fits the limit.
"""

from __future__ import annotations

import itertools
import json
import random
import re
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

from ..errors import KvcastError
from ..extras import install_line

FILLER = "The harbour lay quiet. A grey boat was tied to the pier. Nobody came down to the water. Later the wind turned."
DEPTHS = [100 * i / 39 for i in range(40)]  # percent


@dataclass(frozen=True, slots=True)
class Sample:
    """A question about a document, and what a right answer contains.

    Parameters
    ----------
    task : str
    document : str
        Instruction and context.
    question : str
    prefix : str
        The start of the answer, put after the chat template.
    references : tuple of str
        The score is the share of them that the answer contains, upper or lower case.
    n_generate : int
        Tokens of the longest answer.
    """

    task: str
    document: str
    question: str
    prefix: str
    references: tuple[str, ...]
    n_generate: int

    def score(self, answer: str) -> float:
        """0 to 1."""
        answer = answer.lower()
        return sum(r.lower() in answer for r in self.references) / len(self.references)


@dataclass(frozen=True, slots=True)
class Task:
    """How samples of a kind are made.

    Parameters
    ----------
    make : callable (rng, n_units, haystack sentences, limit in tokens) -> (document, question, prefix, references)
        Larger ``n_units``, longer document; the same rng gives the same keys.
    n_generate : int
    """

    make: Callable[[random.Random, int, Sequence[str], int], tuple[str, str, str, list[str]]]
    n_generate: int


def sentences(text: str) -> list[str]:
    """Of prose."""
    return [s for s in re.split(r"(?<=[.!?])\s+", " ".join(text.split())) if s]


def sample(task: str, seed: int, index: int, limit: int, haystack: Sequence[str], n_tokens: Callable[[Sample], int]) -> Sample:
    """A sample of which ``n_tokens`` (its prompt) and the answer fill ``limit`` tokens: to 1 %, or to one unit of the task.

    Raises
    ------
    KvcastError
        Even the shortest is longer.
    """
    spec = TASKS[task]

    def make(n_units: int) -> tuple[Sample, int]:
        parts = spec.make(random.Random(f"{task}:{seed}:{index}"), n_units, haystack, limit)
        made = Sample(task, *parts[:3], tuple(parts[3]), spec.n_generate)
        return made, limit - spec.n_generate - n_tokens(made)

    low, high = 1, limit
    best, room = make(low)
    if room < 0:
        raise KvcastError(f"{task} does not fit {limit} tokens; take a larger --context")
    n_probe = 16
    while high - low > 1 and room > limit // 100:
        probe, left = make(n_probe)
        per_unit = max(1.0, (room - left) / (n_probe - low))
        if left < 0:
            high = n_probe
        else:
            best, low, room = probe, n_probe, left
        n_probe = min(max(low + int(room / per_unit), low + 1), high - 1)
    return best


# ---- words


@cache
def words(kind: str) -> list[str]:
    """Nouns or adjectives, one word of letters each."""
    try:
        from wonderwords import RandomWord
    except ImportError:
        raise KvcastError(f"the tasks need the package wonderwords; {install_line('eval')}") from None
    found = RandomWord().filter(include_categories=[kind], regex="[a-z]+")
    return sorted(set(found))


def key(rng: random.Random) -> str:
    return f"{rng.choice(words('adjective'))}-{rng.choice(words('noun'))}"


def number(rng: random.Random) -> str:
    return str(rng.randrange(10**6, 10**7))


def uuid4(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def distinct(make: Callable[[random.Random], str], rng: random.Random, n: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < n:
        found[make(rng)] = None
    return list(found)


def listed(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


# ---- needles in a haystack


def needles(
    haystack: str, make_key=key, make_value=number, n_keys: int = 1, n_values: int = 1, n_asked: int = 1
) -> Callable[[random.Random, int, Sequence[str], int], tuple[str, str, str, list[str]]]:
    """haystack: ``filler``, ``prose``, or ``needles`` (distractors)."""

    def make(rng, n_units, prose, limit):
        keys = distinct(make_key, rng, n_keys)
        values = {k: distinct(make_value, rng, n_values) for k in keys}
        facts = [f"The vault code of {k} is {v}." for k in keys for v in values[k]]
        rng.shuffle(facts)
        asked = rng.sample(keys, n_asked)
        if haystack == "prose":
            units = [prose[i % len(prose)] for i in range(n_units)]
            depths = sorted(rng.sample(DEPTHS, len(facts)))
            places = [int(len(units) * d / 100) for d in depths]
        elif haystack == "filler":
            units = [FILLER] * n_units
            places = sorted(rng.randrange(n_units + 1) for _ in facts)
        else:
            place = rng.random()
            others = distinct(make_key, rng, n_units + n_keys)
            units = [f"The vault code of {k} is {make_value(rng)}." for k in others if k not in keys][:n_units]
            places = [int(place * (n_units + 1))] * len(facts)
        for place, fact in reversed(list(zip(places, facts))):
            units.insert(place, fact)
        text = ("\n" if haystack != "prose" else " ").join(units)
        if len(facts) > 1 or haystack == "needles":
            instruction = "Vault codes are hidden in the text below. Remember them, you will be asked for some of them."
        else:
            instruction = "A vault code is hidden in the text below. Remember it, you will be asked for it."
        document = f"{instruction}\n\n{text}"
        if n_asked * n_values > 1:
            question = f"What are all the vault codes of {listed(asked)} that the text gives?"
            prefix = f"The vault codes of {listed(asked)} in the text are"
        else:
            question = f"What is the vault code of {asked[0]} that the text gives?"
            prefix = f"The vault code of {asked[0]} in the text is"
        return document, question, prefix, [v for k in asked for v in values[k]]

    return make


def passkey(rng, n_units, prose, limit):
    secret = str(rng.randrange(10**4, 10**5))
    units = [FILLER] * n_units
    units.insert(rng.randrange(n_units + 1), f"The pass key is {secret}. Remember it: {secret} is the pass key.")
    document = "A pass key is hidden in the text below. Find it and remember it.\n\n" + "\n".join(units)
    return document, "What is the pass key?", "The pass key is", [secret]


def pairs(rng, n_units, prose, limit):
    place = rng.random()
    made = {uuid4(rng): uuid4(rng) for _ in range(n_units)}
    asked = list(made)[int(place * n_units)]
    document = "Below is a JSON object. You will be asked for the value of one of its keys.\n\n" + json.dumps(made, indent=1)
    return document, f'What is the value of the key "{asked}" in the JSON object?', f'The value of "{asked}" is "', [made[asked]]


# ---- chains and counts


def chain(rng: random.Random, n: int, value: str) -> tuple[list[str], list[str]]:
    """Assignments of n variables, one from the other, and their names."""
    names = distinct(lambda r: "".join(r.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=5)), rng, n)
    return [f"VAR {names[0]} = {value}", *(f"VAR {b} = VAR {a}" for a, b in itertools.pairwise(names))], names


def hidden(lines: list[str], units: list[str], rng: random.Random) -> str:
    units = list(units)
    for place, line in reversed(list(zip(sorted(rng.randrange(len(units) + 1) for _ in lines), lines))):
        units.insert(place, line)
    return "\n".join(units)


def variables(rng, n_units, prose, limit):
    def ask(value):
        return f"Which variables have the value {value}, first or by way of others? List all of them."

    def begin(value, n):
        return f"By the assignments in the text, {n} variables have the value {value}:"

    instruction = "Variable assignments are hidden in the text below. Follow them from variable to variable."
    values = [str(rng.randrange(10**4, 10**5 - 1)) for _ in range(2)]
    shown, shown_names = chain(rng, 3, values[0])
    lines, names = chain(rng, 5, values[1])
    example = f"{instruction}\n\n{hidden(shown, [FILLER] * 4, rng)}\n\n{ask(values[0])}\n{begin(values[0], 3)} {', '.join(shown_names)}"
    document = f"{example}\n\n{instruction}\n\n{hidden(lines, [FILLER] * n_units, rng)}"
    return document, ask(values[1]), begin(values[1], 5), names


def numbered(counts: dict[str, int], rng: random.Random) -> str:
    found = [w for w, n in counts.items() for _ in range(n)]
    rng.shuffle(found)
    return " ".join(f"{i}. {w}" for i, w in enumerate(found, 1))


def common(rng, n_units, prose, limit):
    often, rare = (30, 3) if limit >= 4096 else (6, 1)
    pool = rng.sample(words("noun") + words("adjective"), 40)
    vocabulary = [w for w in words("noun") + words("adjective") if w not in pool]
    rng.shuffle(vocabulary)
    asked = vocabulary[:10]
    instruction = "Below is a numbered list of words. Some occur often, most only a few times. Remember those that occur most often."
    question = "Which 10 words occur most often in the list?"
    prefix = "The 10 words that occur most often are:"
    shown = numbered({w: 10 if i < 10 else 3 for i, w in enumerate(pool)}, rng)
    shown_answer = " ".join(f"{i}. {w}" for i, w in enumerate(pool[:10], 1))
    n = min(n_units, len(vocabulary) - 10)
    text = numbered({**{w: often for w in asked}, **{w: rare for w in vocabulary[10 : 10 + n]}}, rng)
    document = f"{instruction}\n\n{shown}\n\n{question}\n{prefix} {shown_answer}\n\n{instruction}\n\n{text}"
    return document, question, prefix, asked


def frequent(rng, n_units, prose, limit):
    letters = "abcdefghijklmnopqrstuvwxyz"
    coded = distinct(lambda r: "".join(r.choices(letters, k=6)), rng, max(10, limit // 50))
    weights = [(i + 1) ** -2.0 for i in range(len(coded))]
    counts = [max(1, round(n_units * w / sum(weights))) for w in weights]
    found = ["..." if i == 0 else w for i, (w, n) in enumerate(zip(coded, counts)) for _ in range(n)]
    rng.shuffle(found)
    document = "Below is a text of coded words. Keep track of how often each occurs; the dots '...' are noise.\n\n" + " ".join(found)
    question = "Which three coded words occur most often, the dots aside?"
    return document, question, "The three coded words that occur most often are:", coded[1:4]


TASKS: dict[str, Task] = {
    "niah_single_1": Task(needles("filler"), 128),
    "niah_single_2": Task(needles("prose"), 128),
    "niah_single_3": Task(needles("prose", make_value=uuid4), 128),
    "niah_multikey_1": Task(needles("prose", n_keys=4), 128),
    "niah_multikey_2": Task(needles("needles"), 128),
    "niah_multikey_3": Task(needles("needles", uuid4, uuid4), 128),
    "niah_multivalue": Task(needles("prose", n_values=4), 128),
    "niah_multiquery": Task(needles("prose", n_keys=4, n_asked=4), 128),
    "vt": Task(variables, 30),
    "cwe": Task(common, 120),
    "fwe": Task(frequent, 50),
    "passkey": Task(passkey, 32),
    "kv": Task(pairs, 128),
}
RULER = tuple(list(TASKS)[:11])
