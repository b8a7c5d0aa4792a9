"""``kvcast plan``: its sums are what loading allocates, its choices hold what it says, wrong input gets one sentence."""

import json
from dataclasses import replace

import numpy as np
import pytest
import typer

from commands import command, one_sentence
from kvcast import KvcastError, Llama, ModelError, SparseConfig
from kvcast.cli import app as cli
from kvcast.gguf import memory as sizes
from kvcast.gguf.header import read_header
from kvcast.planning import gpu_cards as cards
from kvcast.planning import plan
from shapes import write_shape

GIB, MIB = 1 << 30, 1 << 20
EIGHT_B = dict(n_layer=32, n_embd=4096, n_ff=14336, n_head=32, n_head_kv=8, n_vocab=49152, n_ctx=262144)


@pytest.fixture(scope="module")
def eight_b(tmp_path_factory):
    return write_shape(tmp_path_factory.mktemp("shapes") / "8b.gguf", **EIGHT_B)


def own(x):
    """Whether it is an array, and not a view of what the native part holds."""
    return isinstance(x, np.ndarray) and x.base is None


@pytest.mark.parametrize(
    ("model", "path", "kv_type"),
    [
        ("smollm2", "host", "f16"), ("smollm2", "device", "q8_0"), ("qwen", "device", "f16"), ("qwen", "host", "q8_0"),
        ("gemma3", "host", "bf16"), ("gemma3", "device", "q4_0"),
    ],
)  # fmt: skip
def test_sums_are_what_loading_allocates(model, path, kv_type, request):
    import llama_cpp

    file = request.getfixturevalue(model)
    header, n_ctx, kind = read_header(file), 2000, sizes.KV_TYPES[kv_type]
    llm = Llama(file, n_ctx=n_ctx, sparse=SparseConfig(budget=512, path=path), type_k=kind, type_v=kind, n_threads=2, verbose=False)
    info, pool = llm.session.attached.info, llm.session.attached.pool_info
    real = {
        "weights": llama_cpp.llama_model_size(llm.model),
        "store": (info.n_layer * info.n_cells + header.n_layer_swa * 1024) * (info.k_row_bytes + info.v_row_bytes),  # window and batch
        "summary": info.summary_bytes,
        "scratch": info.scratch_bytes - info.summary_bytes,
        "pool": (pool.pool_bytes, pool.staging_bytes, pool.tap_bytes),
        "history": sum(x.nbytes for y in (llm.session.path, llm.session.history) for x in vars(y).values() if own(x)),
    }
    if path == "host":  # a second set of lists comes with the first selection beside a step
        lists = llm.session.path._lists
        real["history"] += sum(x.nbytes for x in vars(lists).values() if isinstance(x, np.ndarray))
    else:  # and what eight steps gave each slot with the first of them
        real["history"] += 4 * header.n_layer_served * header.n_head_kv * (1 + 8) * 512 // 16
    llm.close()
    assert header.weights_bytes == pytest.approx(real["weights"], rel=0.03)
    assert header.store_bytes(n_ctx, kind, kind, 512) == real["store"]
    held = sizes.allocated(header, n_ctx, kind, 512)
    assert held.scratch == real["scratch"]
    kept = 4 * header.n_layer_served * header.n_head_kv * info.n_blocks  # by the predictor
    assert sizes.history_bytes(header, n_ctx, 512 if path == "device" else 0) == pytest.approx(real["history"] + kept, rel=0.03)
    if path == "device":
        assert (held.pool, held.staging, held.taps) == real["pool"]
    else:
        assert held.summary == real["summary"]


def test_sums_of_odd_headers(tmp_path):
    header = read_header(write_shape(tmp_path / "m.gguf"))
    most = dict(n_layer=512, n_head=1 << 16, n_head_kv=1 << 16)  # what a header may claim
    for change in (most, {"n_head": 0, "n_head_kv": 0}, {"head_dim_k": 0}, {"head_dim_v": -4}):
        with pytest.raises(ModelError, match="no machine holds"):
            sizes.allocated(replace(header, **change), (1 << 31) - 256, 1, 1 << 27)
    held = sizes.allocated(replace(header, n_layer=64, n_head=16, n_head_kv=16), 1 << 30, 1, 1 << 30)  # more slots than 32 bits count
    assert held.pool == 64 * 16 * (1 << 30) * 2 * 64 * 2 and 0 < held.staging < held.pool


