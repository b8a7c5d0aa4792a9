"""kvcast's models behind the `llm` tool and LangChain, and from a hub: offline, with the model of the other tests."""

import os
import subprocess
import sys
import types

import pytest

import kvcast
from kvcast import Llama, SparseConfig
from places import DATA, ROOT

SMALL = dict(n_ctx=1024, n_threads=2, n_threads_batch=2, verbose=False)


# ---- llm


@pytest.fixture
def tool(smollm2, tmp_path):
    """Runs ``llm`` with the plugin, apart from the user's own settings and logs."""
    pytest.importorskip("llm")
    script = "import sys, llm.cli; from llm.plugins import pm; import kvcast.integrations.llm_plugin as plugin; "
    script += "pm.is_registered(plugin) or pm.register(plugin); llm.cli.cli()"

    def run(*arguments, said="", **environment):
        env = {**os.environ, "LLM_USER_PATH": str(tmp_path / "llm"), "LLM_LOAD_PLUGINS": "", "KVCAST_GGUF": "", **environment}
        return subprocess.run(
            [sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True, input=said, env=env, timeout=120
        )

    return run


def test_llm_lists_what_is_there(tool, smollm2, tmp_path):
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "tiny.gguf").touch()
    gguf = os.pathsep.join([str(tmp_path / "more"), "nowhere/lost.gguf"])
    listed = tool("models", KVCAST_GGUF=gguf).stdout
    assert {"Kvcast: kvcast/smollm2", "Kvcast: kvcast/tiny", "Kvcast: kvcast/lost"} <= {line.strip() for line in listed.splitlines()}
    assert "kvcast/smollm2" not in tool("models", KVCAST_MODELS=str(tmp_path)).stdout
    lost = tool("-m", "kvcast/lost", "Why?", KVCAST_GGUF=gguf)
    assert lost.returncode == 1 and "there is no model file 'nowhere/lost.gguf'" in lost.stderr and "Traceback" not in lost.stderr


def test_llm_answers_about_a_file_and_goes_on(tool, tmp_path):
    few = ["-o", "max_tokens", "8", "-o", "context", "1024", "-o", "temperature", "0"]
    (tmp_path / "note.txt").write_text((DATA / "code.txt").read_text()[:1500] + "\nThe name of the cat is Ada.\n")
    first = tool("-m", "kvcast/smollm2", *few, "-o", "budget", "256", "-f", tmp_path / "note.txt", "What is the name of the cat?")
    assert first.returncode == 0 and "Ada" in first.stdout, first.stderr
    again = tool("-c", *few, "And whose name is it?")
    assert again.returncode == 0 and again.stdout.strip(), again.stderr
    whole = tool("logs", "-c", "--json").stdout
    assert "whose name" in whole and "Ada" in whole
    wrong = ["-m", "kvcast/smollm2", "-f", tmp_path / "note.txt", "-o", "context", "256", "Why?"]
    for done, words in (
        (tool(*wrong), "use a larger -o context"),
        (tool(*wrong, "-o", "max_tokens", "0"), "max_tokens"),
        (tool("chat", "-m", "kvcast/smollm2", "-o", "budget", "80", said="Why?\n"), "budget is 80"),
    ):
        assert done.returncode == 1 and words in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_llm_keeps_the_model_and_the_conversation(smollm2):
    pytest.importorskip("llm")
    from kvcast.integrations.llm_plugin import Kvcast

    model = Kvcast("smollm2", smollm2)
    few = {"context": 1024, "max_tokens": 4, "temperature": 0.0}
    conversation = model.conversation()
    pieces = list(conversation.prompt("Count to ten.", system="Be brief.", **few))
    loaded = model._loaded[2]
    first = loaded.n_tokens
    assert len(pieces) > 1 and loaded.sparse == SparseConfig()
    conversation.prompt("Go on.", **few).text()
    assert model._loaded[2] is loaded and loaded.n_tokens > first + 8
    roles = [m.role for m in conversation.responses[-1].prompt.messages]
    assert roles == ["system", "user", "assistant", "user"]
    model.prompt("Why?", **few, budget=256).text()
    assert model._loaded[2] is not loaded and model._loaded[2].sparse.budget == 256
    model._loaded[2].close()


