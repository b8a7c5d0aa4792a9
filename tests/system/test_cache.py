"""Documents on disk: opened again they continue as if they had just been read; what is damaged or too much is left."""

import contextlib
import errno
import gc
import os
import resource
import stat
import subprocess
import sys

import numpy as np
import pytest

from commands import command
from kvcast import GenerationError, KvcastError, Llama, SparseConfig, files
from kvcast.chat.conversation import Conversation
from kvcast.chat.documents import DocumentCache
from kvcast.llama import session_file
from kvcast.llama.session_file import STATE_HEADER
from logits import logits_of
from shapes import write_shape

SHARED = dict(n_ctx=2048, n_threads=2, n_threads_batch=2, verbose=False)


@pytest.fixture(params=["sparse", "dense"])
def load(request, small):
    made = []

    def make(**more):
        config = {"sparse": SparseConfig(budget=256)} if request.param == "sparse" else {"flash_attn": True}
        made.append(Llama(small, **{**SHARED, **config, **more}))
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
    assert answers[0] == answers[1] != "" and cache.entries()[0].title == "code"


def test_reading_can_be_stopped_quietly(small, code, capfd):
    llm = Llama(small, sparse=SparseConfig(budget=256), **SHARED)
    conversation = Conversation(llm, code[:4000])
    llm.session.observers.on_progress = lambda *_: conversation.stop()
    with pytest.raises(GenerationError):
        conversation.read()
    assert conversation.stopped and "graph_compute" not in capfd.readouterr().err
    llm.session.observers.on_progress = None
    conversation.read()
    assert llm.n_tokens > 1000 and not conversation.stopped
    llm.close()


