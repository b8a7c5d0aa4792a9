"""Training data: documents to record, and samples from recordings (``recording``).

Documents are made from what every machine with Python has (sources and documentation of the standard library, tables),
from the novel in scripts/, and generated: logs, conversations, and retrieval prompts, where attention jumps.
"""

from __future__ import annotations

import html.entities
import importlib
import inspect
import pydoc
import random
import unicodedata
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kvcast.blocks import BLOCK_TOKENS

from .features import DECAYS
from .recording import Trace, decode

SOURCES = ("argparse", "ast", "inspect", "typing", "subprocess", "tarfile", "unittest.mock", "pathlib")
REFERENCES = ("os", "socket", "email.message", "logging")
HELD_OUT = ("source:pathlib", "novel:2", "pairs:2", "needles:2", "chains:2", "table:entities", "log:1", "talk:1")
HORIZON = 8  # steps whose mean is the target


def document(name: str) -> str:
    """A document of the corpus, the same on every machine with the same Python: ``source:MODULE``, ``reference:MODULE``,
    ``novel:0`` to ``2``, ``table:unicode``, ``table:entities``, and for any number N ``pairs:N``, ``needles:N``, ``chains:N``,
    ``log:N``, ``talk:N``.

    Raises
    ------
    ValueError
        There is no such document.
    """
    kind, _, which = name.partition(":")
    if kind in ("novel", "needles"):
        novel()  # says itself where it is to be found
    generated = {"pairs": pairs, "needles": needles, "chains": chains, "log": log, "talk": talk}
    try:
        if kind in generated:
            return generated[kind](int(which))
        if kind == "source":
            return inspect.getsource(importlib.import_module(which))
        if kind == "reference":
            return pydoc.plain(pydoc.render_doc(which))
        if kind == "novel":
            text = novel()
            return text[int(which) * (len(text) // 3) :] + text[: int(which) * (len(text) // 3)]
        return {"table:unicode": unicode_table, "table:entities": entity_table}[name]()
    except (ValueError, KeyError, ImportError, TypeError, OSError) as error:
        raise ValueError(f"the corpus has no document {name!r}; it has {', '.join(NAMES)}") from error


NAMES = (
    *(f"source:{name}" for name in SOURCES),
    *(f"reference:{name}" for name in REFERENCES),
    *(f"novel:{i}" for i in range(3)),
    "table:unicode",
    "table:entities",
    *(f"{kind}:{seed}" for seed in range(3) for kind in ("pairs", "needles", "chains")),
    *(f"{kind}:{seed}" for seed in range(2) for kind in ("log", "talk")),
)


def novel() -> str:
    """Jane Austen, Northanger Abbey, from a checkout's ``scripts``."""
    path = Path(__file__).resolve().parent.parent / "scripts" / "demo.txt"
    if not path.is_file():
        raise ValueError(f"the corpus needs {str(path)!r}, which comes with a checkout of kvcast; give documents of your own with --text")
    return path.read_text(encoding="utf-8")


def unicode_table() -> str:
    return "".join(f"{c:5d} | {unicodedata.name(chr(c), '-'):50s} | {chr(c)}\n" for c in range(0x100, 0x600))


def entity_table() -> str:
    return "".join(f"{k}\t{v!r}\t{ord(v[0])}\n" for k, v in sorted(html.entities.html5.items())[:900])


def is_retrieval(name: str) -> bool:
    """Whether the questions are at the end of the document, so that a shorter context must cut its beginning."""
    return name.startswith(("pairs", "needles", "chains"))


def pairs(seed: int, n: int = 70) -> str:
    """A JSON-like list of uuid to uuid, then questions answered by copying."""
    rng = random.Random(seed)
    made = [(str(uuid.UUID(int=rng.getrandbits(128))), str(uuid.UUID(int=rng.getrandbits(128)))) for _ in range(n)]
    text = "{\n" + "".join(f' "{k}": "{v}",\n' for k, v in made) + "}\n"
    return text + "".join(f'The value of "{k}" is "{v}".\n' for k, v in rng.sample(made, min(n, 40)))


def needles(seed: int) -> str:
    """Numbers hidden in prose, then asked for."""
    rng = random.Random(seed)
    words = ["amber", "copper", "violet", "granite", "willow", "falcon", "harbor", "meadow", "lantern", "orchid"]
    facts = [(f"{w}-{rng.randrange(100)}", rng.randrange(10**6, 10**7)) for w in words]
    sentences = novel().replace("\n", " ").split(". ")[: 220 + 10 * seed]
    for word, number in facts:
        sentences.insert(rng.randrange(len(sentences)), f"The secret number of {word} is {number}")
    questions = [f"The secret number of {w} is {n}." for w, n in rng.sample(facts * 3, 30)]
    return ". ".join(sentences) + ".\n" + "\n".join(questions)


def chains(seed: int) -> str:
    """Variables assigned from one another, then printed."""
    rng = random.Random(seed)
    lines, values = [], {}
    for i in range(420):
        name = f"v{rng.randrange(10**5)}"
        if i < 20 or rng.random() < 0.3:
            values[name] = rng.randrange(10**4, 10**5)
            lines.append(f"{name} = {values[name]}")
        else:
            other = rng.choice(list(values))
            values[name] = values[other]
            lines.append(f"{name} = {other}")
    lines += [f"print({n})  # {values[n]}" for n in rng.sample(list(values), 100)]
    return "\n".join(lines)


def log(seed: int) -> str:
    """A web server's log, with sessions that come back."""
    rng = random.Random(seed)
    users = [(f"10.{rng.randrange(256)}.{rng.randrange(256)}.{rng.randrange(256)}", f"{rng.getrandbits(48):012x}") for _ in range(40)]
    paths = [f"/{a}/{b}" for a in ("api", "static", "docs") for b in ("items", "login", "search", "app.js", "intro.html", "cart")]
    lines, second = [], 0
    for _ in range(260):
        second += rng.randrange(5)
        address, session = rng.choice(users)
        time = f"{second // 3600:02d}:{second // 60 % 60:02d}:{second % 60:02d}"
        status, took = rng.choice([200, 200, 200, 304, 404, 500]), rng.randrange(3, 900)
        lines.append(f"2024-05-17 {time} {address} session={session} GET {rng.choice(paths)} {status} {took}ms")
    return "\n".join(lines)


def talk(seed: int) -> str:
    """A conversation: questions about functions, answered from their documentation, some asked again later."""
    rng = random.Random(seed)
    known = [(f"{m}.{n}", d) for m in ("itertools", "shutil", "statistics", "textwrap", "heapq", "random") for n, d in _documented(m)]
    turns = rng.sample(known, min(45, len(known)))
    turns += rng.sample(turns, 12)
    return "\n".join(f"<|im_start|>user\nWhat does {n} do?<|im_end|>\n<|im_start|>assistant\n{d}<|im_end|>" for n, d in turns)


def _documented(module: str) -> Iterator[tuple[str, str]]:
    for name, member in sorted(vars(importlib.import_module(module)).items()):
        text = inspect.getdoc(member) if callable(member) and not name.startswith("_") else None
        if text and 80 < len(text) < 1500:
            yield name, text


@dataclass(frozen=True, slots=True)
class Sample:
    """What was known before a step, and what came true; float32, only the blocks between sink and window.

    averages (n_rows, 5, n_middle); target (n_rows, n_middle): mean true score of the next ``HORIZON`` steps; now and estimate
    (n_rows, n_middle): true score of the next step, and the estimate from the summary of keys that the loop made in it.
    """

    averages: npt.NDArray[np.float32]
    target: npt.NDArray[np.float32]
    now: npt.NDArray[np.float32]
    estimate: npt.NDArray[np.float32]
    rows: npt.NDArray[np.float32] | None  # (n_rows, 64, n_blocks_used) for ``Paper``, sink and window included
    middle: slice


def samples(trace: Trace, every: int = 8, n_rows_kept: int = 0) -> list[Sample]:
    """Roll the history over a recording as the runtime does; a sample every so many steps.

    Parameters
    ----------
    n_rows_kept : int
        Steps of raw scores for ``Paper``; 0 for none.
    """
    config, n_context = trace.about["config"], trace.about["n_context"]
    decays = np.array(DECAYS, np.float32)[None, :, None]
    truth = decode(trace.truth)
    averages = np.zeros((truth.shape[1], len(DECAYS), truth.shape[2]), np.float32)
    rows = list(truth[: trace.n_primed])
    for row in rows:
        averages = decays * averages + (1 - decays) * row[:, None]
    found = []
    steps = truth[trace.n_primed :]
    for i in range(len(steps)):
        if i % every == 0 and i + HORIZON <= len(steps):
            n_used = (n_context + i) // BLOCK_TOKENS + 1
            middle = slice(config["sink"] // BLOCK_TOKENS, n_used - config["window"] // BLOCK_TOKENS)
            found.append(
                Sample(
                    averages[:, :, middle].copy(),
                    steps[i : i + HORIZON, :, middle].mean(0),
                    steps[i, :, middle],
                    decode(trace.estimate[i, :, middle]),
                    np.stack(rows[-n_rows_kept:], 1)[:, :, :n_used] if n_rows_kept else None,
                    middle,
                )
            )
        attended = trace.seen[i] != 0
        seen = decode(trace.seen[i])
        averages = np.where(attended[:, None], decays * averages + (1 - decays) * seen[:, None], averages)
        if n_rows_kept:
            rows = [*rows[-n_rows_kept:], np.where(attended, seen, rows[-1])]
    return found
