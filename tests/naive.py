"""The plainest way to compute what the kernels compute; slow, obvious, float64."""

import numpy as np


def block_scores(q, k, n_head_kv, blocks, n_cells, scale):
    """Attention of one query over listed blocks.

    q (n_head, d), k (n_cells, n_head_kv, d), blocks: list of ids per KV head, n_cells: cells in use.
    Returns per query head: block probabilities (list of arrays) and log-sum-exp.
    """
    group = q.shape[0] // n_head_kv
    sums, lses = [], []
    for head in range(q.shape[0]):
        h = head // group
        logits = [k[b * 16 : min(b * 16 + 16, n_cells), h].astype(np.float64) @ q[head].astype(np.float64) * scale for b in blocks[h]]
        everything = np.concatenate(logits)
        top = everything.max()
        lse = top + np.log(np.exp(everything - top).sum())
        sums.append(np.array([np.exp(x - lse).sum() for x in logits]))
        lses.append(lse)
    return sums, np.array(lses)


def observe_listed(averages, decays, blocks, n_listed, scores, shares):
    for row in range(len(blocks)):
        for i in range(n_listed[row]):
            for d, decay in enumerate(decays):
                old = averages[row, d, blocks[row, i]]
                averages[row, d, blocks[row, i]] = decay * old + (1 - decay) * scores[row, i] * shares[row]


def observe_all(averages, decays, scores, n_taps, n_blocks):
    n_layer, _, n_head_kv, _ = scores.shape
    for tap in range(n_taps):
        now = scores[:, tap, :, :n_blocks].reshape(n_layer * n_head_kv, n_blocks)
        for d, decay in enumerate(decays):
            averages[:, d, :n_blocks] = decay * averages[:, d, :n_blocks] + (1 - decay) * now


def select(scores, n_used, n_budget, n_sink, n_window):
    """A list of ascending ids per row."""
    if n_budget >= n_used:
        return [list(range(n_used)) for _ in scores]
    sink, window = list(range(n_sink)), list(range(max(n_sink, n_used - n_window), n_used))
    lists = []
    for row in scores:
        middle = [b for b in range(n_sink, window[0]) if row[b] >= 0]
        best = sorted(middle, key=lambda b: (-row[b], b))[: n_budget - n_sink - n_window]
        lists.append(sink + sorted(best) + window)
    return lists
