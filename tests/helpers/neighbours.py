"""A pytest plugin under which llama-cpp-python's own tests run with ``kvcast.Llama``; see test_neighbours.py.

With KVCAST_NEIGHBOURS=sparse every model that generates has a SparseConfig. Files that the tests would download are SmolLM2.
"""

import functools
import importlib.util
import os
import sys
import types

import pytest

import kvcast
from kvcast import models

# isort: split
import llama_cpp  # which kvcast carries

SPARSE = os.environ.get("KVCAST_NEIGHBOURS") == "sparse"
QWEN = "needs a download: what Qwen3.5 says is expected"
RECURRENT, HYBRID = "needs a download: a recurrent model", "needs a download: a hybrid model"
SKIPPED = {
    "test_real_model": QWEN,
    "test_real_llama": QWEN,
    "test_real_llama_repeated_prompt_cache": QWEN,
    "test_real_llama_embeddings": "needs a download: an embedding model",
    "test_recurrent_model_prompt_cache_reset": RECURRENT,
    "test_hybrid_model_prompt_cache_reset": HYBRID,
    **{
        f"{name}[llama_cpp_{kind}_model_path-{flags}]": reason
        for name in (
            "test_exact_cached_prompt_reuse_matches_fresh",
            "test_loaded_exact_cached_prompt_reuse_matches_fresh",
            "test_ram_cache_exact_prompt_hit_matches_fresh",
            "test_shorter_prompt_prefix_reuse_matches_fresh",
        )
        for kind, flags, reason in (("recurrent", "True-False", RECURRENT), ("hybrid", "False-True", HYBRID))
    },
}


class Neighbour(kvcast.Llama):
    @functools.wraps(kvcast.Llama.__init__)
    def __init__(self, *args, **kwargs):
        generates = not (kwargs.get("vocab_only") or kwargs.get("embedding"))
        super().__init__(*args, sparse=kvcast.SparseConfig() if SPARSE and generates else None, **kwargs)


def pytest_configure():
    llama_cpp.Llama = Neighbour
    hub = types.ModuleType("huggingface_hub")
    hub.hf_hub_download = lambda repo_id, filename: str(models.resolve("smollm2"))
    sys.modules["huggingface_hub"] = hub
    if importlib.util.find_spec("scipy") is None:  # they import a name from it and do not use it
        special = types.ModuleType("scipy.special")
        special.log_softmax = None
        sys.modules.update({"scipy": types.ModuleType("scipy"), "scipy.special": special})


def pytest_collection_modifyitems(items):
    for item in items:
        if item.name in SKIPPED:
            item.add_marker(pytest.mark.skip(reason=SKIPPED[item.name]))
