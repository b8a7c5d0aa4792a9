"""`kvcast chat --session`: a conversation survives what ends the process, and a file that cannot be one is said before anything else."""

import contextlib
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from commands import command, one_sentence
from kvcast import Llama, SessionError
from kvcast.chat.conversation import Conversation, Signals
from kvcast.llama import session_file
from kvcast.terminal import plain
from places import ROOT
from shapes import write_shape

sys.path.append(str(ROOT / "scripts"))
from fuzzing.forge import take_apart

LIMIT_S = 60


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Its answers are odd bytes, and never end by themselves."""
    path = write_shape(tmp_path_factory.mktemp("model") / "tiny.gguf", vocabulary="llama", n_ctx=65536)
    key = b"tokenizer.ggml.eos_token_id" + struct.pack("<I", 4)
    data = path.read_bytes().replace(key + struct.pack("<I", 2), key + struct.pack("<I", 1000))
    path.write_bytes(data.replace(b"</s>", b"</x>"))
    return path


class Chat:
    """The command on a terminal of its own."""

    def __init__(self, model, session, *options, ignore_hangup=False):
        arguments = ["chat", "-m", model, "--session", session, "--context", "32768", *options]
        self.pid, self.terminal = pty.fork()
        if self.pid == 0:
            if ignore_hangup:
                signal.signal(signal.SIGHUP, signal.SIG_IGN)
            os.execv(sys.executable, [sys.executable, "-m", "kvcast.cli", *map(str, arguments)])
        self.seen = b""

    def until(self, words):
        """Read until something was written."""
        end = time.monotonic() + LIMIT_S
        while words not in self.seen:
            assert time.monotonic() < end, self.seen
            if select.select([self.terminal], [], [], 0.1)[0]:
                self.seen += os.read(self.terminal, 65536)
        self.seen = self.seen[self.seen.index(words) + len(words) :]

    def say(self, text):
        os.write(self.terminal, text.encode() + b"\n")

    def send(self, *numbers):
        for number in numbers:
            os.kill(self.pid, number)

    def end(self):
        """The exit code."""
        end = time.monotonic() + LIMIT_S
        while (ended := os.waitpid(self.pid, os.WNOHANG)) == (0, 0):
            assert time.monotonic() < end, self.seen
            with contextlib.suppress(OSError):
                if select.select([self.terminal], [], [], 0.1)[0]:
                    self.seen += os.read(self.terminal, 65536)
        with contextlib.suppress(OSError):
            while select.select([self.terminal], [], [], 0)[0] and (more := os.read(self.terminal, 65536)):
                self.seen += more
        assert b"Traceback" not in self.seen, self.seen.decode()
        return os.waitstatus_to_exitcode(ended[1])


def messages(path):
    return session_file.read_meta(path)["about"]["messages"]


@pytest.mark.parametrize(
    ("moment", "numbers", "code"),
    [("waiting", ["SIGTERM"], 143), ("waiting", ["SIGHUP"], 129), ("waiting", ["SIGINT"], 0),
     ("answering", ["SIGTERM", "SIGHUP"], 143), ("answering", ["SIGHUP", "SIGHUP"], 129), ("answering", ["SIGINT"], 0)],
    ids=str,
)  # fmt: skip
def test_signals(model, tmp_path, moment, numbers, code):
    path = tmp_path / "x"
    chat = Chat(model, path, "--max-tokens", "4" if moment == "waiting" else "30000")
    chat.until(b"> ")
    chat.say("My name is Zoe.")
    if moment == "waiting":
        chat.until(b"> ")
    else:
        chat.until(b"Zoe.\r\n")
        chat.until(b"\\x")  # the answer has begun
    chat.send(*(getattr(signal, n) for n in numbers))
    if moment == "answering" and numbers == ["SIGINT"]:
        chat.until(b"stopped")
        chat.until(b"> ")
        chat.say("")
    found = chat.end()
    # of two, either may come first
    assert found == code or (len(numbers) == 2 and found in (129, 143))
    assert [m["role"] for m in messages(path)] == ["user", "assistant"] and messages(path)[0]["content"] == "My name is Zoe."
    assert messages(path)[1]["content"]


def test_a_conversation_that_was_ended_is_gone_on_with(model, tmp_path):
    path = tmp_path / "x"
    chat = Chat(model, path, "--max-tokens", "30000")
    chat.until(b"> ")
    chat.say("My name is Zoe.")
    chat.until(b"\\x")
    chat.send(signal.SIGTERM)
    assert chat.end() == 143
    again = command("chat", "-m", model, "--session", path, "--context", "32768", "--max-tokens", "4", given="Why?\n")
    assert again.returncode == 0 and "opened a conversation of" in again.stderr and len(messages(path)) == 4


@pytest.mark.parametrize("moment", ["waiting", "answering"])
def test_a_closed_window(model, tmp_path, moment):
    path = tmp_path / "x"
    chat = Chat(model, path, "--max-tokens", "4" if moment == "waiting" else "30000")
    chat.until(b"> ")
    chat.say("My name is Zoe.")
    chat.until(b"> " if moment == "waiting" else b"\\x")
    os.close(chat.terminal)
    chat.terminal = os.open("/dev/null", os.O_RDONLY)
    assert chat.end() == 129
    assert [m["role"] for m in messages(path)] == ["user", "assistant"]


def test_what_was_said_stays(model):
    """Whoever listened may go."""
    llm = Llama(model, n_ctx=256, n_threads=1, verbose=False)
    conversation = Conversation(llm)
    pieces = conversation.ask("Why?", max_tokens=100)
    said = [next(pieces), next(pieces)]
    pieces.close()
    assert conversation.messages == [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "".join(said)}]
    llm.close()


def test_an_answer_that_a_terminal_would_obey(model, tmp_path):
    """The tiny model says any byte."""
    done = command("chat", "-m", model, "--context", "2048", "--max-tokens", "300", "--temperature", "2", given="Why?\n")
    assert done.returncode == 0 and "\\x07" in done.stdout and "\\x0d" in done.stdout and plain(done.stdout) == done.stdout


def test_nohup(model, tmp_path):
    path = tmp_path / "x"
    chat = Chat(model, path, "--max-tokens", "4", ignore_hangup=True)
    chat.until(b"> ")
    chat.send(signal.SIGHUP)
    chat.say("My name is Zoe.")
    chat.until(b"> ")
    chat.say("")
    assert chat.end() == 0 and len(messages(path)) == 2


def test_killed_between_two_turns(model, tmp_path):
    """What can be written at once is, after each answer."""
    path = tmp_path / "x"
    chat = Chat(model, path, "--max-tokens", "4")
    chat.until(b"> ")
    for n in (2, 4, 6):
        chat.say("Go on.")
        chat.until(b"tok/s")
        chat.until(b"> ")
        assert len(messages(path)) == n
    os.write(chat.terminal, b"half a ques")
    chat.send(signal.SIGKILL)
    assert chat.end() == -9 and len(messages(path)) == 6


def test_what_is_large_is_written_in_the_end(model, tmp_path, monkeypatch):
    llm = Llama(model, n_ctx=256, n_threads=1, verbose=False)
    conversation = Conversation(llm)
    assert conversation.is_small
    monkeypatch.setattr("kvcast.chat.conversation.SMALL_BYTES", 10)
    assert not conversation.is_small
    llm.close()


# ---- where it cannot be kept


@pytest.mark.parametrize(
    "place", ["no folder", "a file for a folder", "a folder", "a pipe", "a device", "a model", "cut short", "a text", "older"]
)
def test_a_place_is_looked_at_first(model, tmp_path, place):
    """Before the model is: its name is wrong too."""
    path = tmp_path / "x"
    said = {"no folder": "No such file", "a file for a folder": "Not a directory", "older": "version 1"}
    words = {**said, "a model": "is not a session", "a text": "is not a session"}.get(place, place)
    if place == "no folder":
        path = tmp_path / "none" / "x"
    elif place == "a file for a folder":
        path.touch()
        path = path / "x"
    elif place == "a folder":
        path.mkdir()
    elif place == "a pipe":
        os.mkfifo(path)
    elif place == "a device":
        path.symlink_to("/dev/null")
    elif place == "a model":
        path.write_bytes(model.read_bytes()[:1000])
    elif place == "a text":
        path.write_text("Dear diary")
    else:
        llm = Llama(model, n_ctx=256, n_threads=1, verbose=False)
        llm.eval([5, 6])
        llm.save_session(path)
        llm.close()
        data = path.read_bytes()
        path.write_bytes(data[:-5] if place == "cut short" else data[:-12] + (1).to_bytes(4, "little") + data[-8:])
    before = path.read_bytes() if path.is_file() else None
    one_sentence(command("chat", "-m", "nowhere.gguf", "--session", path, given="Hello\n"), words)
    assert before is None or path.read_bytes() == before
    assert not list(tmp_path.glob(".kvcast*"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(tmp_path):
    tmp_path.chmod(0o500)
    one_sentence(command("chat", "-m", "nowhere.gguf", "--session", tmp_path / "x"), "Permission denied")


def test_a_disk_that_fills_up_is_said_and_the_chat_goes_on(model, tmp_path):
    limit = "import resource; from kvcast.cli import main; resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)); main()"
    arguments = ["chat", "-m", model, "--session", tmp_path / "x", "--context", "1024", "--max-tokens", "4"]
    done = subprocess.run(
        [sys.executable, "-c", limit, *map(str, arguments)], input="One\nTwo\nThree\n", capture_output=True, text=True, timeout=LIMIT_S
    )
    assert done.returncode == 1 and done.stderr.count("tok/s") == 3 and "Traceback" not in done.stderr
    assert done.stderr.count("cannot be saved") == 2 and "File too large" in done.stderr  # once, and in the end
    assert not list(tmp_path.iterdir())


# ---- what stands in a conversation

GOOD = [{"role": "user", "content": "My name is Zoe."}, {"role": "assistant", "content": "Hello."}]
ODD = {
    "none": {},
    "null": {"messages": None},
    "text": {"messages": "x"},
    "a list of texts": {"messages": ["x"]},
    "a dict": {"messages": {"role": "user", "content": "x"}},
    "no role": {"messages": [{"content": "x"}]},
    "no content": {"messages": [{"role": "user"}]},
    "another role": {"messages": [{"role": "tool", "content": "x"}]},
    "a role of another type": {"messages": [{"role": ["user"], "content": "x"}]},
    "a content of another type": {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]},
    "null content": {"messages": [*GOOD, {"role": "user", "content": None}]},
    "more": {"messages": [{"role": "user", "content": "x", "tool_calls": []}]},
    "half a character": {"messages": [{"role": "user", "content": "a\ud800"}]},
    "deep": {"messages": [[[[[[[]]]]]]]},
}


@pytest.fixture(scope="module")
def parts(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("talk") / "x"
    llm = Llama(model, n_ctx=256, n_threads=1, flash_attn=True, verbose=False)
    llm.eval([5, 6, 7])
    llm.save_session(path, {"messages": GOOD})
    llm.close()
    return take_apart(path)


@pytest.mark.parametrize("about", ODD.values(), ids=ODD)
def test_odd_conversations(model, parts, tmp_path, about):
    (tmp_path / "x").write_bytes(parts.with_meta(about=about).join())
    llm = Llama(model, n_ctx=256, n_threads=1, flash_attn=True, verbose=False)
    llm.eval([9, 9])
    conversation = Conversation(llm)
    with pytest.raises(SessionError, match=r"holds (no|a) conversation.*choose another file"):
        conversation.resume(tmp_path / "x")
    assert conversation.messages == [] and llm.n_tokens == 2 and llm.input_ids[:2].tolist() == [9, 9]
    llm.eval([5])
    llm.close()


def test_an_odd_conversation_is_one_sentence(model, parts, tmp_path):
    (tmp_path / "x").write_bytes(parts.with_meta(about=ODD["no role"]).join())
    before = (tmp_path / "x").read_bytes()
    one_sentence(
        command("chat", "-m", model, "--dense", "--context", "256", "--session", tmp_path / "x", given="Why?\n"), "a message is none"
    )
    assert (tmp_path / "x").read_bytes() == before


def test_another_document_leaves_the_session_in_hand(model, parts, tmp_path):
    (tmp_path / "x").write_bytes(replace(parts).with_meta(about={"messages": GOOD}).join())
    llm = Llama(model, n_ctx=1024, n_threads=1, flash_attn=True, verbose=False)
    conversation = Conversation(llm, "A text.")
    conversation.read()
    n = llm.n_tokens
    with pytest.raises(SessionError, match="without this document"):
        conversation.resume(tmp_path / "x")
    assert llm.n_tokens == n > 3
    llm.close()


# ---- signals, in this process


def test_a_signal_while_something_is_kept_waits():
    stopped = []
    with pytest.raises(SystemExit) as ended, Signals(lambda: stopped.append(1)) as signals:
        with signals.keeping():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
        assert not stopped
        with signals.waiting():
            raise AssertionError("not reached")
    assert ended.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL and signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_two_interrupts_while_something_runs():
    stopped = []
    with pytest.raises(KeyboardInterrupt), Signals(lambda: stopped.append(1)):
        os.kill(os.getpid(), signal.SIGINT)
        assert stopped
        os.kill(os.getpid(), signal.SIGINT)


def test_llama_cpp_is_stopped_at_once(model):
    """Not when it returns to Python: the thread beside does it, while the main thread is in a call that lasts."""
    import ctypes
    import threading

    stopped = threading.Event()
    with contextlib.suppress(SystemExit), Signals(stopped.set):
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        libc = ctypes.CDLL(None)
        for _ in range(200):  # a call that does not look at signals: sleep is cut short by one, and begins again
            libc.usleep(50_000)
            if stopped.is_set():
                break
        assert stopped.is_set()


def test_errors_are_not_hidden_by_a_signal():
    with pytest.raises(SessionError), Signals(lambda: None):
        os.kill(os.getpid(), signal.SIGTERM)
        raise SessionError("the disk is full")
