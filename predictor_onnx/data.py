"""Training data: what the runtime observed at each selection, and what attention then did.

Documents are made from what every machine with Python has (sources and documentation of the standard library, tables),
from the novel in scripts/, and from generated retrieval prompts, where attention jumps.
"""

from __future__ import annotations

import html.entities
import importlib
import inspect
import pydoc
import random
import unicodedata
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from kvcast import Llama
from kvcast.evaluate import true_scores
from kvcast.native import BLOCK_TOKENS

SOURCES = ("argparse", "ast", "inspect", "typing", "subprocess", "tarfile", "unittest.mock", "pathlib")
REFERENCES = ("os", "socket", "email.message", "logging")
HORIZON = 8  # steps whose mean is the target

Sample = tuple[np.ndarray, np.ndarray]


def documents(prose: str) -> Iterator[tuple[str, str]]:
    """Names and texts; the same on every machine with the same Python."""
    for name in SOURCES:
        yield f"source:{name}", inspect.getsource(importlib.import_module(name))
    for name in REFERENCES:
        yield f"reference:{name}", pydoc.plain(pydoc.render_doc(name))
    third = len(prose) // 3
    for i in range(3):
        yield f"novel:{i}", (prose[i * third :] + prose)[: len(prose)]
    yield "table:unicode", "".join(f"{c:5d} | {unicodedata.name(chr(c), '-'):50s} | {chr(c)}\n" for c in range(0x100, 0x600))
    yield "table:entities", "".join(f"{k}\t{v!r}\t{ord(v[0])}\n" for k, v in sorted(html.entities.html5.items())[:900])
    for seed in range(3):
        yield f"pairs:{seed}", pairs(seed)
        yield f"needles:{seed}", needles(seed, prose)
        yield f"chains:{seed}", chains(seed)


def pairs(seed: int) -> str:
    """A JSON-like list of uuid to uuid, then questions answered by copying."""
    rng = random.Random(seed)
    made = [(str(uuid.UUID(int=rng.getrandbits(128))), str(uuid.UUID(int=rng.getrandbits(128)))) for _ in range(70)]
    text = "{\n" + "".join(f' "{k}": "{v}",\n' for k, v in made) + "}\n"
    return text + "".join(f'The value of "{k}" is "{v}".\n' for k, v in rng.sample(made, 40))


def needles(seed: int, prose: str) -> str:
    """Numbers hidden in prose, then asked for."""
    rng = random.Random(seed)
    words = ["amber", "copper", "violet", "granite", "willow", "falcon", "harbor", "meadow", "lantern", "orchid"]
    facts = [(f"{w}-{rng.randrange(100)}", rng.randrange(10**6, 10**7)) for w in words]
    sentences = prose.replace("\n", " ").split(". ")[: 220 + 10 * seed]
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


def record(llm: Llama, tokens: Sequence[int], n_context: int) -> list[Sample]:
    """Run ``tokens[n_context:]`` through the live loop after a dense pass.

    Returns
    -------
    list of (averages, target)
        One per selection. averages float16, shape (n_rows, 5, n_middle), times 1e3, as the loop saw them; target float16,
        shape (n_rows, n_middle), times 1e3: mean true score of the next ``HORIZON`` steps. Middle: without sink and window.
    """
    session = llm.session
    config = session.config
    n_sink, n_window = config.sink // BLOCK_TOKENS, config.window // BLOCK_TOKENS
    llm.reset()
    llm.eval(tokens[:n_context])
    primed = session.history.averages.copy(), session.history.n_observed
    truth, _ = true_scores(llm, tokens[n_context:])
    llm.n_tokens = n_context
    session.truncate(n_context)
    session.history.averages[:], session.history.n_observed = primed
    session.configure(replace(config, hold=HORIZON))
    samples: list[Sample] = []
    for i, token in enumerate(tokens[n_context:]):
        future = truth[i : i + HORIZON]
        if i % HORIZON == 0 and len(future) == HORIZON:
            middle = slice(n_sink, (n_context + i) // BLOCK_TOKENS + 1 - n_window)
            target = np.mean([t[:, middle] for t in future], 0)
            samples.append(((session.history.averages[:, :, middle] * 1e3).astype(np.float16), (target * 1e3).astype(np.float16)))
        llm.eval([token])
    session.configure(config)
    return samples


def collect(
    make: Callable[[int], Llama], prose: str, contexts: Sequence[int], n_steps: int, say: Callable[[str], None]
) -> dict[str, list[Sample]]:
    """Record every document once, at contexts taken in turn; short documents at what they have."""
    llm = make(max(contexts) + n_steps + 64)
    found = {}
    for i, (name, text) in enumerate(documents(prose)):
        tokens = llm.tokenize(text.encode())
        n_context = min(contexts[i % len(contexts)], len(tokens) - n_steps)
        if name.startswith(("pairs", "needles", "chains")):  # the questions are at the end
            tokens = tokens[-(n_context + n_steps) :]
        if n_context < 1024:
            continue
        say(f"{name}: {n_context} tokens")
        found[name] = record(llm, tokens[: n_context + n_steps], n_context)
    llm.close()
    return found


def save(path: Path, found: dict[str, list[Sample]]) -> None:
    """Write to a compressed .npz, arrays named ``document|index|a`` and ``|t``."""
    arrays = {f"{name}|{i}|{kind}": x for name, samples in found.items() for i, s in enumerate(samples) for kind, x in zip("at", s)}
    np.savez_compressed(path, **arrays)


def load(path: Path) -> dict[str, list[Sample]]:
    with np.load(path) as file:
        found: dict[str, dict[int, dict[str, np.ndarray]]] = {}
        for key in file.files:
            name, i, kind = key.rsplit("|", 2)
            found.setdefault(name, {}).setdefault(int(i), {})[kind] = file[key]
    return {name: [(s["a"], s["t"]) for _, s in sorted(samples.items())] for name, samples in found.items()}