@pytest.mark.parametrize(
    ("path", "context", "mib"),
    [("device", 8192, 5447), ("device", 32768, 5749), ("device", 131072, 8699), ("dense", 8192, 6099), ("dense", 131072, 21939)],
)
def test_device_memory_of_an_8b_shape_is_what_an_h100_used(eight_b, path, context, mib):
    """At most, in the prompt: docs/benchmarks/2026-11-22.md; 1,024 tokens of room beside the context."""
    planner = plan.Planner(read_header(eight_b), "f16", 80 * GIB, 256 * GIB)
    parts = planner.parts(path, "device", context + 1024)
    assert plan.total(parts, "device") / MIB == pytest.approx(mib, rel=0.03)


def test_speed_of_an_8b_shape_on_an_h100(eight_b):
    """The constants were fitted to docs/benchmarks/2026-11-22.md: dense within a tenth, the device path within a quarter or so."""
    header, card = read_header(eight_b), cards.find("h100 sxm")
    for context, dense in ((8192, 292), (32768, 205), (131072, 93)):
        assert cards.dense_tok_s(card, header, context, "f16") == pytest.approx(dense, rel=0.1)
    for context, budget, sparse in ((8192, 2048, 182), (32768, 2048, 198), (131072, 8192, 120)):
        assert cards.sparse_forecast(card, header, context, budget, "f16", 80).tok_s == pytest.approx(sparse, rel=0.3)


def test_where_things_go(eight_b):
    fits = [plan.plan(eight_b, int(vram * GIB), 64 * GIB, 65536) for vram in (16, 6.2, 4, 0)]
    assert [(p.path, p.weights) for p in fits] == [("device", "device"), ("host", "device"), ("host", "host"), ("host", "host")]
    assert fits[0].dense_fits and not fits[1].dense_fits
    assert fits[0].budget == 4096 and fits[0].compression == pytest.approx(14, rel=0.1)
    for p in fits:
        assert p.context == 65536 <= p.largest_context
        assert p.device_bytes <= p.vram_bytes and p.host_bytes <= p.ram_bytes
        assert p.device_bytes == plan.total(p.parts, "device") and p.host_bytes == plan.total(p.parts, "host")
    small = plan.plan(eight_b, 8 * GIB, 16 * GIB)  # as much as fits
    assert 0 < small.context == small.largest_context < 131072
    planner = plan.Planner(read_header(eight_b), "f16", 8 * GIB, 16 * GIB)
    assert planner.fits(small.path, small.weights, small.context)
    assert not planner.fits(small.path, small.weights, small.context + 256)
    assert plan.plan(eight_b, 8 * GIB, 16 * GIB, kv_type="q8_0").context > 1.5 * small.context


def test_what_is_not_served_sparse_runs_dense(tmp_path):
    file = write_shape(
        tmp_path / "gemma.gguf", "gemma3", attention__sliding_window=512, attention__key_length=64, attention__value_length=64
    )
    p = plan.plan(file, 8 * GIB, 8 * GIB)
    assert (p.path, p.weights, p.budget, p.compression) == ("dense", "device", 0, 1.0)
    assert "sliding-window" in p.why_dense and "--dense" in p.command


def test_sliding_window_layers_keep_a_window(tmp_path):
    shape = dict(n_layer=12, attention__sliding_window=512, attention__key_length=64, attention__value_length=64)
    p = plan.plan(write_shape(tmp_path / "gemma.gguf", "gemma3", n_ctx=32768, **shape), 0, 8 * GIB)
    assert p.path == "host" and not p.why_dense
    row = 2 * 2 * 2 * 64
    assert {x.what: x.n_bytes for x in p.parts}["KV cache (store)"] == row * (2 * 32768 + 10 * 1024)


