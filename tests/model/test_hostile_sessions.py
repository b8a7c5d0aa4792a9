"""A session file is anybody's word: whatever stands in one behind a checksum that fits, it is opened as a session of this model or refused
with a sentence, and then the session in hand goes on as if nothing had been."""

import io
import re
import struct
import sys
import warnings
import zipfile
from dataclasses import replace

import numpy as np
import pytest

from hostile import N_TOKENS
from kvcast import SparseConfig
from kvcast.bindings import api as native
from kvcast.llama import session_file
from places import ROOT

sys.path.append(str(ROOT / "scripts"))
from fuzzing.forge import sealed


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
