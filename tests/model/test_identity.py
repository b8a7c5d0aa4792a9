"""Sessions and kept documents belong to the content of a model's files, all of it; looked at once, and again when a file may be another."""

import functools
import json
import os
import stat
import time

import gguf
import numpy as np
import pytest

from kvcast import Llama, SessionError, SparseConfig
from kvcast.chat.documents import DocumentCache
from kvcast.gguf import identity
from kvcast.gguf.reader import GgufFile
from tiny import N_EMBD, N_HEAD, SHAPES, write_tiny

SHARED = dict(n_ctx=768, n_batch=64, n_threads=1, n_threads_batch=1, verbose=False)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A cache folder of its own, and nothing known."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(identity, "_found", {})
    return tmp_path / "cache" / "kvcast" / "identity"


@pytest.fixture
def hashed(monkeypatch):
    """How often a file was read for its hash."""
    calls = []
    real = identity._hash
    monkeypatch.setattr(identity, "_hash", lambda *a: calls.append(a) or real(*a))
    return calls


@pytest.fixture
def model(tmp_path):
    path = write_tiny(tmp_path / "tiny.gguf", SHAPES["llama"])
    os.utime(path, ns=(time.time_ns() - 10**12,) * 2)
    return path


def load(path, **more):
    return Llama(path, sparse=SparseConfig(budget=96, predictor="ema", untested=True), **{**SHARED, **more})


def change_in_the_middle(path):
    """A fine-tune of the same size: another byte, far from both ends. Times are set back."""
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def digest(path):
    return identity.digest(identity.stamps([str(path)]))


@pytest.mark.parametrize("where", ["another file", "the same file", "the same file, and its inode"])
def test_a_model_that_differs_in_one_byte_is_another(model, tmp_path, where):
    tokens = [3 + i % 500 for i in range(600)]
    documents = DocumentCache(tmp_path / "documents")
    with_it = load(model)
    with_it.eval(tokens)
    assert documents.save(with_it, tokens, "x")
    with_it.save_session(tmp_path / "x")
    with_it.close()
    other = model
    if where == "another file":
        other = tmp_path / "other.gguf"
        other.write_bytes(model.read_bytes())
    elif where == "the same file":
        (tmp_path / "copy").write_bytes(model.read_bytes())
        (tmp_path / "copy").replace(model)
    change_in_the_middle(other)
    llm = load(other)
    assert not documents.load(llm, tokens)
    with pytest.raises(SessionError, match=r"saved with another model, 'tiny\.gguf'"):
        llm.load_session(tmp_path / "x")
    llm.close()