def test_the_command_line_is_one_that_chat_takes(eight_b):
    chat = typer.main.get_command(cli.app).commands["chat"]
    for vram, kv_type in ((16, "f16"), (5.2, "q8_0"), (0, "q4_0")):
        p = plan.plan(eight_b, int(vram * GIB), 64 * GIB, 32768, kv_type=kv_type)
        context = chat.make_context("chat", p.command.split()[2:])
        assert context.params["context"] == 32768 and context.params["gpu_layers"] == (-1 if p.weights == "device" else 0)
        config = SparseConfig(context.params["budget"], path=context.params["path"])
        assert config.budget == p.budget


def test_chat_takes_the_type_of_the_kv_cache(smollm2):
    done = command("chat", "--context", "512", "--kv-type", "q8_0")
    assert done.returncode == 0, done.stderr
    one_sentence(command("chat", "--kv-type", "f8"), "'f8'", "q8_0")


def test_command(smollm2, tmp_path):
    done = command("plan", "smollm2", "--ram", "16G", "--card", "rtx 3060", "--json", tmp_path / "plan.json")
    assert done.returncode == 0, done.stderr
    assert "tokens/s" in done.stdout and "~" in done.stdout and "kvcast chat --model smollm2" in done.stdout
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["vram_bytes"] == 12 * GIB and found["context"] == 8192 and found["forecast"]["tok_s"] > 0
    assert sum(p["n_bytes"] for p in found["parts"]) == found["device_bytes"] + found["host_bytes"]


@pytest.mark.parametrize(
    ("text", "n_bytes"), [("8G", 8 * GIB), ("800M", 800 * MIB), ("1.5GiB", GIB * 3 // 2), ("16 gb", 16 * GIB), ("0G", 0)]
)
def test_sizes(text, n_bytes):
    assert plan.parse_size(text) == n_bytes


@pytest.mark.parametrize("text", ["", "8", "8X", "-8G", "G", "8 G B", "eight", "1e3G", "nanG"])
def test_what_is_not_a_size(text):
    with pytest.raises(KvcastError, match="is not a size; write a number and a unit"):
        plan.parse_size(text)


def test_wrong_input(eight_b, tmp_path):
    one_sentence(command("plan", eight_b, "--vram", "8X"), "'8X' is not a size")
    one_sentence(command("plan", eight_b, "--card", "Voodoo 2"), "Voodoo 2", "RTX 3060", "RX 7900 XTX")
    with pytest.raises(KvcastError, match="context of 300000 tokens is not within the model's 1 to 262144"):
        plan.plan(eight_b, 8 * GIB, 8 * GIB, 300000)
    with pytest.raises(KvcastError, match="longest that fits is 41216"):
        plan.plan(eight_b, 0, 10 * GIB, 262144)
    with pytest.raises(KvcastError, match="not even the shortest fits"):
        plan.plan(eight_b, 0, 1 * GIB)
    with pytest.raises(KvcastError, match="'f8'; choose one of f16"):
        plan.plan(eight_b, 0, 8 * GIB, kv_type="f8")
    (tmp_path / "x.gguf").write_text("not a model")
    with pytest.raises(ModelError, match="not a GGUF"):
        plan.plan(tmp_path / "x.gguf", 0, 8 * GIB)
    with pytest.raises(ModelError, match="cannot load it"):
        plan.plan(write_shape(tmp_path / "teapot.gguf", "teapot"), 0, 8 * GIB)
    with pytest.raises(KvcastError, match="multiple of 32 channels"):
        plan.plan(write_shape(tmp_path / "narrow.gguf", n_embd=192, n_ff=256), 0, 8 * GIB, kv_type="q8_0")
    with pytest.raises(ModelError, match="join them"):
        plan.plan(write_shape(tmp_path / "part.gguf", **{"n_layer": 1, "split.count": 3}), 0, 8 * GIB)
