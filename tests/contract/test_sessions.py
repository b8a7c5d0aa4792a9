"""Sessions in files: after a load they go on as if nothing had been; a file that is wrong or a save that fails changes nothing."""

import hashlib
import resource
import signal
import subprocess
import sys

import numpy as np
import pytest

from commands import command, one_sentence
from kvcast import Llama, SessionError, SparseConfig
from kvcast.engine import guard
from kvcast.llama import session_file
from logits import logits_of
from places import ROOT

SHARED = dict(n_ctx=768, n_threads=2, n_threads_batch=2, verbose=False, flash_attn=True)
HOST = SparseConfig(budget=160, min_recovery=0.5)
CASES = {  # and the guard's margin, for the one that saves and for the one that loads: from 0 no network falls back, from 9 all do
    "dense": (None, 0, 0),
    "host": (HOST, 0, 0),
    "host, fallen back": (HOST, 9, 0),
    "host, not fallen back": (HOST, 0, 9),
    "host, calibrated": (SparseConfig(budget=160, calibrate="dense:7"), 0, 0),
    "host, all steps kept": (SparseConfig(budget=160, predictor="onnx:paper", hold=2), 0, 0),
    "device": (SparseConfig(budget=256, path="device", calibrate="layers:4"), 0, 0),
}


def go_on(llm, tokens):
    """Logits after each of some steps, a prompt, and steps; then sampled tokens."""
    found = []
    for part in (*([t] for t in tokens[:20]), tokens[20:40], *([t] for t in tokens[40:45])):
        llm.eval(part)
        found.append(logits_of(llm))
    sampled = [t for t, _ in zip(llm.generate(llm.input_ids[: llm.n_tokens].tolist(), temp=1.0), range(3))]
    return np.stack(found), sampled


@pytest.mark.filterwarnings("ignore:predictor")
@pytest.mark.parametrize("config, margin, margin_of_other", CASES.values(), ids=CASES.keys())
def test_a_load_goes_on_as_if_nothing_had_been(small, code, tmp_path, monkeypatch, config, margin, margin_of_other):
    monkeypatch.setattr(guard, "GUARD_MARGIN", margin)
    llm, again = (Llama(small, sparse=config, seed=seed, **SHARED) for seed in (7, 8))
    tokens = llm.tokenize(code.encode())
    llm.eval(tokens[:500])
    for token in tokens[500:527]:
        llm.eval([token])
    if config is None:  # saving changes nothing at all
        state = llm.save_state()
        untouched, _ = go_on(llm, tokens[527:])
        llm.load_state(state)
    llm.save_session(tmp_path / "x.session", {"for": ["whom"]})
    monkeypatch.setattr(guard, "GUARD_MARGIN", 0)
    expected, sampled = go_on(llm, tokens[527:])

    monkeypatch.setattr(guard, "GUARD_MARGIN", margin_of_other)
    again.eval(tokens[600:900])
    again.eval([tokens[0]])
    monkeypatch.setattr(guard, "GUARD_MARGIN", 0)
    assert again.load_session(tmp_path / "x.session") == {"for": ["whom"]}
    assert again.n_tokens == 527 and (config is None or again.session.history.primed)
    got, sampled_again = go_on(again, tokens[527:])
    np.testing.assert_array_equal(got, expected)
    assert sampled_again == sampled
    if config is None:
        np.testing.assert_array_equal(untouched, expected)
    assert [p.name for p in tmp_path.iterdir()] == ["x.session"]
    llm.close()
    again.close()


@pytest.fixture(scope="module")
def saved(small, tmp_path_factory):
    """A sparse session that is saved, and its file."""
    path = tmp_path_factory.mktemp("sessions") / "good.session"
    llm = Llama(small, sparse=SparseConfig(budget=160), **SHARED)
    tokens = llm.tokenize((ROOT / "tests" / "data" / "code.txt").read_bytes())
    llm.eval(tokens[:300])
    for token in tokens[300:305]:
        llm.eval([token])
    llm.save_session(path)
    yield llm, path, tokens
    llm.close()


