"""make demo: ask a small model about a long document, dense and sparse, and draw what was attended to."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.table import Table

from kvcast import Llama, SparseConfig, models
from kvcast.chat.conversation import Conversation
from kvcast.cli.console import fetched, notes, progress
from kvcast.cores import usable_cores
from kvcast.eval.pictures import attended
from kvcast.eval.recovery import Recorder, recovery_of, true_scores
from kvcast.terminal import Console

ROOT = Path(__file__).resolve().parent.parent
console = Console(emoji=False)


def answer(llm: Llama, document: str, question: str, n_tokens: int) -> tuple[str, Conversation]:
    conversation = Conversation(llm, document)
    with progress("reading the document") as update:
        if llm.sparse is not None:
            llm.session.observers.on_progress = update
        conversation.read()
    text = "".join(conversation.ask(question, max_tokens=n_tokens, temperature=0.0, repeat_penalty=1.1))
    return text, conversation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--file", type=Path, default=ROOT / "scripts" / "demo.txt")
    parser.add_argument("--question", default="Who is Catherine Morland, and where does she travel with Mrs. Allen?")
    parser.add_argument("--budget", type=int, default=SparseConfig().budget)
    parser.add_argument("--tokens", type=int, default=120, help="length of the answers")
    parser.add_argument("--out", type=Path, default=ROOT / "out")
    options = parser.parse_args()

    path = fetched("smollm2")
    document = options.file.read_text(encoding="utf-8")
    n_ctx = models.find("smollm2").context
    n_threads = usable_cores()
    config = SparseConfig(budget=options.budget)
    console.print(f"[bold]{options.file.name}[/bold]: {options.question}\n")

    dense = Llama(path, n_ctx=n_ctx, n_threads=n_threads, verbose=False)  # llama-cpp-python's default, the faster on CPUs
    said, conversation = answer(dense, document, options.question, options.tokens)
    dense_figures = conversation.figures
    console.print(f"[bold]dense[/bold]\n{said.strip()}\n", highlight=False)
    dense.close()

    llm = Llama(path, n_ctx=n_ctx, sparse=config, verbose=False)
    session = llm.session
    session.observers.on_attended = recorder = Recorder(llm)
    said, conversation = answer(llm, document, options.question, options.tokens)
    session.observers.on_attended = None
    figures, times = conversation.figures, session.times
    console.print(f"[bold]sparse, {options.budget} of {llm.n_tokens:,} tokens per head and layer[/bold]\n{said.strip()}\n", highlight=False)

    # the answer once more, dense, to see where attention truly went
    n_steps = len(recorder.masks)
    tokens = llm.input_ids[llm.n_tokens - n_steps : llm.n_tokens].tolist()
    llm.n_tokens -= n_steps
    session.truncate(llm.n_tokens)
    with notes.status("measuring recovery"):
        recovery, middle = recovery_of(recorder.masks, true_scores(llm, tokens)[0], config)

    info = session.attached.info
    block_bytes = 16 * (info.k_row_bytes + info.v_row_bytes) // info.n_head_kv
    table = Table(box=None, pad_edge=False)
    for column in ("", "tok/s", "KV read per token", "recovery of attention", "first token"):
        table.add_column(column, justify="right" if column else "left")
    per_step = block_bytes / times.n_steps / 1e6
    rows = (
        ("dense", dense_figures, times.blocks_dense, "1"),
        ("sparse", figures, times.blocks_read, f"{recovery:.3f} (middle {middle:.3f})"),
    )
    for name, f, blocks, share in rows:
        table.add_row(name, f"{f.tok_s:.1f}", f"{blocks * per_step:.1f} MB", share, f"{f.first_token_s:.1f} s")
    console.print(table)
    console.print(
        f"speedup {figures.tok_s / dense_figures.tok_s:.2f}x, KV reads {times.blocks_dense / times.blocks_read:.1f}x less", highlight=False
    )
    console.print(str(config), style="dim", highlight=False)

    picture = options.out / "attended.png"
    title = f"Blocks attended to while answering: {path.name}, {llm.n_tokens:,} tokens, budget {options.budget}"
    attended([m for m in recorder.masks if m is not None], llm.session.attached.layers.tolist(), picture, title)
    console.print(f"picture: {picture}", highlight=False)
    llm.close()


if __name__ == "__main__":
    main()
