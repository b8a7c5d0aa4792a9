"""``kvcast inspect``: what a GGUF file says of its model, and whether kvcast serves it sparse."""

from __future__ import annotations

import collections
from pathlib import Path
from typing import Any

from ..bindings.loaded import llama_cpp
from ..errors import KvcastError
from ..gguf.header import header_of
from ..gguf.memory import KV_TYPES, divides
from ..gguf.reader import GgufFile
from ..gguf.support import why_dense


def inspect(path: Path) -> dict[str, Any]:
    """Everything that ``kvcast inspect`` prints, ready for JSON.

    Raises
    ------
    ModelError
        The file is missing, not a GGUF, or shorter than its header says.
    """
    with GgufFile(path) as gguf:
        header = header_of(gguf)
        arch = header.arch

        def of_arch(key: str) -> Any:
            return gguf.get(f"{arch}.{key}")

        bytes_by_type: collections.Counter[str] = collections.Counter()
        for tensor in gguf.tensors():
            bytes_by_type[tensor.type] += tensor.n_bytes
        file_type = gguf.get("general.file_type")
        scaling = {"type": of_arch("rope.scaling.type"), "factor": of_arch("rope.scaling.factor")}
        window = of_arch("attention.sliding_window")
        found = {
            "file": path.name,
            "file_bytes": gguf.size_bytes,
            "name": gguf.get("general.name"),
            "architecture": arch,
            "quantisation": None if file_type is None else (llama_cpp.llama_ftype_name(file_type) or b"unknown").decode(),
            "tensor_bytes": dict(bytes_by_type.most_common()),
            "shape": {
                "layers": header.n_layer,
                "sliding_window_layers": header.n_layer_swa,
                "heads": header.n_head,
                "kv_heads": header.n_head_kv,
                "head_dim_k": header.head_dim_k,
                "head_dim_v": header.head_dim_v,
                "embedding": header.n_embd,
                "feed_forward": header.n_ff,
                "vocabulary": header.n_vocab,
            },
            "context": header.n_ctx_train,
            "rope": {"base": of_arch("rope.freq_base"), "scaling": scaling if scaling["type"] not in (None, "none") else None},
            "sliding_window": window or None,
            "kv_bytes_per_token": {
                name: header.store_bytes(256, kind, kind) // 256 for name, kind in KV_TYPES.items() if divides(header, name)
            },
            "chat_template": gguf.get("tokenizer.chat_template") is not None,
        }
    reason = why_dense(path)
    return {**found, "sparse": not reason, "why_dense": reason or None, "embedded_predictor": _about_predictor(header.embedded)}


def _about_predictor(embedded) -> dict[str, Any] | None:
    if embedded is None:
        return None
    about = embedded.about()
    try:
        embedded.checked()
        intact = True
    except KvcastError:
        intact = False
    return {"onnx_bytes": embedded.n_bytes, "sha256": embedded.sha256, "intact": intact, **about}