@pytest.fixture
def unharmed(saved):
    """What a refused file, or a save that fails, must leave as it was."""
    llm, _, _ = saved
    averages = llm.session.history.averages.copy()
    rows = [llm.session.attached.rows_of(layer, 0, 305) for layer in (0, 3)]
    yield
    assert llm.n_tokens == llm.session.n_tokens == 305 and llm.session.history.primed
    np.testing.assert_array_equal(llm.session.history.averages, averages)
    np.testing.assert_array_equal([llm.session.attached.rows_of(layer, 0, 305) for layer in (0, 3)], rows)


def test_damage_is_said_before_anything_is_touched(saved, unharmed, tmp_path):
    llm, path, _ = saved
    good = path.read_bytes()
    n = len(good)
    bad = tmp_path / "bad.session"
    for at in (0, 5, 9, 40, n // 2, n - 3000, n - 120, n - 60, n - 50, n - 30):
        bad.write_bytes(good[:at] + bytes([good[at] ^ 8]) + good[at + 1 :])
        with pytest.raises(SessionError, match="damaged"):
            llm.load_session(bad)
    for n_left in (0, 10, 60, n // 2, n - 1):
        bad.write_bytes(good[:n_left])
        with pytest.raises(SessionError, match="is not a session of kvcast, or was cut short"):
            llm.load_session(bad)
    bad.write_bytes(good[:-12] + (99).to_bytes(4, "little") + good[-8:])
    with pytest.raises(SessionError, match="version 99, and this kvcast reads 2"):
        llm.load_session(bad)
    for wrong in (tmp_path, tmp_path / "none"):
        with pytest.raises(SessionError, match="cannot be read"):
            llm.load_session(wrong)


def test_arrays_that_cannot_be_unpacked_are_damage(saved, unharmed, tmp_path):
    """Also where the checksum was made to fit."""
    llm, path, _ = saved
    body = bytearray(path.read_bytes()[: -session_file.TAIL.size])
    method = body.rindex(b"PK\x01\x02") + 10  # in the archive's directory
    body[method : method + 2] = (99).to_bytes(2, "little")
    bad = tmp_path / "bad.session"
    digest = hashlib.blake2b(body, digest_size=32).digest()
    bad.write_bytes(body + session_file.TAIL.pack(digest, session_file.VERSION, session_file.MAGIC))
    with pytest.raises(SessionError, match="its parts are not where"):
        llm.load_session(bad)


def test_another_model_or_setting_is_named(saved, unharmed, small, monkeypatch):
    llm, path, _ = saved
    for options, words in (({"type_k": 8}, "type_k=1.*loaded with 8"), ({"n_ctx": 256}, "holds 305 tokens, and the context 256")):
        other = Llama(small, **{**SHARED, **options})
        with pytest.raises(SessionError, match=words):
            other.load_session(path)
        assert other.n_tokens == 0
        other.close()
    real = session_file.made_with
    monkeypatch.setattr(session_file, "made_with", lambda llm: {**real(llm), "model": [1, "other"]})
    with pytest.raises(SessionError, match=r"saved with another model, 'small\.gguf"):
        llm.load_session(path)


def test_what_the_file_lacks_is_made_again(saved, small):
    """Saved on one path and opened on another, or dense: the store is there, the history comes from the last 64 tokens."""
    _, path, tokens = saved
    for config in (SparseConfig(budget=256, path="device"), SparseConfig(budget=160, predictor="onnx:paper")):
        other = Llama(small, sparse=config, **{**SHARED, "n_ctx": 512})
        other.load_session(path)
        assert other.session.history.primed == config.device  # what the device path remembers is in there, too
        other.eval([tokens[305]])
        assert other.n_tokens == 306 and other.session.history.primed
        other.close()
    dense = Llama(small, **SHARED)
    dense.load_session(path)
    assert dense.n_tokens == 305
    dense.close()


def test_a_save_that_fails_leaves_the_old_file(saved, unharmed, tmp_path):
    llm, path, _ = saved
    kept = tmp_path / "kept.session"
    good = path.read_bytes()
    kept.write_bytes(good)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for n_bytes in (len(good) // 4, len(good) - 100):  # within llama.cpp's part, and within ours
        resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
        try:
            with pytest.raises(SessionError, match="cannot be saved as"):
                llm.save_session(kept)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with pytest.raises(SessionError, match="No such file or directory"):
        llm.save_session(tmp_path / "nowhere" / "x")
    with pytest.raises(TypeError):
        llm.save_session(kept, {"a": object()})
    assert kept.read_bytes() == good and len(list(tmp_path.iterdir())) == 1


def test_what_a_dead_process_left_goes_with_the_next_save(saved, tmp_path):
    """Not what another process is writing, nor what is not ours."""
    llm, _, _ = saved
    dead, alive, others = tmp_path / ".kvcast-dead.part", tmp_path / ".kvcast-alive.part", tmp_path / "x.999999999.part"
    for left in (dead, alive, others):
        left.touch()
    (tmp_path / ".kvcast-link.part").symlink_to(others)
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import fcntl; f = open({str(alive)!r}, 'r+'); fcntl.flock(f, fcntl.LOCK_EX); print(1, flush=True); input()",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    holder.stdout.readline()
    llm.save_session(tmp_path / "x")
    assert sorted(tmp_path.iterdir()) == sorted([alive, others, tmp_path / "x", tmp_path / ".kvcast-link.part"])
    holder.communicate(b"\n")
    llm.save_session(tmp_path / "x")
    assert not alive.exists() and others.exists()


def test_an_empty_session(small, tmp_path, code):
    llm = Llama(small, sparse=SparseConfig(budget=160), **SHARED)
    llm.save_session(tmp_path / "x")
    tokens = llm.tokenize(code.encode())
    llm.eval(tokens[:100])
    llm.load_session(tmp_path / "x")
    assert llm.n_tokens == 0
    llm.eval(tokens[:10])
    assert llm.n_tokens == 10
    llm.close()


def test_killed_while_saving():
    command = [sys.executable, str(ROOT / "scripts" / "kill_saving.py"), "--kills", "8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "8 kills" in done.stdout, done.stderr


def chat(small, path, question, *options):
    arguments = ("chat", "-m", small, "--context", "1024", "--max-tokens", "4", "--session", path, *options)
    return command(*arguments, given=question)


def test_chat_goes_on_where_it_was_left(small, tmp_path):
    path, document = tmp_path / "talk.session", tmp_path / "other.txt"
    first = chat(small, path, "My name is Ada.\n")
    assert first.returncode == 0 and "opened" not in first.stderr
    meta = session_file.read_meta(path)
    assert [m["role"] for m in meta["about"]["messages"]] == ["user", "assistant"]
    second = chat(small, path, "What is my name?\n")
    assert second.returncode == 0 and f"opened a conversation of {meta['n_tokens']} tokens" in second.stderr
    assert len(session_file.read_meta(path)["about"]["messages"]) == 4

    document.write_text("A text.")
    one_sentence(chat(small, path, "Why?\n", "--file", document), "without this document")
    one_sentence(chat(small, path, "Why?\n", "--kv-type", "q8_0"), "type_k=1")
    full = chat(small, path, "so much " * 1000 + "\n")
    assert full.returncode == 1 and "the context of 1024 tokens is full" in full.stderr and "Traceback" not in full.stderr
    assert len(session_file.read_meta(path)["about"]["messages"]) == 4


def test_chat_is_kept_when_it_is_interrupted_twice(small, tmp_path):
    path = tmp_path / "talk.session"
    arguments = ["chat", "-m", small, "--context", "1024", "--session", path, "--temperature", "0"]
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "kvcast.cli", *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdin.write(b"Tell me a very long story.\n")
    process.stdin.flush()
    process.stdout.read(1)  # the answer has begun
    for _ in range(2):
        process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert b"Traceback" not in errors, errors
    meta = session_file.read_meta(path)
    assert meta["n_tokens"] > 10 and len(meta["about"]["messages"]) % 2 == 0