def test_chat_opens_a_document_again(small, code, tmp_path):
    document = tmp_path / "[bold]code.txt"
    document.write_text(code[:4000])
    command = [
        sys.executable,
        "-m",
        "kvcast.cli",
        "chat",
        "-m",
        str(small),
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


# ---- what is in the folder: ours or not, whole or not, to be read or not; on tiny models


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with two documents, and the model that has read them."""
    folder = tmp_path_factory.mktemp("tiny")
    llm = Llama(write_shape(folder / "tiny.gguf", vocabulary="llama"), n_ctx=1024, n_threads=1, verbose=False)
    yield llm
    llm.close()


@pytest.fixture
def folder(tiny, tmp_path):
    cache = DocumentCache(tmp_path / "documents")
    for n in (520, 530):
        tiny.reset()
        tiny.eval([5] * n)
        assert cache.save(tiny, [5] * n, f"of {n} tokens")
    return cache


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def foreign(folder):
    """Files of others: any name, any content, also such as look like ours."""
    made = {
        "notes.kv": b"mine",
        "llama.kv": STATE_HEADER.pack(0x6767736E, 9, 3) + bytes(100),  # a state of llama.cpp, by another program
        "0" * 31 + ".kv": b"",
        "0" * 32 + ".KV": b"",
        "g" * 32 + ".kv": b"",
        "1" * 32 + ".kv": b"",
        "2" * 32 + ".kv": b"GGUF" + bytes(1000),
        "x.part": b"",
        "3" * 32 + ".123.part": b"",
    }
    for name, content in made.items():
        (folder / name).write_bytes(content)
    (folder / ("4" * 32 + ".kv")).mkdir()
    (folder / ("5" * 32 + ".kv")).symlink_to(folder / "notes.kv")
    os.mkfifo(folder / ("6" * 32 + ".kv"))
    return {*made, *(f"{i * 32}.kv" for i in "456")}


def names(folder):
    return {p.name for p in folder.iterdir()}


def test_what_is_not_ours_stays(folder, tiny):
    ours = names(folder.folder)
    others = foreign(folder.folder)
    for look in (folder.entries, folder.look, lambda: folder.save(tiny, [5] * 530, "again"), folder.entries):
        look()
        assert names(folder.folder) == ours | others
    assert {e.title for e in folder.entries()} == {"of 520 tokens", "again"}
    assert len(folder.look().others) == 9 and not folder.look().damaged
    folder.limit_bytes = folder.entries()[0].n_bytes + 1000  # room for one
    assert folder.save(tiny, [5] * 530, "again")
    assert len(folder.entries()) == 1 and others < names(folder.folder)
    assert folder.clear() > 1000
    assert names(folder.folder) == others


def test_commands_say_what_stays(folder, tiny):
    foreign(folder.folder)
    (path,) = [p for p in folder.folder.iterdir() if p.is_file() and p.stat().st_size > 10000 and p.stat().st_size == max(
        q.stat().st_size for q in folder.folder.iterdir() if q.is_file())]  # fmt: skip
    os.truncate(path, path.stat().st_size - 3)
    environment = {"KVCAST_DOCUMENTS": str(folder.folder)}
    before = names(folder.folder)
    done = command("cache", **environment)
    assert done.returncode == 0 and "of 520 tokens" in done.stdout and "1 damaged" in done.stderr and "notes.kv" in done.stderr
    assert names(folder.folder) == before
    done = command("cache", "--clear", **environment)
    assert done.returncode == 0 and "notes.kv" in done.stderr and "damaged" not in done.stderr
    assert len(before - names(folder.folder)) == 2


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EACCES, errno.EIO, errno.ENFILE, errno.ESTALE, errno.ENOMEM])
def test_what_cannot_be_read_now_stays(folder, tiny, monkeypatch, number):
    ours = names(folder.folder)

    def fail(*_):
        raise OSError(number, os.strerror(number))

    for target, name in ((files, "open_regular"), (session_file, "_fill"), (os, "open")):
        with monkeypatch.context() as patched:
            patched.setattr(target, name, fail)
            assert len(folder.look().others) == (2 if name != "_fill" else 0)
            assert not folder.load(tiny, [5] * 520)
            if name != "os.open":
                folder.clear() if name != "_fill" else None
            if name != "_fill":
                assert names(folder.folder) == ours
    assert names(folder.folder) == ours
    assert folder.load(tiny, [5] * 520) and tiny.n_tokens == 520


def test_when_files_run_out(folder, tiny):
    """Really."""
    ours = names(folder.folder)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = []

    def leave(n_free):
        gc.collect()  # of tests before this one
        with contextlib.suppress(OSError):
            while True:
                held.append(os.open("/dev/null", os.O_RDONLY))
        for _ in range(n_free):
            os.close(held.pop())

    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        leave(0)
        assert not folder.load(tiny, [5] * 520)
        with pytest.raises(KvcastError, match=r"cannot be listed .*Too many open files"):
            folder.entries()
        leave(1)  # one file at a time
        assert len(folder.entries()) == 2
        leave(0)
        with pytest.raises(KvcastError, match="Too many open files"):
            folder.save(tiny, [5] * 540, "x")
    finally:
        for descriptor in held:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert names(folder.folder) == ours and len(folder.entries()) == 2


def test_damage_is_removed_and_said_when_it_is_met(folder, tiny, caplog):
    first, second = sorted(folder.folder.iterdir(), key=lambda p: p.stat().st_size)
    with first.open("r+b") as file:
        file.seek(-5000, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    os.truncate(second, second.stat().st_size // 2)
    assert len(folder.entries()) == 1 and len(folder.look().damaged) == 1 and len(names(folder.folder)) == 2
    assert not folder.load(tiny, [5] * 520)
    assert not first.exists() and "was damaged (its checksum does not match) and is removed" in caplog.text
    folder.save(tiny, [5] * 540, "x")
    assert not second.exists() and caplog.text.count("removed") == 2


def test_documents_of_an_older_version_are_listed_and_go_in_turn(folder, tiny):
    for path in folder.folder.iterdir():
        data = path.read_bytes()
        path.write_bytes(data[:-12] + (1).to_bytes(4, "little") + data[-8:])
    assert len(folder.entries()) == 2 and not folder.look().damaged
    assert not folder.load(tiny, [5] * 520) and len(folder.entries()) == 2
    folder.clear()
    assert not names(folder.folder)


def test_documents_are_their_owners(tiny, tmp_path):
    before = os.umask(0)
    try:
        cache = DocumentCache(tmp_path / "kvcast" / "documents")
        tiny.reset()
        tiny.eval([5] * 520)
        assert cache.save(tiny, [5] * 520, "x")
        assert {mode(p) for p in (cache.folder, cache.folder.parent)} == {0o700}
        assert {mode(p) for p in cache.folder.iterdir()} == {0o600}
        cache.folder.chmod(0o755)  # as an older kvcast left it
        cache.save(tiny, [5] * 520, "x")
        assert mode(cache.folder) == 0o700
        tiny.save_session(tmp_path / "x")
        assert mode(tmp_path / "x") == 0o600
    finally:
        os.umask(before)


def test_what_another_process_writes_is_not_removed(folder, tiny):
    with files.replacing(folder.folder / ("7" * 32 + ".kv"), private=True) as file:
        file.write(b"half")
        assert folder.save(tiny, [5] * 530, "again")
        folder.clear()
        assert len(names(folder.folder)) == 1
    assert names(folder.folder) == {"7" * 32 + ".kv"}
