"""The structures of kvcast.h are those of the bindings, to the byte."""

import ctypes
import re
import shutil
import subprocess

import pytest

from kvcast.bindings import api, log
from places import ROOT

HEADER = ROOT / "runtime" / "native" / "kvcast.h"
INCLUDE = [ROOT / "runtime/native", ROOT / "vendor/llama.cpp/include", ROOT / "vendor/llama.cpp/ggml/include"]
NAMES = sorted(set(re.findall(r"^struct (kvcast_\w+) \{", HEADER.read_text(), re.M)))

CALLS = {"kvcast_attention_call": api.AttentionCall, "kvcast_io_call": api._IoCall, "kvcast_log_call": log._LogCall}


@pytest.mark.skipif(not INCLUDE[1].is_dir() or not shutil.which("c++"), reason="needs llama.cpp's headers and a C++ compiler")
def test_structures(tmp_path):
    ours = {name: getattr(api, name) if hasattr(api, name) else CALLS[name] for name in NAMES}
    lines = []
    for name, kind in ours.items():
        lines.append(f'printf("{name} %zu", sizeof(struct {name}));')
        lines += [f'printf(" %zu", offsetof(struct {name}, {field}));' for field, *_ in kind._fields_]
        lines.append('printf("\\n");')
    source = tmp_path / "sizes.cpp"
    source.write_text(f'#include <cstddef>\n#include <cstdio>\n#include "kvcast.h"\nint main() {{ {" ".join(lines)} }}\n')
    subprocess.run(["c++", *(f"-I{folder}" for folder in INCLUDE), "-o", tmp_path / "sizes", source], check=True)
    said = subprocess.run([tmp_path / "sizes"], check=True, capture_output=True, text=True).stdout
    for line in said.splitlines():
        name, size, *offsets = line.split()
        kind = ours[name]
        assert ctypes.sizeof(kind) == int(size), name
        assert [getattr(kind, field).offset for field, *_ in kind._fields_] == list(map(int, offsets)), name
