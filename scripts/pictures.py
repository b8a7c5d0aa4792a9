"""Draws the pictures of docs/how-it-works.md: one real step of the host path, and the timeline of the device path.

python scripts/pictures.py [FOLDER]    (SmolLM2, half a minute)
"""

import contextlib
import sys
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Patch

from kvcast import Llama, SparseConfig, models
from kvcast.texts import DEFAULT_TEXT

ROOT = Path(__file__).resolve().parent.parent
LAYER, HEAD = 8, 0  # one that attends far back
N_CONTEXT, N_STEPS = 4096, 32  # the last block is full
KEPT, CHOSEN, LEFT = "#4c78a8", "#e45756", "#c8c8c8"


def host(path: Path) -> None:
    """What one KV head knew at one step, what it chose, and what it would have attended to."""
    config = SparseConfig(budget=512, trace=True)
    with contextlib.closing(Llama(models.resolve("smollm2"), n_ctx=N_CONTEXT + 64, sparse=config, verbose=False)) as llm:
        tokens = llm.tokenize(DEFAULT_TEXT.read_bytes())[: N_CONTEXT + N_STEPS]
        llm.eval(tokens[:N_CONTEXT])
        for token in tokens[N_CONTEXT:]:
            llm.eval([token])
        session, attached = llm.session, llm.session.attached
        n_blocks = len(tokens) // 16
        row = LAYER * attached.info.n_head_kv + HEAD
        n_group = attached.info.n_head // attached.info.n_head_kv
        tokens_seen = llm.attention_row(LAYER)[HEAD * n_group : (HEAD + 1) * n_group, : 16 * n_blocks].mean(0)
        truth = tokens_seen.reshape(n_blocks, 16).sum(1)
        forecast = session.path.weights[row, :n_blocks] ** 2  # what the step was given: the roots
        estimate = attached.estimates[LAYER, HEAD, :n_blocks].copy()
        attended = np.isin(np.arange(n_blocks), session.result.blocks[row, : session.result.n_attended[row]])
        begin, end = session.path.topk_range
    free = (np.arange(n_blocks) >= begin) & (np.arange(n_blocks) < end)
    colours = np.where(attended, np.where(free, CHOSEN, KEPT), LEFT)
    fig, axes = plt.subplots(3, 1, figsize=(10, 6), sharex=True, layout="constrained")
    titles = (
        "1. forecast: what the predictor made of the history, up to 32 steps before",
        "2. estimate, relative: this step's own query against the summary of the keys",
        f"3. attention of this step over the whole store: {truth[attended].sum():.0%} of it on the {attended.sum()} blocks attended to",
    )
    for axis, values, title in zip(axes, (np.where(free, forecast, np.nan), np.where(free, estimate, np.nan), truth), titles):
        axis.bar(np.arange(n_blocks), np.nan_to_num(values), 1.0, color=colours)
        axis.set_yscale("log")
        top = np.nanmax(values)
        axis.set_ylim(top * 1e-4, top * 2)
        axis.set_title(title, loc="left", fontsize=10)
    axes[1].set_ylabel("share of attention (log)")
    axes[2].set_xlabel(f"block of 16 tokens (layer {LAYER}, KV head {HEAD}, position {len(tokens):,})")
    names = {KEPT: "sink and window: always", CHOSEN: "chosen by forecast and estimate", LEFT: "left out"}
    fig.legend(handles=[Patch(color=c, label=n) for c, n in names.items()], loc="outside lower center", ncols=3, frameon=False)
    fig.savefig(path, dpi=110)


def device(path: Path) -> None:
    """Who does what, when; not to scale."""
    lanes = ("device, main queue", "second queue", "thread beside", "store, host memory")
    step = [
        (0, 0.0, 0.6, "scatter", CHOSEN),
        (0, 0.6, 3.5, "step {t}: attend over the pool, layer by layer", KEPT),
        (0, 4.1, 0.6, "read\nback", CHOSEN),
        (3, 4.7, 0.5, "new\nrows", CHOSEN),
        (2, 0.6, 1.0, "predict", "#72b7b2"),
        (2, 1.6, 0.8, "select", "#72b7b2"),
        (2, 2.4, 0.6, "gather", "#72b7b2"),
        (1, 3.0, 0.6, "upload", "#eeca3b"),
    ]
    fig, axis = plt.subplots(figsize=(10, 2.9), layout="constrained")
    for i, name in enumerate(("t", "t+1")):
        for lane, begin, length, text, colour in step:
            axis.barh(-lane, length, left=begin + 5.2 * i, height=0.7, color=colour, edgecolor="white")
            axis.text(begin + 5.2 * i + length / 2, -lane, text.format(t=name), ha="center", va="center", fontsize=8)
    for i in (0, 1):
        arrow = {"arrowstyle": "->", "color": "#555555", "lw": 1.2}
        axis.annotate("", (2.7 + 5.2 * i, -2.37), (2.7 + 5.2 * i, -2.85), arrowprops=arrow)  # gathered from the store
        if i == 0:
            axis.annotate("", (5.45, -0.35), (3.6, -0.8), arrowprops=arrow)  # staged, scattered by the next step
    axis.axvline(5.2, color="#999999", ls=":", lw=1)
    axis.barh(-3, 10.4, height=0.3, color=LEFT, zorder=0)
    axis.text(0.1, -3.02, "the whole KV cache", fontsize=8, va="center")
    axis.set(xlim=(0, 10.5), ylim=(-3.6, 0.6), yticks=[-i for i in range(4)], yticklabels=lanes, xticks=[])
    axis.tick_params(length=0)
    for side in axis.spines.values():
        side.set_visible(False)
    fig.savefig(path, dpi=110)


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    device(folder / "device-step.png")
    host(folder / "host-step.png")
    print(f"wrote host-step.png and device-step.png into {folder}")
