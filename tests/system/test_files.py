"""How files are written: whole or not at all, to regular files, for whom they were, by any number of writers."""

import contextlib
import os
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from commands import command, one_sentence
from kvcast import KvcastError, SessionError, files
from kvcast.gguf.embedded_predictor import embed, extract
from places import ROOT
from predictor_onnx.infer import resolve
from predictor_onnx.recording import Trace
from shapes import write_shape

ROOT_USER = hasattr(os, "geteuid") and os.geteuid() == 0


def mode(path):
    return stat.S_IMODE(os.lstat(path).st_mode)


def names(folder):
    return sorted(p.name for p in folder.iterdir())


# ---- everything that writes: a name for its test, and what writes to a path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_shape(tmp_path_factory.mktemp("model") / "tiny.gguf", vocabulary="llama")


@pytest.fixture(scope="module")
def carrier(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "carrier.gguf"
    embed(model, resolve("stream"), path)
    return path


@pytest.fixture(scope="module")
def llm(model):
    from kvcast import Llama

    llm = Llama(model, n_ctx=256, n_threads=1, verbose=False)
    llm.eval([5, 6, 7])
    yield llm
    llm.close()


WRITERS = {
    "a session": lambda path, request: request.getfixturevalue("llm").save_session(path),
    "a model with a predictor": lambda path, request: embed(request.getfixturevalue("model"), resolve("stream"), path),
    "a predictor": lambda path, request: extract(request.getfixturevalue("carrier"), path),
    "a recording": lambda path, request: Trace(*(np.zeros((1, 1, 1), np.uint8),) * 3, {}).save(path),
    "a report": lambda path, request: files.write(path, "{}"),
}


@pytest.fixture(params=WRITERS)
def write(request):
    return lambda path: WRITERS[request.param](path, request)


def test_a_new_file(write, tmp_path, request):
    before = os.umask(0o022)
    try:
        write(tmp_path / "x.onnx")
    finally:
        os.umask(before)
    assert (tmp_path / "x.onnx").stat().st_size
    assert mode(tmp_path / "x.onnx") == (0o600 if "a session" in request.node.name else 0o644)
    assert set(names(tmp_path)) <= {"x.onnx", "x.json"}


@pytest.mark.parametrize("permissions", [0o600, 0o640, 0o644, 0o660, 0o4755])
def test_permissions_stay(write, tmp_path, permissions):
    path = tmp_path / "x.onnx"
    path.touch()
    path.chmod(permissions)
    write(path)
    assert path.stat().st_size and mode(path) == permissions & 0o777


def test_a_link_is_followed(write, tmp_path):
    there, link, other = tmp_path / "there", tmp_path / "x.onnx", tmp_path / "y.onnx"
    there.mkdir()
    target = there / "target.onnx"
    target.write_bytes(b"old")
    target.chmod(0o600)
    link.symlink_to(other.name)  # relative, and over another
    other.symlink_to(target)
    write(link)
    assert link.is_symlink() and other.is_symlink() and not target.is_symlink()
    assert target.stat().st_size > 3 or target.read_bytes() == b"{}"
    assert mode(target) == 0o600 and names(there) == ["target.onnx"]


def test_a_link_to_nothing_yet(write, tmp_path):
    link = tmp_path / "x.onnx"
    link.symlink_to("target.onnx")
    write(link)
    assert link.is_symlink() and (tmp_path / "target.onnx").is_file()


def make_kind(kind, path):
    if kind == "a folder":
        path.mkdir()
    elif kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a socket":
        with socket.socket(socket.AF_UNIX) as s:
            s.bind(str(path))
    elif kind == "a device":
        path.symlink_to("/dev/null")
    else:
        path.symlink_to(path.name)


@pytest.mark.parametrize("kind", ["a folder", "a pipe", "a socket", "a device", "symbolic links"])
def test_what_is_no_file_is_refused_and_stays(write, tmp_path, kind):
    path = tmp_path / "x.onnx"
    make_kind(kind, path)
    before = os.lstat(path)
    with pytest.raises(KvcastError, match=kind) as raised:
        write(path)
    assert "\n" not in str(raised.value)
    after = os.lstat(path)
    assert (before.st_ino, before.st_mode) == (after.st_ino, after.st_mode)
    assert names(tmp_path) == ["x.onnx"]
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_a_folder_that_is_not_there(write, tmp_path, request):
    if "a recording" in request.node.name:
        return  # makes it
    with pytest.raises(KvcastError):
        write(tmp_path / "none" / "x.onnx")
    (tmp_path / "file").touch()
    with pytest.raises(KvcastError):
        write(tmp_path / "file" / "x.onnx")
    assert names(tmp_path) == ["file"]


def test_a_name_as_long_as_names_can_be(write, tmp_path):
    write(tmp_path / ("x" * 250 + ".onnx"))
    with pytest.raises(KvcastError, match="too long"):
        write(tmp_path / ("x" * 260 + ".onnx"))


@pytest.mark.skipif(ROOT_USER, reason="root may write everything")
def test_what_is_read_only_stays(write, tmp_path):
    path = tmp_path / "x.onnx"
    path.write_bytes(b"kept")
    path.chmod(0o400)
    with pytest.raises(KvcastError, match="read-only"):
        write(path)
    assert path.read_bytes() == b"kept"


# ---- the one way to write


def test_what_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"old")
    for error in (OSError(28, "no space"), KeyboardInterrupt(), ValueError()):
        with pytest.raises(type(error)), files.replacing(path) as file:
            file.write(b"new" * 10000)
            raise error
        assert path.read_bytes() == b"old" and names(tmp_path) == ["x"]


