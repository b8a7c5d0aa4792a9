"""A session file that is anybody's word, and the session in hand that it must not harm."""

import sys

import numpy as np
import pytest

from kvcast import Llama, SessionError, SparseConfig
from places import ROOT
from tiny import SHAPES, write_tiny

sys.path.append(str(ROOT / "scripts"))
from fuzzing.forge import Parts, take_apart

N_TOKENS = 70
SHARED = dict(n_ctx=256, n_batch=64, n_threads=1, n_threads_batch=1, verbose=False)
SPARSE = SparseConfig(budget=96, predictor="ema", untested=True)


def tokens_of(n, seed=0):
    return [int(t) for t in np.random.default_rng(seed).integers(3, 500, n)]


def logits(llm):
    return np.array(llm._ctx.get_logits_ith(-1)[: llm.n_vocab()])


class Subject:
    """A model, a session of it in a file, and another session in hand."""

    def __init__(self, folder, name, config):
        self.path, self.bad, self.hand = folder / "good", folder / "bad", folder / "hand"
        model = write_tiny(folder / "tiny.gguf", SHAPES[name])
        self.llm = Llama(model, sparse=config, **SHARED)
        self.n_caches = 2 if self.llm.header.n_layer_swa else 1
        self.read(tokens_of(N_TOKENS))
        self.llm.save_session(self.path, {"title": "x"})
        self.parts = take_apart(self.path)
        self.llm.reset()
        self.read(tokens_of(40, seed=1))
        self.llm.save_session(self.hand)
        self.expected = self.go_on()

    def read(self, tokens):
        self.llm.reset()
        self.llm.eval(tokens[:-2])
        for token in tokens[-2:]:
            self.llm.eval([token])

    def go_on(self):
        """Logits after further tokens, which are taken back."""
        self.llm.load_session(self.hand)
        self.llm.eval([7])
        self.llm.eval([8])
        found = logits(self.llm)
        self.llm.load_session(self.hand)
        return found

    def goes_on(self):
        self.llm.eval([7])
        self.llm.eval([8])
        np.testing.assert_array_equal(logits(self.llm), self.expected)
        self.llm.load_session(self.hand)

    def refuses(self, data, match=None, error=SessionError):
        """One sentence, and the session in hand is as it was."""
        if isinstance(data, Parts):
            data = data.join()
        self.bad.write_bytes(data)
        with pytest.raises(error, match=match) as raised:
            self.llm.load_session(self.bad)
        assert "\n" not in str(raised.value) and len(str(raised.value)) < 1500
        self.goes_on()

    def opens(self, data):
        self.bad.write_bytes(data.join() if isinstance(data, Parts) else data)
        self.llm.load_session(self.bad)
        self.llm.eval([7])
        self.llm.load_session(self.hand)


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    made = {}

    def make(name="llama", config=SPARSE):
        if (name, config) not in made:
            made[name, config] = Subject(tmp_path_factory.mktemp("hostile"), name, config)
        made[name, config].llm.load_session(made[name, config].hand)
        return made[name, config]

    yield make
    for s in made.values():
        s.llm.close()