def test_the_plugin_loads_no_library():
    pytest.importorskip("llm")
    script = "import sys, kvcast.integrations.llm_plugin; assert not {'llama_cpp', 'numba'} & sys.modules.keys(); from kvcast import Llama"
    subprocess.run([sys.executable, "-c", script], check=True)
    assert kvcast.Llama is Llama
    with pytest.raises(AttributeError, match="no attribute 'Lama'"):
        kvcast.Lama  # noqa: B018


# ---- LangChain


def test_langchain(smollm2):
    pytest.importorskip("langchain_community")
    from langchain_core.messages import AIMessage, HumanMessage, SystemMessage

    from kvcast.integrations.langchain import ChatKvcast

    llm = Llama(smollm2, sparse=SparseConfig(budget=256), **SMALL)
    chat = ChatKvcast(client=llm, max_tokens=12, temperature=0.0)
    messages = [
        SystemMessage("You are brief."),
        HumanMessage("My cat is called Ada.\n" * 60),
        AIMessage("Yes."),
        HumanMessage("Which name?"),
    ]
    answer = chat.invoke(messages)
    assert answer.content and llm.session.times.n_steps > 4
    llm.reset()
    pieces = [str(chunk.content) for chunk in chat.stream(messages)]
    assert "".join(pieces) == answer.content and len(pieces) > 4
    once = ChatKvcast(client=llm, max_tokens=12, temperature=0.0, streaming=False, grammar='root ::= "Bea"').invoke(messages)
    assert once.content == "Bea"
    for wrong, said in (
        ({"client": llm, "n_ctx": 4096}, "n_ctx is an argument of loading"),
        ({"client": llm, "max_tokns": 5}, "max_tokns"),
        ({"client": smollm2}, "give it a loaded kvcast.Llama"),
        ({"client": llm, "grammar": "x", "grammar_path": "y"}, "use one of them"),
    ):
        with pytest.raises(ValueError, match=said):
            ChatKvcast(**wrong)
    llm.close()


def test_langchain_example(smollm2, tmp_path):
    pytest.importorskip("langchain_community")
    (tmp_path / "note.txt").write_text("The name of the cat is Ada. " * 40)
    command = [sys.executable, ROOT / "docs" / "examples" / "langchain_chat.py", tmp_path / "note.txt", "Which cat?", "Why?"]
    done = subprocess.run([*command, "--context", "1024", "--tokens", "8"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "> Which cat?\n" in done.stdout and "> Why?\n" in done.stdout


# ---- a hub


def test_from_pretrained_passes_sparse_on(smollm2, monkeypatch):
    asked = []

    class HfFileSystem:
        def ls(self, repo_id, recursive):
            return [{"name": f"{repo_id}/README.md"}, {"name": f"{repo_id}/quants/{smollm2.name}"}]

    def hf_hub_download(repo_id, filename, subfolder, local_dir, local_dir_use_symlinks, cache_dir, local_files_only=False):
        asked.append((repo_id, subfolder, filename))
        return str(smollm2)

    hub = types.ModuleType("huggingface_hub")
    hub.HfFileSystem, hub.hf_hub_download = HfFileSystem, hf_hub_download
    hub.utils = types.ModuleType("huggingface_hub.utils")
    hub.utils.validate_repo_id = lambda repo_id: None
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    monkeypatch.setitem(sys.modules, "huggingface_hub.utils", hub.utils)
    llm = Llama.from_pretrained("someone/model", "*Q4_1.gguf", sparse=SparseConfig(budget=256), **SMALL)
    assert isinstance(llm, Llama) and llm.sparse.budget == 256 and llm.n_ctx() == 1024
    assert asked[-1] == ("someone/model", "quants", smollm2.name)
    llm.close()
    with pytest.raises(TypeError, match="did you mean 'sparse'"):
        Llama.from_pretrained("someone/model", "*Q4_1.gguf", sprase=SparseConfig(), **SMALL)
