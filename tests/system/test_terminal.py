"""No text from outside makes a terminal do anything: files, models' answers, clients, messages that quote them."""

import io
import json
import logging
import os
import subprocess
import sys

import pytest
from rich.table import Table

from commands import command
from kvcast import Llama, SessionError
from kvcast.bindings.log import _plain_log
from kvcast.chat.documents import DocumentCache
from kvcast.gguf.reader import GgufFile
from kvcast.terminal import PLAIN, Console, line, plain
from shapes import write_shape

EVIL = "a\x1b[2J\x1b]0;title\x07\x9b31m\x90q\x9c\r\x08\x7fb\u202ec\u2066d\u2028e\x00f\ud800"
SHOWN = "a\\x1b[2J\\x1b]0;title\\x07\\x9b31m\\x90q\\x9c\\x0d\\x08\\x7fb\\u202ec\\u2066d\\u2028e\\x00f\\ud800"


def obeys(data):
    """Whether a terminal that is given these bytes does something else than write."""
    text = data.decode() if isinstance(data, bytes) else data
    return text != plain(text) or "\r" in text


def test_what_is_shown():
    assert plain(EVIL) == SHOWN and not obeys(SHOWN)
    for good in ("", "two\nlines\tand a tab", "Grüße, 世界 🙂 עברית", "\\x1b", "e\u0301 \u200d \xa0"):
        assert plain(good) == good
    assert plain("one\r\ntwo") == "one\ntwo" and line("one\r\ntwo\tx") == "one\\ntwo\\tx"


def test_pieces_of_a_sequence():
    for cut in range(len(EVIL)):
        assert plain(EVIL[:cut]) + plain(EVIL[cut:]) == SHOWN


@pytest.mark.parametrize("terminal", [True, False])
def test_everything_that_is_printed(terminal):
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, color_system=None, width=300)
    console.print(EVIL, markup=False, highlight=False)
    console.print(EVIL, style="red", markup=False, soft_wrap=True, end="")
    table = Table(title=EVIL)
    table.add_column(EVIL)
    table.add_row(EVIL)
    console.print(table)
    assert out.getvalue().count("\\x1b[2J") == 5 and not obeys(out.getvalue())


def test_styles_are_our_own():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, color_system="standard")
    console.print("kvcast: \x1b[31mx", style="red", markup=False, highlight=False)
    assert out.getvalue().startswith("\x1b[31m") and "\\x1b[31mx" in out.getvalue()


def test_log_lines():
    out = io.StringIO()
    handler = logging.StreamHandler(out)
    handler.addFilter(PLAIN)
    log = logging.Logger("x")
    log.addHandler(handler)
    log.warning("%s and %d", EVIL, 7)
    try:
        raise ValueError(EVIL)
    except ValueError:
        log.exception("failed")
    assert "and 7" in out.getvalue() and "ValueError" in out.getvalue() and not obeys(out.getvalue())


def with_texts(path, **texts):
    """A model whose metadata holds any text."""
    with GgufFile(path) as gguf:
        for key, value in texts.items():
            gguf.set_str(key.replace("__", "."), value)
        data = gguf.metadata() + path.read_bytes()[gguf.data_offset :]
    path.write_bytes(data)
    return path


@pytest.fixture
def model(tmp_path):
    return write_shape(tmp_path / "tiny.gguf", vocabulary="llama")


TEXT = "a\x1b[2J\x1b]0;t\x07\x9b31m\rb\u202ec"


def test_inspect(model, tmp_path):
    odd = with_texts(model, general__name=TEXT, general__basename=TEXT).rename(tmp_path / "x\x1b[2J.gguf")
    done = command("inspect", odd, "--json", tmp_path / "x.json")
    assert done.returncode == 0 and "\\x1b[2J" in done.stdout and not obeys(done.stdout) and not obeys(done.stderr)
    assert json.loads((tmp_path / "x.json").read_text())["name"] == TEXT
    done = command("plan", odd, "--ram", "32G")
    assert done.returncode == 0 and not obeys(done.stdout + done.stderr)


@pytest.mark.parametrize("how", ["family", "missing", "template", "text"])
def test_errors_that_quote(model, tmp_path, how):
    if how == "family":
        with_texts(model, general__architecture=TEXT)
        done = command("chat", "-m", model, "--untested")
    elif how == "missing":
        done = command("chat", "-m", "x\x1b[2J.gguf")
    elif how == "template":
        with_texts(model, tokenizer__chat_template="{{ raise_exception('" + TEXT + "') }}")
        done = command("chat", "-m", model, "--context", "256", given="Why?\n")
    else:
        (tmp_path / "x\x1b[2J.txt").write_bytes(b"\xff")
        done = command("chat", "-m", model, "-f", tmp_path / "x\x1b[2J.txt")
    assert done.returncode != 0 and not obeys(done.stdout) and not obeys(done.stderr), done.stderr
    assert "Traceback" not in done.stderr


def test_words_of_llama_cpp(capfd):

    _plain_log(4, b"bad name '\x1b[2J\xff'\n")
    _plain_log(3, b"bad name '\x1b[2J\xff'\n")
    assert not obeys(capfd.readouterr().err)


def test_titles_of_documents(tmp_path):
    code = (
        "import sys; from pathlib import Path; from kvcast import Llama; from kvcast.chat.documents import DocumentCache;"
        "llm = Llama(sys.argv[1], n_ctx=1024, n_batch=512, n_threads=1, verbose=False); tokens = [5] * 600; llm.eval(tokens);"
        "assert DocumentCache().save(llm, tokens, sys.argv[2] + chr(0xd800))"
    )
    model = write_shape(tmp_path / "x\x1b[2J.gguf", vocabulary="llama")
    env = {"KVCAST_DOCUMENTS": str(tmp_path / "documents")}
    subprocess.run([sys.executable, "-c", code, model, TEXT + "\n[bold]two"], check=True, env={**os.environ, **env}, timeout=120)
    done = command("cache", **env)
    assert done.returncode == 0 and not obeys(done.stdout + done.stderr)
    assert "\\x1b[2J" in done.stdout and "\\n[bold]two" in done.stdout and "600" in done.stdout


def test_names_in_a_session(tmp_path):
    model = write_shape(tmp_path / "x\x1b[2J.gguf", vocabulary="llama")
    llm = Llama(model, n_ctx=256, n_threads=1, verbose=False)
    llm.eval([5, 6])
    llm.save_session(tmp_path / "x")
    other = Llama(write_shape(tmp_path / "y.gguf", n_ff=256, vocabulary="llama"), n_ctx=256, n_threads=1, verbose=False)
    with pytest.raises(SessionError) as raised:
        other.load_session(tmp_path / "x")
    assert not obeys(str(raised.value))
    assert DocumentCache(tmp_path).entries() == []
    llm.close()
    other.close()
