"""scripts/convert_hf.py: a checkpoint becomes a GGUF, quantised and with a predictor inside, in one command."""

import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest

from kvcast import Llama
from kvcast.planning.inspect_gguf import inspect
from logits import logits_of
from places import ROOT

SCRIPT = ROOT / "scripts" / "convert_hf.py"
MISSING = [name for name in ("torch", "transformers", "safetensors", "sentencepiece") if importlib.util.find_spec(name) is None]
needs_torch = pytest.mark.skipif(bool(MISSING), reason=f"the converter needs {', '.join(MISSING)}")


def run(*arguments):
    return subprocess.run([sys.executable, str(SCRIPT), *map(str, arguments)], capture_output=True, text=True, timeout=300)


@pytest.fixture
def checkpoint(tmp_path):
    """A llama of two layers with random weights and a tokenizer of bytes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path / "checkpoint"
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{i:02X}>": i + 3 for i in range(256)}, "\u2581": 259}
    vocabulary |= {chr(c): 260 + i for i, c in enumerate(range(97, 123))}
    vocabulary |= {f"filler{i}": len(vocabulary) + i for i in range(320 - len(vocabulary))}
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=1024, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder, safe_serialization=True)
    special = [{"id": i, "content": c, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
               for i, c in enumerate(("<unk>", "<s>", "</s>"))]  # fmt: skip
    normal = [{"type": "Prepend", "prepend": "\u2581"}, {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}]
    back = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
    decoder = {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}]}
    model = {"type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True, "vocab": vocabulary, "merges": []}
    tokenizer = {"version": "1.0", "added_tokens": special, "normalizer": {"type": "Sequence", "normalizers": normal},
                 "pre_tokenizer": None, "post_processor": None, "decoder": decoder, "model": model}  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    about = {"tokenizer_class": "LlamaTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "legacy": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return folder


@needs_torch
def test_checkpoint_to_gguf(checkpoint, tmp_path):
    done = run(checkpoint, tmp_path / "out.gguf", "--quantize", "Q4_K_M", "--predictor", "stream")
    assert done.returncode == 0, done.stderr[-2000:]
    found = inspect(tmp_path / "out.gguf")
    assert found["architecture"] == "llama" and found["quantisation"] == "Q4_K - Medium" and found["sparse"]
    assert found["shape"]["layers"] == 2 and found["shape"]["kv_heads"] == 2 and found["context"] == 1024
    assert found["embedded_predictor"]["name"] == "stream" and found["embedded_predictor"]["intact"]
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint", "out.gguf"}

    done = run(checkpoint, tmp_path / "plain.gguf")
    assert done.returncode == 0, done.stderr[-2000:]
    assert inspect(tmp_path / "plain.gguf")["embedded_predictor"] is None

    import torch
    from transformers import LlamaForCausalLM

    tokens = [1, 264, 270, 260, 281]
    with torch.no_grad():
        expected = LlamaForCausalLM.from_pretrained(checkpoint)(torch.tensor([tokens])).logits[0, -1].numpy()
    llm = Llama(tmp_path / "plain.gguf", n_ctx=256, n_threads=2, verbose=False)
    llm.eval(tokens)
    got = logits_of(llm)
    llm.close()
    assert np.abs(got - expected).max() < 0.05 * np.abs(expected).max()


def test_wrong_input(tmp_path):
    for arguments, words in (
        ((tmp_path, tmp_path / "x.gguf", "--quantize", "Q9"), ("no quantisation 'Q9'", "Q4_K_M")),
        ((tmp_path, tmp_path / "x.gguf", "--predictor", "oracle9"), ("no predictor", "stream")),
        ((tmp_path, tmp_path / "x.gguf"), ("converting needs",) if MISSING else ("no config.json",)),
    ):
        done = run(*arguments)
        assert done.returncode == 1 and "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr
        for word in words:
            assert word in done.stderr
