"""``kvcast doctor``: what is there is named, what is missing comes with what to do."""

import importlib.util

import psutil

from kvcast.planning import doctor


def test_a_machine_that_has_everything():
    findings = doctor.examine()
    found = {f.what: f for f in findings}
    assert not [f for f in findings if f.todo], findings
    assert {"kvcast", "llama-cpp-python", "CPU", "host memory", "cores", "ONNX Runtime", "predictor", "models"} <= found.keys()
    cpu = next(d for d in doctor.devices() if d.kind == "CPU")
    assert abs(cpu.total_bytes - psutil.virtual_memory().total) < 1 << 30


def test_what_is_missing_comes_with_what_to_do(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find(name))
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    todo = {f.what: f.todo for f in doctor.examine() if f.todo}
    assert "pip install onnxruntime" in todo["ONNX Runtime"]
    if all(d.kind == "CPU" for d in doctor.devices()):
        assert "GGML_CUDA" in todo["GPU"]