def test_it_is_on_the_disk_before_it_has_the_name(tmp_path, monkeypatch):
    done = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, real=real: done.append(name) or real(*a))
    files.write(tmp_path / "x", b"1")
    assert done == ["fsync", "replace", "fsync"]  # the file, its name, the folder


def test_macos_says_it_in_another_way(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(files.fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(files.fcntl, "fcntl", lambda descriptor, what: asked.append(what))
    files.write(tmp_path / "x", b"1")
    assert asked == [51]


def test_names_cannot_be_guessed_and_are_never_followed(tmp_path, monkeypatch):
    seen = set()
    for _ in range(20):
        with files.replacing(tmp_path / "x"):
            seen |= {*names(tmp_path)} - {"x"}
    assert len(seen) == 20
    (tmp_path / "victim").write_bytes(b"kept")
    monkeypatch.setattr(files.secrets, "token_hex", lambda n: "guessed")
    (tmp_path / f"{files.BEGIN}guessed{files.END}").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match="exists"), files.replacing(tmp_path / "y") as file:
        file.write(b"evil")
    assert (tmp_path / "victim").read_bytes() == b"kept"


def test_what_is_private_is_so_from_the_beginning(tmp_path):
    before = os.umask(0)
    try:
        with files.replacing(tmp_path / "x", private=True):
            (partial,) = tmp_path.iterdir()
            assert mode(partial) == 0o600
    finally:
        os.umask(before)


@pytest.mark.skipif(not ROOT_USER, reason="needs files of another user")
def test_a_link_of_another_user_in_everybodys_folder(tmp_path):
    shared, mine = tmp_path / "shared", tmp_path / "mine"
    shared.mkdir()
    shared.chmod(0o1777)
    mine.write_bytes(b"kept")
    (shared / "x").symlink_to(mine)
    os.lchown(shared / "x", 12345, 12345)
    with pytest.raises(KvcastError, match="a link of another user"):
        files.write(shared / "x", b"evil")
    assert mine.read_bytes() == b"kept"
    os.lchown(shared / "x", 0, 0)
    files.write(shared / "x", b"new")
    assert mine.read_bytes() == b"new"


@pytest.mark.skipif(not ROOT_USER, reason="needs files of another user")
def test_an_owner_stays(tmp_path):
    (tmp_path / "x").touch()
    os.chown(tmp_path / "x", 12345, 12346)
    files.write(tmp_path / "x", b"1")
    assert ((tmp_path / "x").stat().st_uid, (tmp_path / "x").stat().st_gid) == (12345, 12346)


def test_what_is_left_is_told_from_what_is_written(tmp_path):
    left, others = tmp_path / f"{files.BEGIN}0{files.END}", tmp_path / "notes.part"
    left.write_bytes(b"123")
    others.touch()
    (tmp_path / f"{files.BEGIN}folder{files.END}").mkdir()
    with files.replacing(tmp_path / "x") as file:
        assert not left.exists() and others.exists()
        assert files.remove_left(tmp_path) == 0
        file.write(b"whole")
    assert (tmp_path / "x").read_bytes() == b"whole"
    assert names(tmp_path) == [f"{files.BEGIN}folder{files.END}", "notes.part", "x"]


def test_where_nothing_can_be_locked_age_tells(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_lock", lambda descriptor: None)
    young, old = (tmp_path / f"{files.BEGIN}{name}{files.END}" for name in ("young", "old"))
    for path in (young, old):
        path.touch()
    os.utime(old, (0, 0))
    files.write(tmp_path / "x", b"1")
    assert names(tmp_path) == [young.name, "x"]


def test_two_writers_in_one_process(tmp_path):
    """Equal process numbers, as in two containers."""
    path, errors = tmp_path / "x", []

    def run(i):
        try:
            for _ in range(20):
                files.write(path, bytes([i]) * 100_000)
        except BaseException as error:  # noqa: BLE001 - looked at below
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(20)]
    for t in threads:
        t.start()
    while any(t.is_alive() for t in threads):
        with contextlib.suppress(FileNotFoundError):
            found = path.read_bytes()
            assert len(found) == 100_000 and len(set(found)) == 1
    assert not errors and names(tmp_path) == ["x"]


def test_many_processes_on_one_path():
    script = ROOT / "scripts" / "concurrent_saving.py"
    done = subprocess.run([sys.executable, script, "--writers", "12", "--saves", "3"], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and "12 processes" in done.stdout, done.stdout + done.stderr


# ---- folders


def test_private_folders(tmp_path):
    before = os.umask(0)
    try:
        files.private_folder(tmp_path / "a" / "b" / "c")
        (tmp_path / "open").mkdir(mode=0o777)
        (tmp_path / "open" / "x").touch()
        files.private_folder(tmp_path / "open")
        (tmp_path / "sticky").mkdir()
        (tmp_path / "sticky").chmod(0o1777)
        files.private_folder(tmp_path / "sticky")
    finally:
        os.umask(before)
    for path in ("a", "a/b", "a/b/c", "open"):
        assert mode(tmp_path / path) == 0o700
    assert mode(tmp_path / "sticky") == 0o1777
    (tmp_path / "file").touch(0o644)
    with pytest.raises(OSError, match="Not a directory"):
        files.private_folder(tmp_path / "file")
    assert mode(tmp_path / "file") & 0o004
    if ROOT_USER:
        (tmp_path / "theirs").mkdir(mode=0o755)
        os.chown(tmp_path / "theirs", 12345, 12345)
        files.private_folder(tmp_path / "theirs")
        assert mode(tmp_path / "theirs") == 0o755


def test_reading_does_not_wait(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises(OSError, match="not a regular file"):
            files.open_regular(path)


# ---- commands


@pytest.mark.parametrize("arguments", [("inspect", "MODEL"), ("plan", "MODEL", "--ram", "32G")])
def test_reports_of_commands(model, tmp_path, arguments):
    arguments = [str(model) if a == "MODEL" else a for a in arguments]
    os.mkfifo(tmp_path / "pipe")
    one_sentence(command(*arguments, "--json", tmp_path / "pipe"), "a pipe")
    one_sentence(command(*arguments, "--json", tmp_path / "none" / "x.json"), "No such file or directory")
    (tmp_path / "x.json").touch()
    (tmp_path / "x.json").chmod(0o600)
    assert command(*arguments, "--json", tmp_path / "x.json").returncode == 0
    assert mode(tmp_path / "x.json") == 0o600 and (tmp_path / "x.json").read_text().startswith("{")


def test_a_full_disk_is_said(llm, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, os.strerror(28))

    llm.save_session(tmp_path / "x")
    before = (tmp_path / "x").read_bytes()
    monkeypatch.setattr(files, "_sync", full)
    with pytest.raises(SessionError, match="No space left on device"):
        llm.save_session(tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == before and names(tmp_path) == ["x"]
