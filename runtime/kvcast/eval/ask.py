"""Generated answers of selectors to the same samples: the prompt is read once, and its state restored for each of them."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import llama_cpp

from ..chat.conversation import MARK, around_question
from ..errors import KvcastError
from ..llama.model import Llama
from ..sparse.baselines import PROMPT_STEPS
from .recovery import next_logits
from .selectors import Selector
from .tasks import Sample, sample

READ = "I have read it."


class Prompts:
    """Prompts of a model, by its chat template; plain text where it has none.

    Parameters
    ----------
    turns : int
        1: document and question in one message. 2: the document first, and the question in a later turn, so that nothing of it
        is known when the document is read.
    """

    def __init__(self, llm: Llama, turns: int):
        self._llm = llm
        self._turns = turns

    def __call__(self, sample: Sample) -> tuple[list[int], list[int]]:
        """Tokens of what is read first, and of what comes in the last turn, answer prefix included (empty with one turn)."""
        if self._turns == 1:
            messages = [{"role": "user", "content": f"{sample.document}\n\n{MARK}"}]
        else:
            messages = [
                {"role": "user", "content": sample.document},
                {"role": "assistant", "content": READ},
                {"role": "user", "content": MARK},
            ]
        plain = "\n\n".join(m["content"] for m in messages) + "\n\n"
        head, tail = around_question(self._llm, messages) or plain.split(MARK)
        last = f"{sample.question}{tail}{sample.prefix}"
        if self._turns == 1:
            return self._tokens(head + last), []
        return self._tokens(head), self._tokens(last)

    def n_tokens(self, sample: Sample) -> int:
        return sum(map(len, self(sample)))

    def _tokens(self, text: str) -> list[int]:
        return self._llm.tokenize(text.encode(), add_bos=False, special=True)


def answers(
    llm: Llama,
    prompts: Prompts,
    sample: Sample,
    selectors: Sequence[Selector],
) -> Iterator[dict[str, Any]]:
    """Greedy answers, one selector after the other.

    An answer ends where the model ends it, at ``n_generate`` tokens, or as soon as it contains all references, as its score
    cannot change any more.

    Yields
    ------
    dict
        selector, config, score, answer, n_tokens, n_dense_steps, estimated (recovery, by the runtime), seconds.
    """
    session = llm.session
    history = session.history
    history.keep_steps(PROMPT_STEPS)
    first, last = prompts(sample)
    llm.reset()
    llm.eval(first)
    primed, logits = history.save(), next_logits(llm)
    for selector in selectors:
        begin = time.perf_counter()
        llm.n_tokens = len(first)
        session.truncate(len(first))
        history.restore(primed)
        if selector.config is not None:
            session.configure(selector.config)

        def step(token: int, selector: Selector = selector) -> None:
            if selector.config is None:
                llm.dense_eval(token)
            else:
                llm.eval([token])

        if selector.evicts:
            for token in last:
                step(token)
        elif last:
            llm.eval(last)
        n_dense = session.times.n_calibrations
        scores = next_logits(llm) if last else logits
        made: list[int] = []
        answer = ""
        while len(made) < sample.n_generate:
            token = int(scores.argmax())
            if llama_cpp.llama_vocab_is_eog(llm._model.vocab, token):
                break
            made.append(token)
            answer = llm.detokenize(made).decode(errors="replace")
            if sample.score(answer) == 1 or len(made) == sample.n_generate:
                break
            step(token)
            scores = next_logits(llm)
        times = session.times
        yield {
            "selector": selector.name,
            "config": selector.config and asdict(selector.config),
            "score": sample.score(answer),
            "answer": answer,
            "n_tokens": len(made),
            "n_context": sum(map(len, (first, last))),
            "n_dense_steps": None if selector.config is None else times.n_calibrations - n_dense,
            "estimated": times.share_sum / times.n_steps if selector.config is not None and times.n_steps else None,
            "seconds": time.perf_counter() - begin,
        }


def run(
    llm: Llama,
    turns: int,
    tasks: Sequence[str],
    indices: Sequence[int],
    selectors: Sequence[Selector],
    n_few: int,
    seed: int,
    n_context: int,
    prose: Sequence[str],
    about: dict[str, Any],
    journal: Path | None,
    say: Callable[[int, int], None],
) -> list[dict[str, Any]]:
    """All samples by all selectors; those beyond the first two only answer the first ``n_few`` samples of a task (0: all).

    Every answer is appended to ``journal`` at once. One that is there, of the same settings of its selector, is not asked again.

    Raises
    ------
    KvcastError
        The journal is of other settings.
    """
    prompts = Prompts(llm, turns)
    wanted = {s.name: s.config and asdict(s.config) for s in selectors}
    done = [d for d in _read(journal, about) if d["selector"] in wanted and d.get("config", ...) == wanted[d["selector"]]]
    known = {(d["task"], d["index"], d["selector"]) for d in done}
    plan = [(task, i) for i in indices for task in tasks]
    with open(journal, "a") if journal else contextlib.nullcontext() as file:
        if file and not file.tell():
            file.write(json.dumps(about) + "\n")
        elif file and journal and not journal.read_bytes().endswith(b"\n"):  # a run was killed while it wrote
            file.write("\n")
        for k, (task, index) in enumerate(plan):
            say(k, len(plan))
            few = n_few and index >= n_few
            missing = [s for j, s in enumerate(selectors) if (task, index, s.name) not in known and not (few and j > 1)]
            if not missing:
                continue
            asked = sample(task, seed, index, n_context, prose, prompts.n_tokens)
            for answer in answers(llm, prompts, asked, missing):
                done.append({"task": task, "index": index, "references": list(asked.references), **answer})
                if file:
                    file.write(json.dumps(done[-1]) + "\n")
                    file.flush()
    say(len(plan), len(plan))
    return [d for d in done if d["task"] in tasks and d["index"] in indices]


def _read(journal: Path | None, about: dict[str, Any]) -> list[dict[str, Any]]:
    if journal is None or not journal.is_file() or not journal.stat().st_size:
        return []
    before, *lines = journal.read_text().splitlines()
    same = ("model_sha256", "context", "budget", "turns", "seed", "haystack")
    head = json.loads(before)
    if any(head.get(k) != about[k] for k in same):
        raise KvcastError(f"{str(journal)!r} holds answers of other settings; name another --json file, or delete it")
    found = []
    for line in lines:
        with contextlib.suppress(ValueError):  # cut off, see `run`
            found.append(json.loads(line))
    return found
