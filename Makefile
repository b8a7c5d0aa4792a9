# One command each. `make demo` and `make test` do everything on a fresh machine: install, build, fetch the model, run.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
SOURCES := pyproject.toml runtime/CMakeLists.txt $(wildcard runtime/native/* runtime/kvcast/*.py runtime/kvcast/data/* runtime/kvcast/eval/*.py runtime/kvcast/server/*.py runtime/kvcast/server/page/* patches/* predictor_onnx/*) scripts/vendor.py

.PHONY: demo test test-vulkan test-convert soak kills writers faults fuzz sanitize lint docs bench patches reference clean

demo: $(VENV)/.installed
	$(BIN)/python scripts/demo.py

test: $(VENV)/.installed lint reference
	$(BIN)/python -m pytest

# The device path on a device that is not the CPU. Needs Vulkan's headers, glslc and a driver; software will do (Debian:
# mesa-vulkan-drivers libvulkan-dev glslc spirv-headers).
VULKAN := build/vulkan/site
test-vulkan: $(VENV)/.installed $(VULKAN)/.built
	rm -rf $(VULKAN)/kvcast/*.py && cp -r runtime/kvcast/*.py runtime/kvcast/data runtime/kvcast/eval runtime/kvcast/server $(VULKAN)/kvcast/ && cp -r predictor_onnx $(VULKAN)/
	GGML_VK_VISIBLE_DEVICES=0 PYTHONPATH=$(VULKAN) $(BIN)/python -m pytest -s tests/vulkan

$(VULKAN)/.built: $(wildcard runtime/native/* patches/* tests/vulkan/*.patch) runtime/CMakeLists.txt $(VENV)/.installed
	rm -rf build/vulkan/source && mkdir -p build/vulkan && cp -r vendor/llama.cpp build/vulkan/source
	patch --quiet -p1 -d build/vulkan/source < tests/vulkan/older-headers.patch
	$(BIN)/cmake -S runtime -B build/vulkan/build -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
	    -DGGML_VULKAN=ON -DKVCAST_LLAMA=$(abspath build/vulkan/source) > build/vulkan/build.log
	$(BIN)/cmake --build build/vulkan/build --target kvcast_libraries >> build/vulkan/build.log
	$(BIN)/cmake --install build/vulkan/build --prefix $(VULKAN) > /dev/null
	touch $@

# A Hugging Face checkpoint to GGUF, which needs torch and transformers: beside the project's own environment. TORCH names the build.
TORCH ?= torch==2.13.0
test-convert: $(VENV)/.installed build/convert/.installed
	PYTHONPATH=build/convert $(BIN)/python -m pytest tests/test_convert.py

build/convert/.installed: pyproject.toml
	$(BIN)/python -m pip install --quiet --upgrade --target build/convert $(TORCH) "transformers>=4.57,<5" safetensors sentencepiece
	touch $@

# long runs: half an hour
soak: $(VENV)/.installed
	$(BIN)/python scripts/soak.py

# faults on purpose: minutes
faults: $(VENV)/.installed
	$(BIN)/python scripts/faults.py

# 500 processes killed while they save a session: a minute
kills: $(VENV)/.installed
	$(BIN)/python scripts/kill_saving.py

# 200 processes that save sessions under one name: half a minute
writers: $(VENV)/.installed
	$(BIN)/python scripts/concurrent_saving.py

# odd input, 100,000 cases: minutes
fuzz: $(VENV)/.installed
	$(BIN)/python scripts/fuzz.py

# Our C++ with gcc's sanitizers. Address and undefined behaviour: in Python, through tests of the native paths. Threads: a program of
# its own, with ggml under the sanitizer too, since it is ggml's threads that our nodes run on.
TINY := build/sanitize/tiny.gguf
sanitize: build/sanitize/.built
	rm -rf build/sanitize/site/kvcast/*.py && cp -r runtime/kvcast/*.py runtime/kvcast/data runtime/kvcast/eval runtime/kvcast/server build/sanitize/site/kvcast/ && cp -r predictor_onnx build/sanitize/site/
	PYTHONPATH=tests $(BIN)/python -c "import shapes; shapes.write_shape('$(TINY)')"
	build/sanitize/thread/bin/handover $(TINY)
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1 build/sanitize/address/bin/handover $(TINY)
	LD_PRELOAD=$$($(CXX) -print-file-name=libasan.so) ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1 \
	    PYTHONPATH=build/sanitize/site $(BIN)/python -m pytest -m sanitize -k "not qwen"

build/sanitize/.built: $(wildcard runtime/native/* patches/*) tests/native/handover.cpp runtime/CMakeLists.txt $(VENV)/.installed
	mkdir -p build/sanitize
	for kind in address thread; do \
	    options=-DKVCAST_SANITIZE=address,undefined; \
	    test $$kind = address || options="-DKVCAST_SANITIZE=thread -DGGML_SANITIZE_THREAD=ON -DGGML_OPENMP=OFF"; \
	    $(BIN)/cmake -S runtime -B build/sanitize/$$kind -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja $$options && \
	    $(BIN)/cmake --build build/sanitize/$$kind --target kvcast_libraries handover || exit 1; \
	done > build/sanitize/build.log
	$(BIN)/cmake --install build/sanitize/address --prefix build/sanitize/site > /dev/null
	touch $@

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/mypy

# docs/cli.md and docs/api.md, from the code
docs: $(VENV)/.installed
	$(BIN)/python scripts/reference.py

bench: $(VENV)/.installed
	$(BIN)/kvcast bench --model smollm2 --context 7680 --text runtime/kvcast/data/prose.txt --text tests/data/code.txt --text tests/data/log.txt \
	    --compare ema,last,window,oracle --json out/bench.json

# the patch queue, written anew from an edited vendor/llama.cpp
patches:
	$(PYTHON) scripts/vendor.py --export

# llama.cpp without our patches, same flags: what the contract tests compare with
reference: build/reference/kvcast/lib/libllama.so
build/reference/kvcast/lib/libllama.so: $(VENV)/.installed
	test -f $@ || ( $(PYTHON) scripts/vendor.py --pristine build/pristine && \
	$(BIN)/cmake -S runtime -B build/reference-build -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
	    -DKVCAST_PRISTINE=ON -DKVCAST_LLAMA=$(abspath build/pristine) > /dev/null && \
	$(BIN)/cmake --build build/reference-build --target kvcast_libraries > build/reference.log && \
	$(BIN)/cmake --install build/reference-build --prefix build/reference )
	touch $@

$(VENV)/.installed: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet cmake ninja
	$(BIN)/python -m pip install --quiet llama-cpp-python==0.3.36 --config-settings=cmake.define.LLAMA_BUILD=OFF
	$(BIN)/python -m pip install --verbose ".[cpu,serve,test,integrations]" 2>&1 | grep --line-buffered -E "^ *(\[[0-9]+/[0-9]+\] (Linking|Generating)|Successfully)|[Ee]rror:" || true
	$(BIN)/python -c "from kvcast import Llama"
	touch $@

clean:
	rm -rf build dist out vendor $(VENV)
