"""A predictor inside a GGUF: as metadata, so that the file stays one that every llama.cpp loads.

``kvcast.predictor.onnx`` (array of uint8) is the network, ``kvcast.predictor.card`` (string) its card as JSON,
``kvcast.predictor.sha256`` (string) the hash of the network in hexadecimal digits.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from .errors import KvcastError, ModelError
from .files import reason, replacing, write
from .gguf_file import GgufFile

ONNX, CARD, SHA256 = (f"kvcast.predictor.{name}" for name in ("onnx", "card", "sha256"))
CHUNK = 1 << 24


@dataclass(frozen=True, slots=True)
class Embedded:
    """What the keys hold, unchecked."""

    onnx: bytes = field(repr=False)
    card: str = field(repr=False)
    sha256: str

    def checked(self) -> bytes:
        """The network.

        Raises
        ------
        ModelError
            It is not what was embedded.
        """
        if hashlib.sha256(self.onnx).hexdigest() != self.sha256:
            raise ModelError("the embedded predictor is damaged (its sha256 is another); embed it again with `kvcast embed-predictor`")
        return self.onnx


def embedded_in(gguf: GgufFile) -> Embedded | None:
    """What an open file carries."""
    onnx = gguf.get_bytes(ONNX)
    return None if onnx is None else Embedded(onnx, str(gguf.get(CARD, "")), str(gguf.get(SHA256, "")))


def embed(source: Path, predictor: Path, out: Path, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
    """Write ``source`` with a predictor inside to ``out``; one that is there already is replaced.

    Tensor data is copied as it is, 16 MiB at a time. ``out`` appears when it is complete.

    Parameters
    ----------
    predictor : Path
        An ONNX file, with its card beside it (NAME.json).
    progress : callable
        Called with (bytes written, bytes in all).

    Raises
    ------
    KvcastError
        The card is missing or no JSON, ``out`` is ``source``, or the disk is full.
    ModelError
        ``source`` is not a whole GGUF.
    predictor_onnx.infer.PredictorError
        The network cannot be used.
    """
    from predictor_onnx.infer import open_predictor

    with GgufFile(source) as gguf:
        if os.path.exists(out) and out.samefile(source):
            raise KvcastError(f"the result cannot replace the file that it is made from, {str(source)!r}; name another one")
        open_predictor(predictor)
        network = predictor.read_bytes()
        gguf.set_bytes(ONNX, network)
        gguf.set_str(CARD, _card(predictor))
        gguf.set_str(SHA256, hashlib.sha256(network).hexdigest())
        metadata = gguf.metadata()
        n_bytes = len(metadata) + gguf.size_bytes - gguf.data_offset
        if not out.parent.is_dir():
            raise KvcastError(f"there is no folder {str(out.parent)!r}; make it first")
        free = shutil.disk_usage(out.parent).free
        if n_bytes > free:
            raise KvcastError(f"{str(out)!r} needs {n_bytes / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free there; make room")
        try:
            with source.open("rb") as before, replacing(out) as after:
                after.write(metadata)
                before.seek(gguf.data_offset)
                while chunk := before.read(CHUNK):
                    after.write(chunk)
                    progress(after.tell(), n_bytes)
        except OSError as error:
            raise KvcastError(f"{str(out)!r} could not be written ({reason(error)}); nothing was changed") from error


def extract(source: Path, out: Path) -> None:
    """Write a file's predictor to ``out`` and its card beside it.

    Raises
    ------
    ModelError
        It is not a GGUF, has none, or one that is damaged.
    KvcastError
        ``out`` does not end in .onnx, or cannot be written.
    """
    if out.suffix != ".onnx":
        raise KvcastError(f"{str(out)!r} is no name for a network; give one that ends in .onnx, the card goes beside it as .json")
    with GgufFile(source) as gguf:
        found = embedded_in(gguf)
    if found is None:
        raise ModelError(f"{str(source)!r} has no embedded predictor; `kvcast embed-predictor` puts one in")
    network = found.checked()
    write(out, network)
    write(out.with_suffix(".json"), found.card)


def _card(predictor: Path) -> str:
    path = predictor.with_suffix(".json")
    if not path.is_file():
        raise KvcastError(f"predictor {str(predictor)!r} has no card; `kvcast predictor train` writes {path.name!r} beside it")
    card = path.read_text(encoding="utf-8")
    try:
        json.loads(card)
    except ValueError:
        raise KvcastError(f"the card {str(path)!r} is not JSON; `kvcast predictor export` writes it again") from None
    return card
