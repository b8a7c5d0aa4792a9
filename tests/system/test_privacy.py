"""Nothing is sent anywhere, and what is left on disk is what docs/privacy.md names."""

import ast
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

import sealed
from places import ROOT
from shapes import write_shape

SEALED = Path(sealed.__file__)
# where ONNX Runtime is silent without being told, and what it is told
UNSAID = ("CI", "TF_BUILD", "GITHUB_ACTIONS", "GITLAB_CI", "CIRCLECI", "TRAVIS", "JENKINS_URL", "CODEBUILD_BUILD_ID", "BUILDKITE",
          "TEAMCITY_VERSION", "APPVEYOR", "BITBUCKET_BUILD_NUMBER", "SYSTEM_TEAMFOUNDATIONCOLLECTIONURI", "ORT_RUNNING_UNIT_TESTS",
          "ORT_DISABLE_TELEMETRY", "ORT_TELEMETRY_DISABLED", "HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK", "KVCAST_DOCUMENTS")  # fmt: skip
needs_seal = pytest.mark.skipif(not sealed.can_seal(), reason="the kernel's filter of system calls is set for Linux on x86-64 and ARM")


@pytest.fixture
def home(tmp_path):
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


@pytest.fixture
def tiny(tmp_path):
    return write_shape(tmp_path / "tiny.gguf", vocabulary="llama", n_vocab=320)


def start(home, *arguments, **more):
    environment = {name: value for name, value in os.environ.items() if name not in UNSAID and not name.startswith("XDG_")}
    environment |= {"HOME": str(home), "COLUMNS": "200", **more}
    command = [sys.executable, str(SEALED), *map(str, arguments)]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=home
    )


def run(home, *arguments, given="", **more):
    child = start(home, *arguments, **more)
    out, errors = child.communicate(given, timeout=300)
    return child.returncode, out, errors


def files(home):
    return sorted(str(path.relative_to(home)) for path in home.rglob("*") if path.is_file())


@needs_seal
def test_the_seal_holds(home):
    for code, ends in {
        "import socket; socket.create_connection(('127.0.0.1', 9))": -31,
        "import socket; socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', 9))": -31,
        "import socket; socket.getaddrinfo('example.org', 80)": -31,
        "import ctypes; ctypes.CDLL(None).getaddrinfo(b'example.org', b'80', None, ctypes.create_string_buffer(8))": -31,
        "import socket; a, b = socket.socketpair(); a.send(b'x'); assert b.recv(1) == b'x'": 0,
        "import socket; socket.create_server(('127.0.0.1', 0))": 0,
    }.items():
        assert run(home, "-c", code)[0] == ends, code


@needs_seal
@pytest.mark.parametrize("keep", [False, True])
def test_a_chat_about_a_file(home, tiny, keep):
    (home / "private.txt").write_text("Anna has a dog. " * 40)
    options = ["--model", tiny, "-f", "private.txt", "--context", 2048, "--max-tokens", 8, *["--no-cache"] * (not keep)]
    code, out, errors = run(home, "kvcast.cli", "chat", *options, given="Who has a dog?\n", ORT_DISABLE_TELEMETRY="0")
    assert code == 0 and "tok/s" in errors, (code, out, errors)
    left = files(home)
    left.remove("private.txt")
    documents = [name for name in left if name.startswith(".cache/kvcast/documents/")]
    assert len(documents) == keep
    assert [name for name in left if not name.startswith(".cache/kvcast/")] == []


@needs_seal
def test_a_server(home, tiny):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    child = start(home, "kvcast.cli", "serve", tiny, "--context", 512, "--port", port, "--no-cache")
    try:
        body = b'{"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}'
        request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/chat/completions", body, headers={"Content-Type": "application/json"})
        end = time.monotonic() + 120
        while True:
            try:
                with urllib.request.urlopen(request, timeout=60) as answer:
                    assert answer.status == 200
                break
            except ConnectionError:
                pass
            except urllib.error.URLError as error:
                assert isinstance(error.reason, ConnectionError), error
            assert child.poll() is None and time.monotonic() < end, child.communicate()
            time.sleep(0.1)
        child.send_signal(2)
        out, errors = child.communicate(timeout=60)
        assert child.returncode == 0, (child.returncode, out, errors)
    finally:
        child.kill()
        child.communicate()
    assert [name for name in files(home) if not name.startswith(".cache/kvcast/")] == []


@needs_seal
@pytest.mark.parametrize(
    "module", ["kvcast.integrations.langchain", "kvcast.integrations.llm_plugin", "kvcast.server.app", "kvcast.cli.predictor"]
)
def test_importing(module, home):
    pytest.importorskip(
        {"kvcast.integrations.langchain": "langchain_community", "kvcast.integrations.llm_plugin": "llm"}.get(module, "numpy")
    )
    code, _, errors = run(home, "-c", f"import {module}")
    assert code == 0, errors
    assert files(home) == []


@pytest.mark.parametrize("first", ["kvcast", "predictor_onnx", "kvcast.sparse.history", "predictor_onnx.infer"])
def test_telemetry_is_off_from_the_first_import_on(first):
    """Also against what the user or the host program has set: nothing is sent, whoever imports ONNX Runtime after that."""
    code = f"import {first}, os; print(os.environ['ORT_DISABLE_TELEMETRY'], os.environ['HF_HUB_DISABLE_TELEMETRY'])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "ORT_DISABLE_TELEMETRY": "0"}, timeout=60
    )
    assert done.stdout == "1 1\n", done.stderr


def test_onnx_runtime_is_imported_in_one_place():
    found = []
    for path in [p for folder in ("runtime/kvcast", "predictor_onnx", "scripts", "tests") for p in (ROOT / folder).rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            if any(name.split(".")[0] == "onnxruntime" for name in names):
                found.append(str(path.relative_to(ROOT)))
    assert set(found) == {"predictor_onnx/runtime.py"}


def test_telemetry_events_are_off_in_the_module_too(monkeypatch):
    from predictor_onnx import runtime

    called = []
    monkeypatch.setattr(runtime.onnxruntime(), "disable_telemetry_events", lambda: called.append(1))
    runtime.onnxruntime()
    assert called == [1]


def test_the_page_loads_nothing_from_elsewhere():
    for path in (ROOT / "runtime/kvcast/server/page").iterdir():
        text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert "://" not in text, path


def test_the_page_on_privacy_names_what_is_kept():
    text = (ROOT / "docs" / "privacy.md").read_text()
    for word in (
        "ORT_DISABLE_TELEMETRY",
        "kvcast/models",
        "kvcast/documents",
        "KVCAST_DOCUMENTS",
        "--no-cache",
        "kvcast cache --clear",
        "Numba",
    ):
        assert word in text, word
