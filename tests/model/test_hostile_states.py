"""llama.cpp's part of a session file from outside, files at random, and files that change while they are read."""

import json
import os
import random
import struct
import sys
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

from hostile import N_TOKENS, SHARED, SPARSE, logits, tokens_of
from kvcast import Llama, SessionError, files
from kvcast.bindings import api as native
from kvcast.llama import session_file
from places import ROOT
from recurrent import write_recurrent
from tiny import SHAPES, write_tiny

sys.path.append(str(ROOT / "scripts"))
from fuzzing.forge import fields, sealed, take_apart


@pytest.mark.sanitize
@pytest.mark.parametrize(("name", "config"), [("llama", SPARSE), ("llama", None), ("gemma3", SPARSE), ("gemma3", None)])
def test_every_number_of_the_state(subject, name, config):
    """llama.cpp empties its cache first, and takes any position."""
    s = subject(name, config)
    rng = random.Random(0)
    seen: dict[str, int] = {}
    for field in fields(s.parts.state, s.n_caches):
        seen[field.name] = seen.get(field.name, 0) + 1
        if seen[field.name] > 2 and rng.random() < 0.95:
            continue
        old = field.read(s.parts.state)
        for value in {old + 1, old - 1, 0, 1, -1, 2 * old, 2**31 - 1, 2**31, 2**32 - 1, 2**62} - {old}:
            changed = field.write(s.parts.state, value)
            if changed != s.parts.state:
                s.refuses(replace(s.parts, state=changed), "damaged")


