"""Where a generation looks: one picture, generated tokens against blocks of the document, from ``on_attention``.

python docs/examples/heat_map.py DOCUMENT.txt [--model smollm2] [--tokens 96] [--out heat_map.png]
"""

import argparse
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from kvcast import Llama, SparseConfig, models

parser = argparse.ArgumentParser()
parser.add_argument("document", type=Path)
parser.add_argument("--model", default="smollm2")
parser.add_argument("--context", type=int, default=4096)
parser.add_argument("--tokens", type=int, default=96)
parser.add_argument("--out", type=Path, default=Path("heat_map.png"))
options = parser.parse_args()

llm = Llama(models.resolve(options.model), n_ctx=options.context + options.tokens + 64, sparse=SparseConfig(budget=512), verbose=False)
tokens = llm.tokenize(options.document.read_bytes())[: options.context]
llm.eval(tokens)

steps: list[np.ndarray] = []  # one a token: mean over layers and KV heads, shape (n_blocks,)


def note(layer: int, _step: int, scores: np.ndarray) -> None:
    mean = scores.mean(0) / llm.session.attached.info.n_layer
    if layer == llm.session.attached.layers[0]:
        steps.append(mean)
    else:
        steps[-1] += mean


llm.on_attention(note)
for token, _ in zip(llm.generate([], top_k=1, reset=False), range(options.tokens)):
    print(llm.detokenize([token]).decode(errors="ignore"), end="", flush=True)
print()

picture = np.zeros((len(steps), max(map(len, steps))))
for row, step in zip(picture, steps):
    row[: len(step)] = step
fig, axes = plt.subplots(figsize=(10, 5), layout="constrained")
image = axes.imshow(np.log10(picture + 1e-5), aspect="auto", cmap="magma", interpolation="nearest", vmin=-4.5, vmax=-1)
axes.set(
    xlabel="block of 16 tokens", ylabel="generated token", title=f"{options.document.name}: attention while generating (log10 of the share)"
)
fig.colorbar(image, ax=axes)
fig.savefig(options.out, dpi=120)
print(f"wrote {options.out}")
llm.close()
