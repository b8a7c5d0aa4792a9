"""A session file is anybody's word: whatever stands in one behind a checksum that fits, it is opened as a session of this model or refused
with a sentence, and then the session in hand goes on as if nothing had been."""

import io
import json
import os
import random
import re
import struct
import sys
import tracemalloc
import warnings
import zipfile
from dataclasses import replace

import numpy as np
import pytest

from kvcast import Llama, SessionError, SparseConfig, files
from kvcast.bindings import api as native
from kvcast.llama import session_file
from places import ROOT
from recurrent import write_recurrent
from tiny import SHAPES, write_tiny

sys.path.append(str(ROOT / "scripts"))
from fuzzing.forge import Parts, fields, sealed, take_apart

N_TOKENS = 70
SHARED = dict(n_ctx=256, n_batch=64, n_threads=1, n_threads_batch=1, verbose=False)
SPARSE = SparseConfig(budget=96, predictor="ema", untested=True)


def tokens_of(n, seed=0):
    return [int(t) for t in np.random.default_rng(seed).integers(3, 500, n)]


def logits(llm):
    return np.array(llm._ctx.get_logits_ith(-1)[: llm.n_vocab()])


class Subject:
    """A model, a session of it in a file, and another session in hand."""

    def __init__(self, folder, name, config):
        self.path, self.bad, self.hand = folder / "good", folder / "bad", folder / "hand"
        model = write_tiny(folder / "tiny.gguf", SHAPES[name])
        self.llm = Llama(model, sparse=config, **SHARED)
        self.n_caches = 2 if self.llm.header.n_layer_swa else 1
        self.read(tokens_of(N_TOKENS))
        self.llm.save_session(self.path, {"title": "x"})
        self.parts = take_apart(self.path)
        self.llm.reset()
        self.read(tokens_of(40, seed=1))
        self.llm.save_session(self.hand)
        self.expected = self.go_on()

    def read(self, tokens):
        self.llm.reset()
        self.llm.eval(tokens[:-2])
        for token in tokens[-2:]:
            self.llm.eval([token])

    def go_on(self):
        """Logits after further tokens, which are taken back."""
        self.llm.load_session(self.hand)
        self.llm.eval([7])
        self.llm.eval([8])
        found = logits(self.llm)
        self.llm.load_session(self.hand)
        return found

    def goes_on(self):
        self.llm.eval([7])
        self.llm.eval([8])
        np.testing.assert_array_equal(logits(self.llm), self.expected)
        self.llm.load_session(self.hand)

    def refuses(self, data, match=None, error=SessionError):
        """One sentence, and the session in hand is as it was."""
        if isinstance(data, Parts):
            data = data.join()
        self.bad.write_bytes(data)
        with pytest.raises(error, match=match) as raised:
            self.llm.load_session(self.bad)
        assert "\n" not in str(raised.value) and len(str(raised.value)) < 1500
        self.goes_on()

    def opens(self, data):
        self.bad.write_bytes(data.join() if isinstance(data, Parts) else data)
        self.llm.load_session(self.bad)
        self.llm.eval([7])
        self.llm.load_session(self.hand)


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    made = {}

    def make(name="llama", config=SPARSE):
        if (name, config) not in made:
            made[name, config] = Subject(tmp_path_factory.mktemp("hostile"), name, config)
        made[name, config].llm.load_session(made[name, config].hand)
        return made[name, config]

    yield make
    for s in made.values():
        s.llm.close()


def test_what_is_put_together_again_is_opened(subject):
    for s in (subject(), subject(config=None), subject("gemma3")):
        s.opens(s.parts)
        s.opens(s.parts.with_arrays(s.parts.arrays()) if s.llm.sparse else s.parts)


# ---- the description


