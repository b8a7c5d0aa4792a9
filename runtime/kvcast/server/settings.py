"""Settings of the server and its models: llama-cpp-python's own, with ``sparse``, and safe defaults for a machine at home.

Nothing is taken from environment variables: theirs have names as common as HOST and SEED.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

from llama_cpp.server import settings as upstream
from pydantic import Field, ValidationError, field_validator, model_validator

from .. import models
from ..config import SparseConfig
from ..cores import usable_cores
from ..errors import KvcastError
from ..limits import Limits
from .bounds import Bounds

TEXT_ONLY = "kvcast runs text models only"
NO_HUB = "fetch the file and give its path as model"
REFUSED = {
    "rpc_servers": "kvcast's libraries have no RPC backend",
    "clip_model_path": TEXT_ONLY,
    "hf_model_repo_id": NO_HUB,
    "hf_pretrained_model_name_or_path": "the tokenizer of the GGUF file is used",
    "hf_tokenizer_config_path": "the chat template of the GGUF file is used",
}
MULTIMODAL = (
    "llava-1-5", "llava-1-6", "obsidian", "moondream", "nanollava", "llama-3-vision-alpha", "minicpm-v-2.6", "qwen2.5-vl", "mtmd", "gemma4"
)  # fmt: skip


class _FromFile:
    """Only what is given counts, no environment."""

    @classmethod
    def settings_customise_sources(cls, settings_cls: Any, init_settings: Any, **_: Any) -> tuple[Any, ...]:
        return (init_settings,)


class ModelSettings(_FromFile, upstream.ModelSettings):
    """A model as llama-cpp-python's server describes it, ``sparse``: the fields of ``SparseConfig``, or null for dense, and ``limits``:
    those of ``Limits``.

    ``model`` is a path or a name from ``kvcast models``. ``n_ctx`` 0 is what the model was trained for, 32,768 at most.
    Only fields that are set are passed on, so that defaults are those of ``kvcast.Llama``.
    """

    sparse: SparseConfig | None = Field(default_factory=SparseConfig)
    limits: Limits = Field(default_factory=Limits)
    n_ctx: int = Field(default=0, ge=0)
    n_threads: int = Field(default_factory=usable_cores, ge=1)
    verbose: bool = False

    @field_validator("sparse", "limits", mode="before")
    @classmethod
    def _of_fields(cls, value: Any, info: Any) -> Any:
        if not isinstance(value, dict):
            return value
        kind = SparseConfig if info.field_name == "sparse" else Limits
        known = list(kind.__dataclass_fields__)
        for name in value:
            if name not in known:
                raise ValueError(f"there is no setting {name!r}{_closest(name, known)}")
        return kind(**value)

    @field_validator(*REFUSED, "chat_format")
    @classmethod
    def _refused(cls, value: Any, info: Any) -> Any:
        if value is not None and info.field_name in REFUSED:
            raise ValueError(f"this is not supported, {REFUSED[info.field_name]}; leave it out")
        if info.field_name == "chat_format" and value in MULTIMODAL:
            raise ValueError(f"{TEXT_ONLY}; choose another chat format or leave it out")
        return value

    @field_validator("cache_type")
    @classmethod
    def _no_pickles(cls, value: str) -> str:
        if value == "disk":
            raise ValueError("this is not supported, it runs what it finds in files of the working directory; use ram")
        return value


class ServerSettings(_FromFile, upstream.ServerSettings):
    """Where the server listens and who may use it.

    Parameters
    ----------
    allow_origins : list of str
        Web pages of other origins that may use the API (``https://example.org``).
    allow_hosts : list of str
        Names, beside localhost, this machine's own and addresses, by which browsers may reach the server.
    keep_documents : bool
        Keep long first messages on disk, as ``kvcast chat`` keeps documents.
    bounds : Bounds
        What one client may ask.
    """

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    interrupt_requests: bool = False
    allow_origins: list[str] = Field(default_factory=list)
    allow_hosts: list[str] = Field(default_factory=list)
    keep_documents: bool = True
    bounds: Bounds = Field(default_factory=Bounds)

    @field_validator("api_key", mode="before")
    @classmethod
    def _is_a_key(cls, value: Any) -> str | None:
        if value is None:
            return None
        if not isinstance(value, str) or not value.strip():
            raise ValueError("is empty, or no text; choose one, or leave it out to have none")
        if value != value.strip() or not value.isprintable():
            raise ValueError("has white space at an end, or characters that are not printed; choose another")
        return value


class ConfigFile(ServerSettings):
    """What a configuration file holds."""

    models: list[ModelSettings] = Field(min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _has_a_key(cls, values: dict[str, Any]) -> dict[str, Any]:
        return {**values, "api_key": ""} if values.get("api_key", "") is None else values  # the line was left empty

    @field_validator("models")
    @classmethod
    def _distinct(cls, given: list[ModelSettings]) -> list[ModelSettings]:
        names = [m.model_alias or short_name(m.model) for m in given]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"two models are called {twice[0]!r}; give each a model_alias of its own")
        return given


def read_config(path: Path) -> tuple[ServerSettings, list[ModelSettings]]:
    """The settings in a JSON or YAML file.

    Raises
    ------
    KvcastError
        There is no such file, or what it holds is wrong.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix in (".yaml", ".yml"):
            import yaml

            try:
                content = yaml.safe_load(text)
            except yaml.YAMLError as error:
                raise ValueError(" ".join(str(error).split())) from error
        else:
            content = json.loads(text)
    except OSError as error:
        raise KvcastError(f"the configuration {str(path)!r} cannot be read ({error.strerror}); check the path") from error
    except ValueError as error:
        raise KvcastError(f"{str(path)!r} is neither JSON nor YAML, as its name says: {error}; correct it") from error
    if not isinstance(content, dict):
        raise KvcastError(f"{str(path)!r} holds no settings; see docs/server.md for an example")
    config = checked(ConfigFile, content, str(path))
    server = ServerSettings(**{name: getattr(config, name) for name in config.model_fields_set - {"models"}})
    return server, config.models


def short_name(model: str) -> str:
    """What clients call a model that has no alias."""
    return model if models.find(model) else Path(model).stem


def checked(kind: type[Any], values: dict[str, Any], where: str) -> Any:
    """``kind(**values)``; what is wrong is one sentence, of a KvcastError."""
    try:
        return kind(**values)
    except ValidationError as error:
        raise KvcastError(f"{where}: {_sentence(error)}") from None


def _sentence(error: ValidationError) -> str:
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        fields = [*ConfigFile.model_fields, *ModelSettings.model_fields, *Bounds.model_fields]
        return f"there is no setting {place!r}{_closest(str(first['loc'][-1]), fields)}"
    if first["type"] == "missing":
        return f"{place!r} is missing; add it"
    reason = first["msg"].removeprefix("Value error, ")
    if place == "api_key":  # it may be right but for a slip, and is not shown
        return f"api_key {reason}"
    return f"{place} is {first['input']!r}: {reason[0].lower()}{reason[1:]}"


def _closest(name: str, known: list[str]) -> str:
    found = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {found[0]!r}?" if found else "; leave it out"
