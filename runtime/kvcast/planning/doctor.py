"""What this machine has for kvcast, what is missing, and what to do about it."""

from __future__ import annotations

import ctypes
import importlib.util
import platform
import shutil
from dataclasses import dataclass

import llama_cpp as llama_cpp_package
import psutil

from predictor_onnx.infer import PredictorError, open_predictor, resolve, shipped
from predictor_onnx.runtime import onnxruntime

from .. import __version__, models
from ..bindings.library import LIBRARY_DIR
from ..bindings.loaded import llama_cpp
from ..cores import usable_cores

GIB = 1 << 30
KINDS = {0: "CPU", 1: "GPU", 2: "integrated GPU", 3: "accelerator"}  # enum ggml_backend_dev_type


@dataclass(frozen=True, slots=True)
class Finding:
    """One line: what was looked for, what was found, and, where something is amiss, what to do ("" otherwise)."""

    what: str
    found: str
    todo: str = ""


@dataclass(frozen=True, slots=True)
class Device:
    """Something that ggml can compute on; bytes are 0 where it does not say."""

    name: str
    description: str
    kind: str
    free_bytes: int
    total_bytes: int


def devices() -> list[Device]:
    """What the loaded libraries can compute on."""
    lib, p = llama_cpp._lib, ctypes.c_void_p

    def function(name, result, *arguments):
        fn = getattr(lib, "ggml_backend_dev_" + name)
        fn.restype, fn.argtypes = result, arguments
        return fn

    get = function("get", p, ctypes.c_size_t)
    name, description = (function(what, ctypes.c_char_p, p) for what in ("name", "description"))
    kind = function("type", ctypes.c_int, p)
    memory = function("memory", None, p, ctypes.POINTER(ctypes.c_size_t), ctypes.POINTER(ctypes.c_size_t))
    found = []
    for i in range(function("count", ctypes.c_size_t)()):
        device, free, total = get(i), ctypes.c_size_t(), ctypes.c_size_t()
        memory(device, free, total)
        found.append(
            Device(name(device).decode(), description(device).decode(), KINDS.get(kind(device), "device"), free.value, total.value)
        )
    return found


def examine() -> list[Finding]:
    """Look at everything; no model is loaded."""
    findings = [
        Finding("kvcast", f"{__version__}, libraries in {LIBRARY_DIR}"),
        Finding("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
    ]
    findings.append(Finding("llama-cpp-python", f"{llama_cpp_package.__version__}, carried by kvcast"))

    all_devices = devices()
    for d in all_devices:
        memory = f", {d.free_bytes / GIB:.1f} of {d.total_bytes / GIB:.1f} GiB free" if d.total_bytes else ""
        findings.append(Finding(d.kind, f"{d.name}: {d.description}{memory}"))
    if shutil.which("nvidia-smi") and all(d.kind == "CPU" for d in all_devices):
        todo = "build kvcast with -DGGML_CUDA=ON (CMAKE_ARGS) to use it"
        findings.append(Finding("GPU", "an NVIDIA driver is installed, but these libraries have no CUDA", todo))
    memory = psutil.virtual_memory()
    todo = "" if memory.available > 2 * GIB else "close something: the KV cache lies in host memory"
    findings.append(Finding("host memory", f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB free", todo))
    found = f"{usable_cores()} for kvcast of {psutil.cpu_count(logical=False)} physical, all of which are used unless n_threads is given"
    findings.append(Finding("cores", found))

    if importlib.util.find_spec("onnxruntime") is None:
        todo = "pip install onnxruntime; until then the predictor is a plain average"
        findings.append(Finding("ONNX Runtime", "not installed", todo))
    else:
        findings += _predictors()
    there = [m.name for m in models.MODELS if (models.cache_dir() / m.file).exists()]
    findings.append(Finding("models", f"{', '.join(there) or 'none yet'} in {models.cache_dir()}"))
    return findings


def _predictors() -> list[Finding]:
    try:
        found = [Finding("ONNX Runtime", f"{onnxruntime().__version__}; predictors run on the CPU; its telemetry is off")]
    except PredictorError as error:
        return [Finding("ONNX Runtime", "cannot be used", str(error))]
    for name in shipped():
        try:
            open_predictor(resolve(name))
            found.append(Finding("predictor", f"{name} runs"))
        except PredictorError as error:
            found.append(Finding("predictor", f"{name} does not run", f"reinstall kvcast ({error})"))
    return found