def test_every_byte_counts(tmp_path):
    path = tmp_path / "x"
    data = bytearray(np.random.default_rng(0).bytes(3 * identity.CHUNK + 5))
    seen = set()
    for at in (None, 0, identity.CHUNK - 1, identity.CHUNK, len(data) // 2, len(data) - 1):
        if at is not None:
            data[at] ^= 1
        path.write_bytes(data)
        seen.add(digest(path))
        if at is not None:
            data[at] ^= 1
    for content in (b"", b"\0", bytes(identity.CHUNK), bytes(identity.CHUNK + 1), data[identity.CHUNK :] + data[: identity.CHUNK]):
        path.write_bytes(content)
        seen.add(digest(path))
    assert len(seen) == 11


def test_it_is_looked_at_once(model, hashed, home, monkeypatch):
    time.sleep(0)  # the file's times lie back, but the time of its last change is now
    monkeypatch.setattr(identity, "SETTLED_S", -1)
    first = digest(model)
    assert digest(model) == first and len(hashed) == 1
    identity._found.clear()  # another process
    assert digest(model) == first and len(hashed) == 1
    kept = home / identity.NAME
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600 and stat.S_IMODE(home.stat().st_mode) == 0o700
    (model.parent / "link.gguf").symlink_to(model)
    assert digest(model.parent / "link.gguf") == first


def test_a_file_that_may_still_change_is_not_remembered(model, hashed, home):
    digest(model)
    assert not home.exists() and len(hashed) == 1


@pytest.mark.parametrize("how", ["size", "time", "change", "inode"])
def test_it_is_looked_at_again(model, hashed, monkeypatch, how):
    monkeypatch.setattr(identity, "SETTLED_S", -1)
    digest(model)
    identity._found.clear()
    before = model.stat()
    if how == "size":
        with model.open("ab") as file:
            file.write(b"x")
    elif how == "time":
        os.utime(model, ns=(0, before.st_mtime_ns + 1))
    elif how == "change":  # all that a program can set is as it was
        change_in_the_middle(model)
        assert (model.stat().st_size, model.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    else:
        (model.parent / "copy").write_bytes(model.read_bytes())
        os.utime(model.parent / "copy", ns=(0, before.st_mtime_ns))
        (model.parent / "copy").replace(model)
    digest(model)
    assert len(hashed) == 2


ODD = [b"", b"{", b"[]", b"null", b"\xff", b"[" * 9999, b'{"a": 1}', b'{"a": []}', b'{"a": [1,2,3,4,5,6,7]}', b'{"a": [1,2,3,4,5,"x"]}']


@pytest.mark.parametrize("content", ODD, ids=range(len(ODD)))
def test_what_is_remembered_may_be_damaged(model, hashed, home, monkeypatch, content):
    monkeypatch.setattr(identity, "SETTLED_S", -1)
    expected = digest(model)
    identity._found.clear()
    (home / identity.NAME).write_bytes(content)
    assert digest(model) == expected and len(hashed) == 2
    assert json.loads((home / identity.NAME).read_text())


def test_somebody_elses_word_is_not_taken(model, hashed, home, monkeypatch):
    monkeypatch.setattr(identity, "SETTLED_S", -1)
    expected = digest(model)
    kept = home / identity.NAME
    forged = kept.read_text().replace(expected, "0" * 64)
    of_file = json.loads(kept.read_text())[str(model)][5]
    forged = kept.read_text().replace(of_file, "0" * 64)
    kept.write_text(forged)
    kept.chmod(0o666)  # anybody could have
    identity._found.clear()
    assert digest(model) == expected and len(hashed) == 2


def test_no_place_to_remember(model, hashed, monkeypatch, tmp_path):
    monkeypatch.setattr(identity, "SETTLED_S", -1)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    first = digest(model)
    identity._found.clear()
    assert digest(model) == first and len(hashed) == 2


def test_a_model_that_is_replaced_while_it_is_used(model, tmp_path):
    """What lies under the name now has not made the session."""
    llm = load(model)
    llm.eval([5, 6, 7])
    (tmp_path / "new").write_bytes(model.read_bytes())
    change_in_the_middle(tmp_path / "new")
    (tmp_path / "new").replace(model)
    with pytest.raises(SessionError, match="was changed after it was loaded"):
        llm.save_session(tmp_path / "x")
    assert not (tmp_path / "x").exists()
    assert not DocumentCache(tmp_path / "documents").load(llm, [5, 6, 7])
    model.unlink()
    with pytest.raises(SessionError, match="cannot be read"):
        llm.save_session(tmp_path / "x")
    llm.eval([8])
    assert llm.n_tokens == 4
    llm.close()


def test_further_links_and_permissions_change_nothing(model, tmp_path):
    llm = load(model)
    llm.eval([5, 6, 7])
    os.link(model, tmp_path / "link")
    model.chmod(0o400)
    llm.save_session(tmp_path / "x")
    llm.load_session(tmp_path / "x")
    llm.close()


def test_a_model_in_parts_is_all_of_them(tmp_path, monkeypatch):
    whole = write_tiny(tmp_path / "whole.gguf", SHAPES["llama"])
    with GgufFile(whole) as gguf:
        assert gguf.get("split.count", 1) == 1
    parts = [tmp_path / f"model-{i:05d}-of-00003.gguf" for i in (1, 2, 3)]
    assert identity.files_of(parts[0], 3) == [str(p) for p in parts]
    assert identity.files_of(whole, 1) == identity.files_of(whole, 3) == [str(whole)]
    for i, part in enumerate(parts):
        part.write_bytes(bytes([i]) * 100)
    seen = {identity.digest(identity.stamps([str(p) for p in parts]))}
    for part in parts:
        change_in_the_middle(part)
        seen.add(identity.digest(identity.stamps([str(p) for p in parts])))
    assert len(seen) == 4
    parts[1].unlink()
    with pytest.raises(SessionError, match="cannot be read"):
        identity.digest(identity.stamps([str(p) for p in parts]))


def test_a_real_model_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf, "GGUFWriter", functools.partial(gguf.GGUFWriter, split_max_tensors=8))
    write_tiny(tmp_path / "tiny.gguf", SHAPES["llama"])
    parts = sorted(tmp_path.glob("tiny-*.gguf"))
    assert len(parts) > 2
    llm = load(parts[0])
    assert [s.path for s in llm._stamps] == [str(p) for p in parts]
    llm.eval([5, 6, 7])
    llm.save_session(tmp_path / "x")
    llm.close()
    change_in_the_middle(parts[-1])
    other = load(parts[0])
    with pytest.raises(SessionError, match="another model"):
        other.load_session(tmp_path / "x")
    other.close()


def write_lora(path, seed):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 1.0)
    rng = np.random.default_rng(seed)
    for name, shape in (("a", (4, N_EMBD)), ("b", (N_HEAD * 64, 4))):
        writer.add_tensor(f"blk.0.attn_q.weight.lora_{name}", rng.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def test_a_lora_is_its_content(model, tmp_path):
    path = write_lora(tmp_path / "lora.gguf", 0)
    llm = load(model, lora_path=path)
    llm.eval([5, 6, 7])
    llm.save_session(tmp_path / "x")
    llm.load_session(tmp_path / "x")
    llm.close()
    write_lora(tmp_path / "lora.gguf", 1)
    for options in ({"lora_path": path}, {}):
        other = load(model, **options)
        with pytest.raises(SessionError, match="another LoRA"):
            other.load_session(tmp_path / "x")
        other.close()


@pytest.mark.parametrize(
    ("option", "value"),
    [("rope_freq_base", 5e5), ("rope_freq_scale", 0.5), ("yarn_ext_factor", 0.5), ("yarn_attn_factor", 0.9), ("yarn_beta_fast", 16.0),
     ("yarn_beta_slow", 2.0), ("yarn_orig_ctx", 128), ("rope_scaling_type", 2), ("type_k", 8), ("type_v", 8), ("attention_type", 0),
     ("kv_overrides", {"llama.attention.layer_norm_rms_epsilon": 1e-3})],
)  # fmt: skip
def test_settings_that_change_keys_and_values(model, tmp_path, option, value):
    llm = load(model)
    llm.eval([5, 6, 7])
    llm.save_session(tmp_path / "x")
    llm.close()
    other = load(model, **{option: value})
    with pytest.raises(SessionError, match=option):
        other.load_session(tmp_path / "x")
    other.close()


def test_settings_that_do_not(model, tmp_path):
    llm = load(model)
    llm.eval([5, 6, 7])
    llm.save_session(tmp_path / "x")
    llm.close()
    for options in ({"n_ctx": 512}, {"n_batch": 32}, {"n_threads": 2}, {"seed": 3}, {"use_mmap": False}):
        other = load(model, **options)
        other.load_session(tmp_path / "x")
        other.close()
