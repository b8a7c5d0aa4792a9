"""What users get wrong: one clear sentence each, an exit code that is not 0, and nothing lost."""

import subprocess
import sys

import pytest

from commands import command, one_sentence
from kvcast import CallbackError, Llama, ModelError, SparseConfig, SparseUnsupported
from places import DATA


@pytest.fixture(scope="module")
def truncated(smollm2, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "cut.gguf"
    path.write_bytes(smollm2.read_bytes()[:30_000_000])
    return path


def test_wrong_model_path():
    one_sentence(command("chat", "--model", "nowhere/model.gguf"), "nowhere/model.gguf", "smollm2")


def test_wrong_document_path():
    one_sentence(command("chat", "--file", "nowhere.txt"), "nowhere.txt")


def test_binary_document(tmp_path):
    (tmp_path / "x.txt").write_bytes(bytes(range(128, 256)))
    one_sentence(command("chat", "--file", tmp_path / "x.txt"), "UTF-8")


def test_truncated_gguf(truncated):
    one_sentence(command("chat", "--model", truncated), "cut short", "30000000")
    with pytest.raises(ModelError, match="cut short"):
        Llama(truncated)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF" + b"\xff" * 200, b"PK\x03\x04" + b"x" * 100])
def test_not_a_gguf(tmp_path, content):
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(ModelError):
        Llama(tmp_path / "x.gguf", verbose=False)


def test_budget_below_sink_and_window():
    one_sentence(command("chat", "--budget", "80"), "budget is 80", "96")


@pytest.mark.parametrize(
    "wrong",
    [{"sink": 20}, {"window": 0}, {"hold": 0}, {"predictor": "magic"}, {"calibrate": "often"}, {"calibrate": "dense:0"},
     {"budget": 512.5}, {"compression": 0.5}, {"budget_allocation": "even"}, {"path": "moon"},
     {"budget": 400, "path": "device"}, {"compression": 8.0, "path": "device"},
     {"calibrate": "summary", "path": "device"}],
    ids=str,
)  # fmt: skip
def test_config(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SparseConfig(**wrong)
    with pytest.raises(TypeError):
        SparseConfig(bugdet=512)


def test_context_beyond_memory():
    one_sentence(command("chat", "--context", "100000000"), "100000000 tokens", "GiB", "would fit")


def test_document_beyond_the_context():
    one_sentence(command("chat", "--context", "512", "--file", DATA / "code.txt"), "larger --context")


def test_text_too_short_for_the_bench(tmp_path):
    (tmp_path / "x.txt").write_text("A short text.")
    one_sentence(command("bench", "--context", "1024", "--text", tmp_path / "x.txt"), "tokens", "longer text")


def test_misspelt_argument(smollm2):
    with pytest.raises(TypeError, match="did you mean 'n_ctx'"):
        Llama(smollm2, n_ctxx=512)
    done = command("chat", "--bugdet", "512")
    assert done.returncode != 0 and "bugdet" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("contradiction", [{"offload_kqv": True}, {"flash_attn": False}, {"embedding": True}], ids=str)
def test_contradictions(smollm2, contradiction):
    with pytest.raises(ValueError, match="contradicts"):
        Llama(smollm2, sparse=SparseConfig(), **contradiction)


def test_a_context_holds_one_sequence(smollm2):
    """Every way to several of them: no argument, no embeddings."""
    with pytest.raises(TypeError, match="no argument 'n_seq_max'"):
        Llama(smollm2, n_seq_max=2, sparse=SparseConfig())
    llm = Llama(smollm2, n_ctx=256, sparse=SparseConfig(budget=160), verbose=False)
    with pytest.raises(RuntimeError, match="embedding=True"):
        llm.embed(["one", "two"])
    llm.close()


@pytest.mark.parametrize("path", ["host", "device"])
def test_a_failing_callback_stops_generation_and_keeps_the_session(smollm2, path):
    llm = Llama(smollm2, n_ctx=1024, sparse=SparseConfig(budget=256, path=path), n_threads=2, verbose=False)
    prompt = llm.tokenize((DATA / "code.txt").read_bytes())[:500]
    expected = [t for t, _ in zip(llm.generate(prompt, temp=0.0), range(12))]

    calls = []

    def fail(layer, step, scores):
        calls.append((layer, step, scores.shape))
        if step == 503 and layer == 7:
            raise ZeroDivisionError("in the callback")

    llm.reset()
    llm.on_attention(fail)
    got = []
    with pytest.raises(CallbackError, match="ZeroDivisionError: in the callback") as caught:
        for token in llm.generate(prompt, temp=0.0):
            got.append(token)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert llm.n_tokens == 503 and got == expected[:4]
    layers = [layer for layer, step, _ in calls if step == 502]
    assert layers == list(range(30))
    assert calls[-1] == (7, 503, (3, 32))
    llm.on_attention(None)
    llm.eval(expected[3:4])
    assert llm.n_tokens == 504
    llm.close()


def test_what_cannot_be_sparse_says_why_and_runs_dense(smollm2):
    import llama_cpp

    from kvcast.bindings.context import NativeContext

    for options, reason in (
        ({"flash_attn": False}, "flash attention is off"),
        ({"embedding": True, "flash_attn": True}, "several sequences"),
    ):
        llm = llama_cpp.Llama(str(smollm2), n_ctx=512, verbose=False, offload_kqv=False, **options)
        with pytest.raises(SparseUnsupported, match=reason):
            NativeContext(llm.ctx)
        llm.close()


def test_llama_cpp_imported_first_with_other_libraries(tmp_path):
    script = (
        "import sys, types; m = types.ModuleType('llama_cpp.llama_cpp'); m._base_path = '/elsewhere'; "
        "sys.modules['llama_cpp.llama_cpp'] = m; from kvcast import Llama"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode != 0 and "import kvcast first" in done.stderr