@pytest.mark.parametrize(
    ("field", "values"),
    {
        "n_tokens": [-1, 0, N_TOKENS - 1, N_TOKENS + 1, 1.5, "70", None, True, [70], 2**31, 2**32 + N_TOKENS, 2**63, 2**70, float("nan")],
        "seed": [None, "7", 1.5, True, 2**63, -(2**63) - 1, 2**70, [], float("inf")],
        "model": [None, 7, ["x"], {}],
        "made_with": [None, [], "x", {}, {"model": None}, {"model": {"model": 1}}],
        "about": [None, [], "x", 7],
        "numbers": [None, [], "x", 7, {"n_observed": 1}],
    }.items(),
)
def test_fields_of_the_description(subject, field, values):
    s = subject()
    for value in values:
        s.refuses(s.parts.with_meta(**{field: value}))
    s.refuses(replace(s.parts, meta={k: v for k, v in s.parts.meta.items() if k != field}), "damaged")
    s.refuses(s.parts.with_meta(further=1), "damaged")


@pytest.mark.parametrize("value", [-1, 0, 1, 2**31, 2**53, 2**63, 2**70, 1.5, None, "8", True])
def test_sizes_of_the_parts(subject, value):
    s = subject()
    for field in ("n_state", "n_arrays"):
        s.refuses(replace(s.parts, meta={**s.parts.meta, field: value}).join(fitting=False), "damaged")
    n = len(s.parts.state)  # the state ends elsewhere, and the sum fits
    for shift in (-1, 1, 16, -n):
        moved = {**s.parts.meta, "n_state": n + shift, "n_arrays": len(s.parts.packed) - shift}
        s.refuses(replace(s.parts, meta=moved).join(fitting=False), "damaged")


@pytest.mark.parametrize(
    "description",
    [b"", b"{", b"[]", b"7", b"null", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 50_000, b"1" * 6000, b'"' + b"x" * 70_000_000 + b'"'],
    ids=range(10),
)
def test_a_description_that_is_none(subject, description):
    subject().refuses(replace(subject().parts, meta=description), "damaged")


def test_the_length_of_the_description(subject):
    s = subject()
    body = s.parts.join()[: -session_file.TAIL.size - session_file.LENGTH.size]
    for n in (0, 1, 2**31, 2**62, 2**64 - 1, len(body) + 1):
        s.refuses(sealed(body + struct.pack("<Q", n)), "damaged")


@pytest.mark.parametrize(
    ("name", "values"),
    {
        "n_observed": [0, -1, 2**62, 2**64, 1.0, None, "3", True],
        "since_calibration": [-1, 2**62, 1e300, None, False],
        "poor": [0, 1, None, "x", 2],
        "n_summarised": [-1, N_TOKENS + 1, 2**40, None, 0.5],
        "fell_back": [0, None, "no"],
    }.items(),
)
def test_numbers_of_the_session(subject, name, values):
    s = subject()
    numbers = s.parts.meta["numbers"]
    assert name in numbers
    for value in values:
        s.refuses(s.parts.with_meta(numbers={**numbers, name: value}), "damaged")
    s.refuses(s.parts.with_meta(numbers={k: v for k, v in numbers.items() if k != name}), "damaged")
    s.refuses(s.parts.with_meta(numbers={}), "damaged")


