# Every target makes .venv when it is missing or out of date; it needs python3 (3.10 or newer), make and a C++ compiler.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
RIVALS := $(VENV)/.rivals
SOURCES := pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*.* csrc/*/*.*)
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# What the kernels were tuned and measured with. A torch for CUDA asks for a version of its own, hence apart from it.
TRITON := "triton==3.6.0; platform_system == 'Linux' and platform_machine == 'x86_64'"
OUT ?= demo
BENCH ?=
CONFORMANCE ?=
CASES ?= 10000
ASAN := build/asan-ext
NATIVE = $(MAKE) --no-print-directory -f tests/csrc/native.mk
JOBS := $(shell nproc 2>/dev/null || echo 2)

.PHONY: demo test conformance test-gpu test-sanitize test-arm build-macos fuzz fuzz-load bench bench-gpu lint format wheel clean

demo: $(READY)
	$(BIN)/python -m fastlvm demo --out $(OUT)

test: $(READY)
	$(BIN)/python -m pytest

# The own test files of mamba and causal-conv1d, of checkouts at PEERS, against fastlvm in the packages' place.
# CONFORMANCE="-k state_update --limit 300" runs a part.
conformance: $(READY)
	$(BIN)/python tests/conformance/peers.py $(PEERS) $(CONFORMANCE)

# The kernels in Triton, on a GPU; `make test` interprets them on the CPU.
test-gpu: $(READY)
	@$(BIN)/python -c 'import sys, torch; torch.cuda.is_available() or sys.exit("no CUDA device is here")'
	$(BIN)/python -m pytest $(wildcard tests/*/test_triton_*.py tests/*/test_cuda*.py)

# The C++ and its native tests under AddressSanitizer, UBSan and ThreadSanitizer; needs g++ alone.
test-sanitize:
	+@$(NATIVE) -j$(JOBS) sanitize

# The same tests cross-compiled for AArch64, under qemu; needs g++-aarch64-linux-gnu and qemu-user-static.
test-arm:
	+@$(NATIVE) -j$(JOBS) arm

# The extension's sources compiled for Apple's processors, and linked but for Python, by Zig's copy of clang (100 MB).
build-macos: $(READY)
	$(INSTALL) ziglang
	+@$(NATIVE) -j$(JOBS) macos ZIG="$(BIN)/python -m ziglang" PYTHON_INCLUDES="$$($(BIN)/python -m pybind11 --includes)"

# Random calls of every op under AddressSanitizer for SECONDS on every core.
fuzz:
	+@$(NATIVE) -j$(JOBS) fuzz

# CASES damaged artifacts, loaded by an extension built for AddressSanitizer and UBSan; needs g++. Without the site
# module there is no editable install, which would find the ordinary extension first.
fuzz-load: $(READY)
	$(BIN)/cmake -S . -B $(ASAN) -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DCMAKE_CXX_COMPILER=$(CXX) \
	  -DCMAKE_BUILD_TYPE=Sanitize -DPython_EXECUTABLE=$(abspath $(BIN))/python \
	  -Dpybind11_DIR="$$($(BIN)/python -m pybind11 --cmakedir)" -DCMAKE_INSTALL_PREFIX=$(ASAN)/python \
	  -DCMAKE_CXX_FLAGS="-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer" >/dev/null
	$(BIN)/cmake --build $(ASAN)
	rm -rf $(ASAN)/python
	$(BIN)/cmake --install $(ASAN) >/dev/null
	cp -R src/fastlvm/. $(ASAN)/python/fastlvm
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1 \
	  PYTHONPATH=$(ASAN)/python:tests:"$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
	  $(BIN)/python -S -m predictor.fuzz_load $(CASES)

# The kernel benches compare with packages of the `bench` extra; one that cannot be installed has its row say so.
bench: $(READY)
	@test $(RIVALS) -nt $(READY) || { $(INSTALL) --no-build-isolation --editable ".[dev,bench]" && touch $(RIVALS); } \
	  || echo "the packages to compare with could not be installed: their rows will say that they are missing" >&2
	$(BIN)/python -m pytest bench --benchmark-only --bench-results bench/results $(BENCH)

# On a GPU, under 8 minutes. BENCH="--only ssm" times a part; bench/gpu.py says what it compares with if installed.
bench-gpu: $(READY)
	$(BIN)/python bench/gpu.py $(BENCH)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(wildcard csrc/*.* csrc/*/*.*) bench/bound.cpp

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(wildcard csrc/*.* csrc/*/*.*) bench/bound.cpp

wheel: $(READY)
	$(BIN)/python -m pip wheel --no-deps --no-build-isolation --wheel-dir dist .

clean:
	rm -rf $(VENV) build dist

$(READY): $(SOURCES)
	@command -v $(PYTHON) >/dev/null || { echo "python3 is missing: install Python 3.10 or newer, or name one with PYTHON=..." >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "$(PYTHON) is older than 3.10: name a newer one with PYTHON=..." >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) has no venv module: install it (python3-venv on Debian and Ubuntu)" >&2; exit 2; }
	@command -v "$${CXX:-c++}" >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null || { echo "a C++ compiler is missing: install g++ or clang++, or name one with CXX=..." >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) "scikit-build-core>=0.10" "pybind11>=2.13" cmake ninja
	$(INSTALL) --no-build-isolation --editable ".[dev]"
	$(INSTALL) --no-deps $(TRITON) || echo "Triton could not be installed: what tests its kernels is skipped" >&2
	@touch $@
