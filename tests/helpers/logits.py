"""Logits of the last token, and how far apart those of two ways may be."""

import numpy as np

from places import ROOT

REFERENCE = ROOT / "build" / "reference" / "kvcast" / "lib"  # unpatched llama.cpp: make reference

# Largest difference of a logit over the steps between dense flash attention and our op over all blocks. llama.cpp's CPU
# flash attention rounds q to f16 and accumulates V in f16; ours is f32 throughout. llama.cpp differs from itself by as
# much when flash attention is turned off, which test_contract_2 measures beside it.
LOGIT_DIFFERENCE = {"smollm2": 1.8, "qwen": 1.0, "gemma3": 2.2}


def logits_of(llm) -> np.ndarray:
    import llama_cpp

    return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llm.ctx, -1), shape=(llm.n_vocab(),)).copy()
