"""PNG of which blocks each layer attended to over a generation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..extras import pyplot


def attended(masks: Sequence[np.ndarray], layers: Sequence[int], path: Path, title: str) -> None:
    """One panel per layer: step across, block down, shade by the share of KV heads that attended.

    Parameters
    ----------
    masks : sequence of bool arrays, shape (len(layers) * n_head_kv, n_blocks), one per step
    layers : sequence of int
        Their numbers.
    """
    plt = pyplot()
    stack = np.stack(masks).reshape(len(masks), len(layers), -1, masks[0].shape[1])
    shares = stack.mean(2)  # step, layer, block
    n_used = int(np.flatnonzero(stack.any((0, 1, 2)))[-1]) + 1
    columns = 6
    rows = -(-len(layers) // columns)
    figure = plt.figure(figsize=(2.4 * columns, 1.9 * rows), dpi=110, layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    image = None
    for ax in axes.flat[len(layers) :]:
        ax.set_axis_off()
    for i, (layer, ax) in enumerate(zip(layers, axes.flat)):
        image = ax.imshow(shares[:, i, :n_used].T, aspect="auto", interpolation="nearest", cmap="magma_r", vmin=0, vmax=1)
        ax.set_title(f"layer {layer}", fontsize=8, pad=2)
        ax.tick_params(labelsize=7)
    assert image is not None
    figure.supxlabel("generated token", fontsize=9)
    figure.supylabel("block of 16 tokens (0 = start of the document)", fontsize=9)
    figure.suptitle(title, fontsize=11)
    figure.colorbar(image, ax=axes, shrink=0.4, label="share of KV heads that attended")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)