@pytest.mark.sanitize
def test_states_of_another_length(subject):
    for s in (subject(), subject("gemma3")):
        for n in (0, 1, 4, 11, 12, 100, len(s.parts.state) // 2, len(s.parts.state) - 1):
            s.refuses(replace(s.parts, state=s.parts.state[:n]), "damaged")
        for more in (b"x", bytes(4), bytes(1 << 20)):
            s.refuses(replace(s.parts, state=s.parts.state + more), "damaged")
        s.refuses(replace(s.parts, state=b"\xff" * len(s.parts.state)), "damaged")


@pytest.mark.sanitize
@pytest.mark.parametrize("lost", [299, 260, 240])
def test_windows_without_a_position_that_is_attended_to_next(tmp_path, lost):
    """llama.cpp takes it for the end of the text, and then no next token."""
    llm = Llama(write_tiny(tmp_path / "tiny.gguf", SHAPES["gemma3"]), sparse=SPARSE, **{**SHARED, "n_ctx": 1024})
    llm.eval(tokens_of(300))
    llm.save_session(tmp_path / "good")
    llm.load_session(tmp_path / "good")
    parts = take_apart(tmp_path / "good")
    of_windows = [f for f in fields(parts.state, 2) if f.name == "pos"][300:]
    missing = min({*range(300)} - {f.read(parts.state) for f in of_windows})
    field = next(f for f in of_windows if f.read(parts.state) == lost)
    (tmp_path / "bad").write_bytes(replace(parts, state=field.write(parts.state, missing)).join())
    with pytest.raises(SessionError, match=r"damaged.*missing"):
        llm.load_session(tmp_path / "bad")
    assert llm.n_tokens == 300
    llm.eval([5])
    llm.close()


@pytest.mark.sanitize
def test_another_family(subject):
    s = subject()
    state = s.parts.state.replace(b"llama", b"gemma", 1)
    s.refuses(replace(s.parts, state=state), "damaged.*family")


@pytest.mark.sanitize
@pytest.mark.parametrize("kind", [0, 1, 8, 30, 2], ids=["f32", "f16", "q8_0", "bf16", "q4_0"])
def test_keys_and_values_are_numbers(tmp_path, kind):
    config = SPARSE if kind not in (0,) else None
    llm = Llama(write_tiny(tmp_path / "tiny.gguf", SHAPES["llama"]), sparse=config, type_k=kind, type_v=kind, flash_attn=True, **SHARED)
    llm.eval(tokens_of(N_TOKENS))
    llm.save_session(tmp_path / "good")
    llm.load_session(tmp_path / "good")
    parts = take_apart(tmp_path / "good")
    at = [f.at for f in fields(parts.state) if f.name == "row"]
    nan = {0: b"\x00\x00\xc0\x7f", 30: b"\xc0\x7f"}.get(kind, b"\x00\x7e")  # of a block's scale, where there are blocks
    large = {0: struct.pack("<f", 1e30), 30: struct.pack("<f", 1e30)[2:]}.get(kind)
    for begin in (at[0] + 8, at[-1] + 8):
        for odd in (nan, large):
            if odd is None:
                continue
            (tmp_path / "bad").write_bytes(replace(parts, state=parts.state[:begin] + odd + parts.state[begin + len(odd) :]).join())
            with pytest.raises(SessionError, match=r"damaged.*no number of a sane size"):
                llm.load_session(tmp_path / "bad")
    assert llm.n_tokens == N_TOKENS
    llm.eval([5])
    llm.close()


@pytest.mark.sanitize
@pytest.mark.parametrize("kind", ["mamba", "lfm2", "lfm2-windows"])
def test_recurrent_states(tmp_path, kind):
    llm = Llama(write_recurrent(tmp_path / "tiny.gguf", kind), **SHARED)
    path, bad = tmp_path / "good", tmp_path / "bad"
    llm.eval(tokens_of(N_TOKENS))
    llm.save_session(path)
    llm.load_session(path)
    llm.eval([7])
    expected = logits(llm)
    parts = take_apart(path)
    rng = random.Random(0)
    small = range(min(len(parts.state), 1000)) if kind == "mamba" else range(len(parts.state))
    for i in range(80):
        state = bytearray(parts.state)
        at = rng.choice(small)
        if i % 4 == 3:
            del state[at : at + rng.choice((1, 4, 40))]
        else:
            state[at : at + 4] = rng.choice((b"\xff" * 4, bytes(4), rng.randbytes(4)))
        bad.write_bytes(replace(parts, state=bytes(state)).join())
        llm.load_session(path)
        try:
            llm.load_session(bad)
        except SessionError:
            llm.eval([7])
            np.testing.assert_array_equal(logits(llm), expected)
        else:
            llm.eval([7])
    if kind == "mamba":
        n = 4 + len("mamba")
        for at in range(n, n + 24, 4):  # cells, position, sequences, sequence, order, layers
            bad.write_bytes(replace(parts, state=parts.state[:at] + b"\x05\0\0\0" + parts.state[at + 4 :]).join())
            with pytest.raises(SessionError, match="damaged"):
                llm.load_session(bad)
    for state in (parts.state[:-1], parts.state + b"x", parts.state[: len(parts.state) // 2]):
        bad.write_bytes(replace(parts, state=state).join())
        with pytest.raises(SessionError, match="damaged"):
            llm.load_session(bad)
    llm.close()


# ---- at random


@pytest.mark.parametrize(("name", "config"), [("llama", SPARSE), ("gemma3", None)])
def test_bits_and_cuts_behind_a_checksum_that_fits(subject, name, config):
    s = subject(name, config)
    rng = random.Random(1)
    for i in range(60):
        body = bytearray(s.parts.join()[: -session_file.TAIL.size])
        small = [*range(len(s.parts.header + s.parts.tokens)), *range(len(body) - len(s.parts.packed) - 3000, len(body))]
        at = rng.choice(small)
        if i % 4 == 3:
            del body[at : at + rng.choice((1, 4, 40))]
        else:
            body[at] ^= 1 << rng.randrange(8)
        s.bad.write_bytes(sealed(bytes(body)))
        try:
            s.llm.load_session(s.bad)
        except SessionError:
            s.goes_on()
        else:
            s.llm.eval([7])
            s.llm.load_session(s.hand)


# ---- one file, whatever happens to its name


def test_a_save_between_does_not_mix_two_sessions(subject, monkeypatch):
    s = subject()
    s.bad.write_bytes(s.parts.join())
    opened = files.open_regular
    n_opened = []

    def replace_it(path):
        file = opened(path)
        if path == s.bad:
            n_opened.append(path)
            other = s.bad.with_name("other")
            other.write_bytes(s.hand.read_bytes())
            other.replace(s.bad)
        return file

    monkeypatch.setattr(files, "open_regular", replace_it)
    assert s.llm.load_session(s.bad) == {"title": "x"}
    assert len(n_opened) == 1 and s.llm.input_ids[: s.llm.n_tokens].tolist() == tokens_of(N_TOKENS)
    s.llm.load_session(s.hand)


def test_a_file_that_becomes_shorter_while_it_is_taken_in(subject, monkeypatch):
    s = subject()
    s.bad.write_bytes(s.parts.join())
    real = native.read_state

    def cut(ctx, read, n_bytes):
        with s.bad.open("r+b") as file:
            file.truncate(len(s.parts.header + s.parts.tokens) + 1000)
        real(ctx, read, n_bytes)

    monkeypatch.setattr(native, "read_state", cut)
    with pytest.raises(SessionError, match=r"changed while it was taken in.*the context is empty now"):
        s.llm.load_session(s.bad)
    monkeypatch.undo()
    assert s.llm.n_tokens == 0
    s.llm.eval(tokens_of(10))
    s.llm.load_session(s.hand)
    s.goes_on()


def test_pipes_devices_and_folders(subject, tmp_path):
    s = subject()
    os.mkfifo(tmp_path / "pipe")
    for path, kind in ((tmp_path / "pipe", "a pipe"), (tmp_path, "a folder"), ("/dev/zero", "a device")):
        for call in (s.llm.load_session, s.llm.save_session):
            with pytest.raises(SessionError, match=kind):
                call(path)
    s.llm.load_session(s.hand)
    s.goes_on()


def test_memory_for_what_is_refused(subject):
    """A file of a few kilobytes asks for nothing large."""
    s = subject()
    huge = [
        s.parts.with_meta(n_tokens=2**40).join(),
        replace(s.parts, meta={**s.parts.meta, "n_state": 2**40}).join(fitting=False),
        replace(s.parts, state=struct.pack("<I", 2**32 - 1) + s.parts.state[4:]).join(),
    ]
    for data in huge:
        tracemalloc.start()
        s.refuses(data)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 64 << 20


def test_an_odd_context_is_saved_and_opened_whole(tmp_path):
    """llama.cpp rounds a context up to 256 cells; no token of a session is lost in the difference, or it is said."""
    model = write_tiny(tmp_path / "tiny.gguf", SHAPES["llama"])
    small, large = (Llama(model, sparse=SPARSE, **{**SHARED, "n_ctx": n}) for n in (300, 512))
    tokens = tokens_of(330)
    large.eval(tokens)
    large.save_session(tmp_path / "x")
    small.eval(tokens[:20])
    try:
        small.load_session(tmp_path / "x")
    except SessionError as error:
        assert "holds 330 tokens, and the context" in str(error) and small.n_tokens == 20
    else:
        assert small.input_ids[:330].tolist() == tokens
    small.eval([5])
    small.close()
    large.close()


def test_json_of_about_comes_back(subject):
    s = subject()
    about = {"a": [1, 2.5, None, True, "\ud800", "é" * 5000], "b": {"c": {}}}
    s.llm.save_session(s.bad, about)
    assert s.llm.load_session(s.bad) == json.loads(json.dumps(about))
    s.llm.load_session(s.hand)
