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


def cell_scores(q, k, cells, scale):
    """Attention of the queries of one KV head over cells: q (group, d), k (n_cells, d). Probabilities (group, n), log-sum-exp (group,)."""
    logits = q.astype(np.float64) @ k[cells].astype(np.float64).T * scale
    top = logits.max(1)
    lse = top + np.log(np.exp(logits - top[:, None]).sum(1))
    return np.exp(logits - lse[:, None]), lse


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


def spread(scores, begin, end, total, floor, cap):
    """How many blocks each row keeps: its best `floor`, then the best of all rows' next ones up to `cap` each."""
    keep = [floor] * len(scores)
    rest = sorted((-s, row) for row, r in enumerate(scores) for s in sorted(r[begin:end], reverse=True)[floor:cap])
    for _, row in rest[: max(0, total - floor * len(scores))]:
        keep[row] += 1
    return keep


def select(scores, n_used, n_budget, n_sink, n_window, budgets="uniform"):
    """A list of ascending ids per row."""
    if n_budget >= n_used:
        return [list(range(n_used)) for _ in scores]
    sink, window = list(range(n_sink)), list(range(max(n_sink, n_used - n_window), n_used))
    n_critical = min(n_budget - n_sink - n_window, window[0] - n_sink)
    keep = [n_critical] * len(scores)
    if budgets == "spread":
        keep = spread(scores, n_sink, window[0], n_critical * len(scores), n_critical // 4, min(window[0] - n_sink, 8 * n_critical))
    lists = []
    for row, n in zip(scores, keep):
        middle = [b for b in range(n_sink, window[0]) if row[b] >= 0]
        best = sorted(middle, key=lambda b: (-row[b], b))[:n]
        lists.append(sink + sorted(best) + window)
    return lists


def summary(keys, q_power, n_channels, n_probed, q):
    """Estimated attention of one KV head's queries to complete blocks.

    keys (n_blocks, 16, d) float, q_power (d,), q (group, d) scaled. Returns (n_blocks,): mean over the group of the sum of
    exp(logit), and the log-sum-exp is the caller's to subtract: logits (group, n_blocks, 16) are returned instead.
    """
    n_blocks, _, d = keys.shape
    sample = keys[np.arange(min(64, n_blocks)) * n_blocks // min(64, n_blocks)]
    low, high = sample.min((0, 1)), sample.max((0, 1))
    center, scale = (low + high) / 2, np.maximum(1.1 * (high - low) / 2 / 127, 1e-6)
    spread = ((sample - sample.mean(1, keepdims=True)) ** 2).sum((0, 1))
    kept = np.argsort(-spread * q_power)[:n_channels]
    probed = kept[np.argsort(-np.abs(q).sum(0)[kept] * np.sqrt(spread)[kept])[:n_probed]]

    def coded(x):
        return center + scale * np.rint(np.clip((x - center) / scale, -127, 127))

    rest = np.setdiff1d(np.arange(d), probed)
    base = coded(keys.mean(1))[:, rest] @ q[:, rest].T  # (n_blocks, group)
    return np.einsum("bjc,gc->gbj", coded(keys)[:, :, probed], q[:, probed]) + base.T[:, :, None]


def difference(table, n_slots, wanted, first):
    """Blocks to bring to each row, and the slots that may take them: those that hold nothing wanted."""
    moves = []
    for row, blocks in enumerate(wanted):
        there = set(table[row, first : n_slots[row]].tolist())
        missing = [b for b in blocks if b not in there]
        free = [s for s in range(first, n_slots[row]) if table[row, s] not in blocks]
        moves.append(list(zip(free, missing)))
    return moves


def gather(rows_of_layers, head_bytes, moves):
    """rows_of_layers: (n_cells, row_bytes) by layer; moves: (layer, head, block)."""
    blocks = [rows_of_layers[layer][b * 16 : b * 16 + 16, h * head_bytes : (h + 1) * head_bytes] for layer, h, b in moves]
    return np.concatenate([b.ravel() for b in blocks])


def exp2_linear(x):
    """2^x as the summary estimates it: linear between whole x, as the bits of a float are."""
    return (np.clip(x, -126, 100) * 8388608.0 + 1064866805.0).astype(np.int32).view(np.float32)
