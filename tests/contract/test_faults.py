"""A few faults of each kind; `make faults` injects many."""

import gc
import sys
import threading

import pytest

from kvcast import GenerationError, Llama, SparseConfig
from places import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
import faults
from kvcast.bindings.log import _plain_log, muted_llama_log

COUNTS = {"interrupts": 8, "signals": 8, "python_callbacks": 4, "compiled_callbacks": 4}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Ctrl-C on its way into a callback
@pytest.mark.parametrize("kind", faults.KINDS, ids=lambda kind: kind.__name__)
def test_faults(kind):
    faults.inject(kind, COUNTS.get(kind.__name__, 2), seed=1)


@pytest.mark.parametrize("sparse", [None, SparseConfig(budget=256)], ids=["dense", "sparse"])
def test_two_threads_with_one_model(small, code, sparse):
    """The second is refused while the first evaluates, and the first is not disturbed."""
    llm = Llama(small, n_ctx=1024, sparse=sparse, n_threads=2, n_threads_batch=2, verbose=False)
    tokens = llm.tokenize(code.encode())[:700]
    first = threading.Thread(target=llm.eval, args=(tokens,))
    first.start()
    while llm._turns.thread is None and first.is_alive():
        pass
    with pytest.raises(GenerationError, match="another thread evaluates"):
        llm.eval(tokens[:1])
    first.join()
    assert llm.n_tokens == 700
    llm.eval(tokens[:1])
    llm.close()


def says(capsys):
    """Whether an error that llama.cpp reports is shown."""
    capsys.readouterr()
    _plain_log(3, b"an error\n")
    return capsys.readouterr().err == "an error\n"


def test_interrupted_models_leave_llama_cpp_as_loud_as_before(small, capsys):
    models = [Llama(small, n_ctx=256, sparse=SparseConfig(budget=160), n_threads=2, verbose=False) for _ in range(3)]
    assert says(capsys)
    for llm in models:
        llm.interrupt()
        assert not says(capsys)
    models.pop()  # never goes on
    for llm in models:
        llm.eval([1])
    gc.collect()
    assert says(capsys)
    for llm in models:
        llm.interrupt()
        llm.close()
    assert says(capsys)


def test_a_signal_anywhere_leaves_llama_cpp_as_loud_as_before(capsys):
    n_raised = 0
    for point in range(300):
        n_left = point

        def trace(frame, event, _):
            nonlocal n_left
            frame.f_trace_opcodes = True
            n_left -= event == "opcode"
            if n_left == 0:
                raise KeyboardInterrupt
            return trace

        try:
            sys.settrace(trace)
            with muted_llama_log():
                pass
        except KeyboardInterrupt:
            n_raised += 1
        finally:
            sys.settrace(None)
        assert says(capsys), point
    assert 50 < n_raised < 300


def test_an_interrupt_between_two_steps_stops_the_next(small):
    llm = Llama(small, n_ctx=256, sparse=SparseConfig(budget=160), n_threads=2, verbose=False)
    llm.interrupt()  # nothing runs: nothing is stopped
    generating = llm.generate([1, 2, 3])
    next(generating)
    llm.interrupt()
    with pytest.raises(GenerationError, match="stopped"):
        next(generating)
    llm.eval([4])
    llm.close()


def test_closed_is_closed(small):
    llm = Llama(small, n_ctx=256, sparse=SparseConfig(budget=160), n_threads=2, verbose=False)
    generating = llm.generate([1, 2, 3])
    next(generating)
    llm.on_attention(lambda *_: llm.close())  # in the middle of a step, from one of its threads
    with pytest.raises(GenerationError):
        next(generating)
    for use in (lambda: next(generating), lambda: llm.eval([1]), lambda: llm.save_state(), lambda: llm.detokenize([1]), llm.n_vocab):
        with pytest.raises((GenerationError, StopIteration)):
            use()
    with pytest.raises(ValueError, match="closed"):
        llm.session  # noqa: B018
    llm.close()
