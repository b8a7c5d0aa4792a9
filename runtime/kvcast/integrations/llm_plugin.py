"""kvcast's models in the ``llm`` command-line tool (https://llm.datasette.io): ``llm -m kvcast/smollm2 -f novel.txt "..."``.

There are those that ``kvcast models`` shows as fetched, and the .gguf files that ``KVCAST_GGUF`` names: files or folders of them,
separated as in PATH. Importing this loads no library and no model: ``llm`` imports every plugin for every command.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import llm
from llm.parts import TextPart
from pydantic import Field

from .. import models
from ..errors import KvcastError

if TYPE_CHECKING:
    from ..llama.model import Llama

VARIABLE = "KVCAST_GGUF"


def _say(text: str) -> None:
    click.echo(text, err=True)


class PluginError(click.ClickException, llm.ModelError):
    """One sentence and exit code 1 in every command of llm; ``llm chat`` prints a traceback for its own ``ModelError``."""


def files() -> dict[str, Path]:
    """The models there are: name and file. What the variable names is listed even if it is missing; loading it says so."""
    found = {m.name: models.cache_dir() / m.file for m in models.MODELS if (models.cache_dir() / m.file).exists()}
    for entry in filter(None, os.environ.get(VARIABLE, "").split(os.pathsep)):
        path = Path(entry).expanduser()
        for file in sorted(path.glob("*.gguf")) if path.is_dir() else [path]:
            found[file.stem] = file
    return found


@llm.hookimpl
def register_models(register: Callable[[llm.Model], None]) -> None:
    for name, path in files().items():
        register(Kvcast(name, path))


class Kvcast(llm.Model):
    """A GGUF model with sparse attention. It stays loaded while budget and context stay the same (``llm chat``)."""

    can_stream = True

    class Options(llm.Options):
        budget: int | None = Field(default=None, description="Tokens each KV head attends to; kvcast's default when not given.")
        context: int = Field(default=0, ge=0, description="Tokens the context holds; 0: what the model was trained for.")
        temperature: float = Field(default=0.2, ge=0, description="0 always takes the likeliest token.")
        max_tokens: int = Field(default=512, ge=1, description="Longest answer.")

    def __init__(self, name: str, path: Path):
        self.model_id = f"kvcast/{name}"
        self.path = path
        self._loaded: tuple[int | None, int, Llama] | None = None

    def execute(self, prompt: llm.Prompt, stream: bool, response: llm.Response, conversation: llm.Conversation | None) -> Iterator[str]:
        options: Any = prompt.options
        messages: Any = [{"role": m.role, "content": "".join(p.text for p in m.parts if isinstance(p, TextPart))} for m in prompt.messages]
        try:
            model = self._load(options.budget, options.context)
            answer: Any = model.create_chat_completion(
                messages, stream=True, temperature=options.temperature, max_tokens=options.max_tokens
            )
            for chunk in answer:
                if piece := chunk["choices"][0]["delta"].get("content"):
                    yield piece
        except (KvcastError, ValueError) as error:
            what_to_do = "; use a larger -o context or a shorter text" if "context window" in str(error) else ""
            raise PluginError(f"{error}{what_to_do}") from error

    def _load(self, budget: int | None, context: int) -> Llama:
        if self._loaded is not None and self._loaded[:2] == (budget, context):
            return self._loaded[2]
        from ..config import SparseConfig
        from ..gguf.support import sparse_if_tested
        from ..llama.model import Llama

        if self._loaded is not None:
            self._loaded[2].close()
            self._loaded = None
        sparse = sparse_if_tested(self.path, SparseConfig() if budget is None else SparseConfig(budget=budget), _say)
        self._loaded = budget, context, Llama(self.path, n_ctx=context, sparse=sparse, verbose=False)
        return self._loaded[2]
