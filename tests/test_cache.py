"""Documents on disk: opened again they continue as if they had just been read; what is damaged or too much is left."""

import os
import subprocess
import sys

import numpy as np
import pytest

from kvcast import GenerationError, KvcastError, Llama, SparseConfig
from kvcast.cache import DocumentCache
from kvcast.chat import Conversation
from test_contract import logits_of

SHARED = dict(n_ctx=2048, n_threads=2, n_threads_batch=2, verbose=False)


@pytest.fixture(params=["sparse", "dense"])
def load(request, smollm2):
    made = []

    def make(**more):
        config = {"sparse": SparseConfig(budget=256)} if request.param == "sparse" else {"flash_attn": True}
        made.append(Llama(smollm2, **{**SHARED, **config, **more}))
        return made[-1]

    yield make
    for llm in made:
        llm.close()


def after(llm, tokens):
    llm.eval(tokens[:5])
    for token in tokens[5:]:
        llm.eval([token])
    return logits_of(llm)


def test_opened_again_it_goes_on_the_same(load, code, tmp_path):
    cache = DocumentCache(tmp_path)
    llm = load()
    tokens = llm.tokenize(code.encode())[:1200]
    assert not cache.load(llm, tokens[:1180])
    llm.eval(tokens[:1180])
    assert cache.save(llm, tokens[:1180], "code.txt")
    expected = after(llm, tokens[1180:])
    assert [(e.title, e.n_tokens) for e in cache.entries()] == [("code.txt", 1180)]

    again = load(n_ctx=4096)  # the context may be of another size
    assert cache.load(again, tokens[:1180]) and again.n_tokens == 1180
    assert again.sparse is None or again.session.history.primed
    np.testing.assert_array_equal(after(again, tokens[1180:]), expected)
    assert not cache.load(again, tokens[:1179])
    assert not cache.load(load(type_k=8), tokens[:1180])


def test_what_is_damaged_is_removed(load, code, tmp_path):
    cache = DocumentCache(tmp_path)
    llm = load()
    tokens = llm.tokenize(code.encode())[:700]
    llm.eval(tokens)
    for spoil in ("flip", "cut"):
        assert cache.save(llm, tokens, "x")
        (state,) = tmp_path.iterdir()
        if spoil == "flip":
            with state.open("r+b") as file:
                file.seek(state.stat().st_size // 2)
                byte = file.read(1)[0]
                file.seek(-1, os.SEEK_CUR)
                file.write(bytes([byte ^ 1]))
        else:
            os.truncate(state, state.stat().st_size - 5)
            assert not cache.entries()
        assert not cache.load(llm, tokens)
        assert not list(tmp_path.iterdir()) and llm.n_tokens == 700


def test_the_limit_and_what_cannot_be_written(load, code, tmp_path):
    llm = load()
    tokens = llm.tokenize(code.encode())
    llm.eval(tokens[:520])
    cache = DocumentCache(tmp_path)
    assert cache.save(llm, tokens[:520], "first")
    one = cache.entries()[0].n_bytes
    cache.limit_bytes = int(2.5 * one)
    for n, title in ((530, "second"), (540, "third")):
        llm.eval(tokens[llm.n_tokens : n])
        assert cache.save(llm, tokens[:n], title)
    assert [e.title for e in cache.entries()] == ["third", "second"]
    assert not DocumentCache(tmp_path, one // 2).save(llm, tokens[:540], "too large")
    assert not cache.save(llm, tokens[:100], "too short")
    (tmp_path / ".kvcast-dead.part").touch()
    assert cache.clear() > 2 * one * 0.9 and not list(tmp_path.iterdir())

    (tmp_path / "file").touch()
    with pytest.raises(KvcastError, match="cannot be kept"):
        DocumentCache(tmp_path / "file").save(llm, tokens[:540], "x")
    llm.eval(tokens[540:545])
    assert llm.n_tokens == 545


def test_a_conversation_says_whether_it_was_kept(load, code, tmp_path):
    cache = DocumentCache(tmp_path)
    answers = []
    for kept in (False, True):
        conversation = Conversation(load(), code[:3000])
        assert conversation.read(cache, "code") == kept
        answers.append("".join(conversation.ask("What is this?", max_tokens=8, temperature=0.0)))
    assert answers[0] and cache.entries()[0].title == "code"


def test_reading_can_be_stopped_quietly(smollm2, code, capfd):
    llm = Llama(smollm2, sparse=SparseConfig(budget=256), **SHARED)
    conversation = Conversation(llm, code[:4000])
    llm.session.on_progress = lambda *_: conversation.stop()
    with pytest.raises(GenerationError):
        conversation.read()
    assert conversation.stopped and "graph_compute" not in capfd.readouterr().err
    llm.session.on_progress = None
    conversation.read()
    assert llm.n_tokens > 1000 and not conversation.stopped
    llm.close()


def test_chat_opens_a_document_again(smollm2, code, tmp_path):
    document = tmp_path / "[bold]code.txt"
    document.write_text(code[:4000])
    command = [
        sys.executable,
        "-m",
        "kvcast.cli",
        "chat",
        "-m",
        str(smollm2),
        "-f",
        str(document),
        "--context",
        "2048",
        "--max-tokens",
        "4",
    ]
    for options, word in (([], "read"), ([], "opened"), (["--no-cache"], "read")):
        env = {**os.environ, "KVCAST_DOCUMENTS": str(tmp_path / "kept")}
        done = subprocess.run([*command, *options], input="Why?\n", capture_output=True, text=True, env=env, timeout=120)
        assert done.returncode == 0 and f"{word} " in done.stderr, done.stderr
    listed = subprocess.run([sys.executable, "-m", "kvcast.cli", "cache"], capture_output=True, text=True, env=env)
    assert "[bold]code.txt" in listed.stdout
    subprocess.run([sys.executable, "-m", "kvcast.cli", "cache", "--clear"], check=True, env=env)
    assert not list((tmp_path / "kept").iterdir())
