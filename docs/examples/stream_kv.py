"""One layer's KV to disk while the text is read and generated, from ``on_kv``; then checked against the store.

python docs/examples/stream_kv.py DOCUMENT.txt [--layer 0] [--out kv.bin]
"""

import argparse
from pathlib import Path

import numpy as np

from kvcast import Llama, SparseConfig, models

parser = argparse.ArgumentParser()
parser.add_argument("document", type=Path)
parser.add_argument("--model", default="smollm2")
parser.add_argument("--layer", type=int, default=0)
parser.add_argument("--context", type=int, default=2048)
parser.add_argument("--out", type=Path, default=Path("kv.bin"))
options = parser.parse_args()

llm = Llama(models.resolve(options.model), n_ctx=options.context + 128, sparse=SparseConfig(budget=512), verbose=False)
tokens = llm.tokenize(options.document.read_bytes())[: options.context]

with options.out.open("wb") as file:

    def write(layer: int, _block: int, k: np.ndarray, v: np.ndarray) -> None:
        if layer == options.layer:
            file.write(k.tobytes() + v.tobytes())

    llm.on_kv(write)
    llm.eval(tokens)
    for _token, _ in zip(llm.generate([], top_k=1, reset=False), range(40)):
        pass
    llm.on_kv(None)

info = llm.session.attached.info
blocks = np.fromfile(options.out, np.float16).reshape(-1, 2, 16, info.n_head_kv, info.head_dim_k)
k, v = llm.session.attached.rows_of(options.layer, 0, 16 * len(blocks))
assert (blocks[:, 0].reshape(k.shape) == k).all() and (blocks[:, 1].reshape(v.shape) == v).all()
print(f"{len(blocks)} blocks of layer {options.layer}, {options.out.stat().st_size / 1e6:.1f} MB in {options.out}, equal to the store")
llm.close()