def test_tokens(subject):
    s = subject()
    for value in (-1, 512, 2**31 - 1, -(2**31)):
        for at in (0, N_TOKENS // 2, N_TOKENS - 1):
            tokens = np.frombuffer(s.parts.tokens, np.int32).copy()
            tokens[at] = value
            s.refuses(replace(s.parts, tokens=tokens.tobytes()), "damaged")
    s.refuses(replace(s.parts, tokens=s.parts.tokens[:-4]), "damaged")
    magic, version, n = session_file.STATE_HEADER.unpack(s.parts.header)
    for header in ((0, version, n), (magic, version + 1, n), (magic, version, n + 1), (magic, version, 2**32 - 1)):
        s.refuses(replace(s.parts, header=session_file.STATE_HEADER.pack(*header)), "damaged")


# ---- what is remembered of attention


def channels(s):
    info = s.llm.session.attached.info
    return s.llm.session.n_rows * min(max(8, info.head_dim_k // 4), info.head_dim_k)


@pytest.mark.sanitize
def test_the_summary_names_channels_that_there_are(subject):
    """They are indices in the native part."""
    s = subject()
    for value in (500_000_000, -1, -(2**31), s.llm.session.attached.info.head_dim_k, 2**31 - 1):
        for which in (slice(None), slice(0, 1), slice(-1, None)):
            arrays = s.parts.arrays()
            arrays["summary"][: 4 * channels(s)].view(np.int32)[which] = value
            s.refuses(s.parts.with_arrays(arrays), "damaged.*channel")


def test_the_summary_holds_numbers(subject):
    s = subject()
    n = 4 * channels(s)
    parts = 4  # center, scale, spread, power of the queries
    size = (len(s.parts.arrays()["summary"]) - n) // parts
    for part in range(parts):
        for value in (np.nan, np.inf, -np.inf, 1e30, -1e30, *((-1.0,) if part else ())):
            arrays = s.parts.arrays()
            arrays["summary"][n + part * size :][:4].view(np.float32)[0] = value
            s.refuses(s.parts.with_arrays(arrays), "damaged")


def test_the_native_part_looks_too(subject):
    """Whoever calls it: bounds are checked where they are used."""
    attached = subject().llm.session.attached
    good = attached.summary_state
    bad = good.copy()
    bad[:4].view(np.int32)[0] = attached.info.head_dim_k
    assert attached.takes_summary_state(good) and not attached.takes_summary_state(bad)
    with pytest.raises(ValueError, match="channel"):
        attached.summary_state = bad
    for n_bytes in (0, len(good) - 1, len(good) + 1, -1):
        assert not native.kvcast_set_summary_state(attached._kv, good.ctypes.data, n_bytes)
    np.testing.assert_array_equal(attached.summary_state, good)


ARRAYS = {
    "another type": lambda a: a.astype(np.float64),
    "big-endian": lambda a: a.astype(a.dtype.newbyteorder(">")),
    "whole numbers": lambda a: a.astype(np.int32),
    "complex": lambda a: a.astype(np.complex64),
    "a structure": lambda a: np.zeros(a.shape, [("x", a.dtype)]),
    "text": lambda a: np.full(a.shape, "x"),
    "dates": lambda a: np.zeros(a.shape, "M8[s]"),
    "another order": lambda a: np.asfortranarray(a) if a.ndim > 1 else a[::-1].astype(np.float16),
    "no dimension": lambda a: a.dtype.type(1),
    "one dimension less": lambda a: a[0] if a.ndim > 1 else a[:0].reshape(0, 1),
    "one more": lambda a: a[None],
    "a row less": lambda a: a[:-1],
    "a row more": lambda a: np.concatenate([a, a[-1:]]),
    "half of it": lambda a: a[..., : a.shape[-1] // 2],
    "one block more": lambda a: np.concatenate([a, a[..., -1:]], -1),
    "turned round": lambda a: np.ascontiguousarray(np.moveaxis(a, 0, -1)) if a.ndim > 1 else a.reshape(2, -1),
    "nothing": lambda a: np.zeros((0,) * max(1, a.ndim - 1), a.dtype),
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_arrays_of_another_kind(subject, kind):
    for s in (subject(), subject(config=SparseConfig(budget=96, predictor="onnx:paper", untested=True))):
        arrays = s.parts.arrays()
        for name, x in arrays.items():
            if (re.sub("^checkpoint[0-9]_", "", name), kind) in (
                ("last_steps", "a row less"),
                ("last_steps", "a row more"),
                ("summary", "nothing"),
            ):
                continue  # any number of steps; settings without a summary
            odd = ARRAYS[kind](x)
            if (odd.dtype.str, odd.shape, odd.flags.c_contiguous) != (x.dtype.str, x.shape, True):
                s.refuses(s.parts.with_arrays({**arrays, name: odd}), "damaged")


def test_scores_are_shares(subject):
    for s in (subject(), subject(config=SparseConfig(budget=96, predictor="onnx:paper", untested=True))):
        for name in [name for name in s.parts.arrays() if not name.endswith("summary")]:
            for value in (np.nan, np.inf, -np.inf, -1.0, 1e30, 3.0):
                arrays = s.parts.arrays()
                arrays[name].flat[-1] = value
                s.refuses(s.parts.with_arrays(arrays), "damaged")


def test_missing_further_and_double_arrays(subject):
    s = subject()
    arrays = s.parts.arrays()
    for name in arrays:
        s.refuses(s.parts.with_arrays({k: v for k, v in arrays.items() if k != name}), "damaged")
        s.refuses(s.parts.with_arrays({("../" + k if k == name else k): v for k, v in arrays.items()}), "damaged")
    s.refuses(s.parts.with_arrays({}), "damaged")
    s.refuses(s.parts.with_arrays({**arrays, "further": np.zeros(3)}), "damaged")
    s.refuses(replace(s.parts, packed=b""), "damaged")
    packed = io.BytesIO(s.parts.packed)
    with warnings.catch_warnings(), zipfile.ZipFile(packed, "a") as archive:
        warnings.simplefilter("ignore")
        archive.writestr("averages.npy", zipfile.ZipFile(io.BytesIO(s.parts.packed)).read("averages.npy"))
    s.refuses(replace(s.parts, packed=packed.getvalue()), "damaged")


def test_objects_are_not_unpickled(subject, tmp_path):
    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "made"), "w")

    s = subject()
    arrays = s.parts.arrays()
    for x in (np.array([Evil()], object), np.array(Evil(), object)):
        s.refuses(s.parts.with_arrays({**arrays, "averages": x}), "damaged")
    assert not (tmp_path / "made").exists()


def test_what_grows_is_not_unpacked(subject):
    """2 MB that become 2 GiB; and sizes that lie."""
    s = subject()
    arrays = s.parts.arrays()
    s.refuses(s.parts.with_arrays(arrays, np.savez_compressed), "damaged")
    grown = io.BytesIO()
    with zipfile.ZipFile(grown, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("averages.npy", "w", force_zip64=True) as member:
        np.lib.format.write_array_header_1_0(member, {"shape": (1 << 26,), "fortran_order": False, "descr": "<f4"})
        for _ in range(16):
            member.write(bytes(1 << 20))
    s.refuses(replace(s.parts, packed=grown.getvalue()), "damaged")
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"shape": (1 << 40,), "fortran_order": False, "descr": "<f4"})
    lying = io.BytesIO()
    with zipfile.ZipFile(lying, "w") as archive:
        archive.writestr("averages.npy", header.getvalue())
    s.refuses(replace(s.parts, packed=lying.getvalue()), "damaged")
    at = s.parts.packed.rindex(b"PK\x01\x02")  # in the archive's directory
    for field, value in ((20, 2**31), (24, 2**31), (20, 1), (24, 1), (42, 2**31), (42, 1), (8, 1), (10, 99)):
        packed = bytearray(s.parts.packed)
        n = 2 if field < 20 else 4
        packed[at + field : at + field + n] = value.to_bytes(n, "little")
        s.refuses(replace(s.parts, packed=bytes(packed)), "damaged")
    s.refuses(replace(s.parts, packed=s.parts.packed + bytes(1 << 26)), "damaged.*larger")


@pytest.mark.parametrize(
    "shape", ["(1,", "'x'", "(" * 3000, "-" * 9000 + "1", "(True,)", "(-1,)", "(10**30,)", "(1<<2,)", "None", "9" * 5000]
)
def test_headers_of_arrays(subject, shape):
    s = subject()
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".encode()
    header = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("averages.npy", header)
    s.refuses(replace(s.parts, packed=packed.getvalue()), "damaged")


# ---- llama.cpp's state


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
