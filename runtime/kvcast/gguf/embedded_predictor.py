"""A predictor inside a GGUF: as metadata, so that the file stays one that every llama.cpp loads.

``kvcast.predictor.onnx`` (array of uint8) is the network, ``kvcast.predictor.card`` (string) its card as JSON,
``kvcast.predictor.sha256`` (string) the hash of the network in hexadecimal digits.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from predictor_onnx.card import BYTES_MAX as CARD_BYTES_MAX
from predictor_onnx.card import read_card
from predictor_onnx.infer import PredictorError, examine, open_predictor, read_file
from predictor_onnx.network import BYTES_MAX
from predictor_onnx.protobuf import Damaged
from predictor_onnx.runtime import onnxruntime

from ..errors import KvcastError, ModelError
from ..files import reason, replacing, write
from .reader import GgufFile

ONNX, CARD, SHA256 = (f"kvcast.predictor.{name}" for name in ("onnx", "card", "sha256"))
CHUNK = 1 << 24


@dataclass(frozen=True, slots=True)
class Embedded:
    """What the keys hold, unchecked; ``n_bytes`` says how large a network is that was not read for its size."""

    onnx: bytes = field(repr=False)
    card: str = field(repr=False)
    sha256: str
    n_bytes: int = 0

    def checked(self) -> bytes:
        """The network.

        Raises
        ------
        ModelError
            It is not what was embedded, or larger than a predictor is.
        """
        if self.n_bytes > BYTES_MAX:
            raise ModelError(f"the embedded predictor has {self.n_bytes:,} bytes, and a predictor at most {BYTES_MAX:,}")
        if hashlib.sha256(self.onnx).hexdigest() != self.sha256:
            raise ModelError("the embedded predictor is damaged (its sha256 is another); embed it again with `kvcast embed-predictor`")
        return self.onnx

    def about(self) -> dict[str, str | int | None]:
        """Name and architecture, as the card has them; parameters, as they were counted; and why it is not used, None where it is."""
        card, n_parameters, why_not = {}, None, None
        with contextlib.suppress(Damaged):
            card = read_card(self.card)
        try:
            network, _, _ = examine(self.checked(), "embedded")
            n_parameters = network.n_parameters
        except (ModelError, PredictorError) as error:
            why_not = str(error)
        return {"name": card.get("name"), "architecture": card.get("architecture"), "parameters": n_parameters, "why_not_used": why_not}

    def said(self, file: str) -> str:
        """A sentence for people, of one that is used; "" of one that is not."""
        about = self.about()
        try:
            onnxruntime()
        except PredictorError:
            return ""
        if about["why_not_used"] is not None:
            return ""
        name = f"{about['name']!r}, " if about["name"] else ""
        return (
            f"{file} brings a predictor of its own ({name}{about['parameters']:,} parameters), which is used; "
            "predictor='onnx:stream' (--predictor onnx:stream) leaves it alone"
        )


def embedded_in(gguf: GgufFile) -> Embedded | None:
    """What an open file carries."""
    n_bytes = gguf.count(ONNX)
    onnx = b"" if n_bytes > BYTES_MAX else gguf.get_bytes(ONNX)
    if onnx is None:
        return None
    sha256 = str(gguf.get(SHA256, ""))
    return Embedded(onnx, str(gguf.get(CARD, "")), sha256 if re.fullmatch("[0-9a-f]{64}", sha256) else "", n_bytes)


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
    with GgufFile(source) as gguf:
        if os.path.exists(out) and out.samefile(source):
            raise KvcastError(f"the result cannot replace the file that it is made from, {str(source)!r}; name another one")
        open_predictor(predictor)
        network = read_file(predictor)
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
    try:
        with path.open("rb") as file:
            card = file.read(CARD_BYTES_MAX + 1)
        read_card(card)
        return card.decode()
    except (Damaged, ValueError) as error:
        reason = str(error) if isinstance(error, Damaged) else "it is not UTF-8 text"
        raise KvcastError(f"the card {str(path)!r} cannot be used ({reason}); `kvcast predictor export` writes it again") from None
    except OSError as error:
        raise KvcastError(f"the card {str(path)!r} cannot be read ({error.strerror or error}); check the file") from error
