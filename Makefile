# Everything a person needs; CI runs the same. `make help` lists it.

PYTHON ?= python3
VENV   ?= .venv
# Extra arguments: make test ARGS="-k native"
ARGS   ?=
# Which build of PyTorch to prefer, where pip would not choose the right one: cpu, cu126, ...
TORCH  ?=

BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
PIP    := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install -qq -c constraints.txt $(if $(TORCH),--extra-index-url https://download.pytorch.org/whl/$(TORCH))

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test test-fast test-kernels test-transformers sanitize lint format docs bench clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-17s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo '  ARGS="..." is handed to the command; PYTHON=python3.12 and TORCH=cpu choose what setup installs.'

setup: $(STAMP) ## make .venv and install everything into it

demo: $(STAMP) ## train a sparse and a dense model side by side, compare them, let both write
	$(BIN)/terse demo $(ARGS)

# Several tests at a time, each on one core; those of a file stay together (tests/conftest.py).
PARALLEL := -n logical --maxprocesses 8 --dist loadgroup
test: $(STAMP) ## run all tests
	$(BIN)/python -m pytest $(PARALLEL) $(ARGS)

test-fast: $(STAMP) ## run the tests that take a moment
	$(BIN)/python -m pytest -m "not slow" $(PARALLEL) $(ARGS)

# For another processor: make test-kernels CROSS=aarch64-linux-gnu- PROCESSOR=aarch64 RUN=qemu-aarch64
CROSS     ?=
PROCESSOR ?= $(shell uname -m)
RUN       ?=
KERNELS   := build/kernels-$(PROCESSOR)
test-kernels: $(STAMP) ## test the engine's inner loops on every instruction set, without Python
	@$(BIN)/cmake -S csrc -B $(KERNELS) -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DTERSE_TESTS=ON \
	  $(if $(CROSS),-DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=$(PROCESSOR) -DCMAKE_CXX_COMPILER=$(CROSS)g++ -DCMAKE_EXE_LINKER_FLAGS=-static) >/dev/null
	@$(BIN)/cmake --build $(KERNELS) >/dev/null
	$(RUN) $(KERNELS)/test_kernels

# The lowest version that is declared; `make test` has the highest. It lies before .venv's, with what it needs of its own.
TRANSFORMERS ?= 5.0.0
OLDER        := build/transformers-$(TRANSFORMERS)
test-transformers: $(STAMP) ## test Hugging Face's classes on the lowest version, or TRANSFORMERS=5.12.0
	@mkdir -p build && grep -vE '^(huggingface-hub|tokenizers|transformers)==' constraints.txt >build/older.txt
	@test -e $(OLDER) || $(PIP) install -qq -c build/older.txt --target $(OLDER) transformers==$(TRANSFORMERS)
	PYTHONPATH=$(abspath $(OLDER)) $(BIN)/python -m pytest tests/interop $(PARALLEL) $(ARGS)

# The C++ parts once more, with what finds reads out of bounds, undefined behaviour, or with `thread` races.
SANITIZE ?= address,undefined
SANITIZED = build/sanitize-$(firstword $(subst $(comma), ,$(SANITIZE)))
comma := ,
sanitize: $(STAMP) ## run the engine's tests under AddressSanitizer and UBSan, or SANITIZE=thread
	@$(BIN)/cmake -S . -B $(SANITIZED) -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DCMAKE_BUILD_TYPE=Debug \
	  -DCMAKE_CXX_FLAGS='-fsanitize=$(SANITIZE) -fno-sanitize-recover=all -fno-omit-frame-pointer -O1' \
	  -DPython_EXECUTABLE=$(abspath $(BIN))/python -Dnanobind_DIR=$$($(BIN)/python -m nanobind --cmake_dir) >/dev/null
	@$(BIN)/cmake --build $(SANITIZED) >/dev/null
	$(BIN)/python tests/sanitize.py $(SANITIZED)/_native*.so $(SANITIZE) $(subst loadgroup,load,$(PARALLEL)) $(ARGS)

lint: $(STAMP) ## check style, types and who imports whom
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyrefly check --summary=none
	$(BIN)/lint-imports --no-logo

format: $(STAMP) ## lay out the code and mend what can be mended
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# The site has the repository's own layout, so that links are the same in both.
SITE := build/docs-source
docs: $(STAMP) ## build the site of README.md and docs/ in build/docs; a broken link is an error
	@rm -rf $(SITE) && mkdir -p $(SITE) && cp -r README.md CONTRIBUTING.md CHANGELOG.md docs $(SITE)
	$(BIN)/zensical build --strict --clean $(ARGS)

bench: $(STAMP) ## measure speed on this machine
	$(BIN)/terse bench $(ARGS)

clean: ## remove build outputs and caches, but neither .venv nor runs
	rm -rf build dist .hypothesis .import_linter_cache .pytest_cache .ruff_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# pip is the last thing that making a virtual environment adds: without it, start again.
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and f"{sys.executable} is Python {sys.version.split()[0]}; 3.10 or newer is needed: make setup PYTHON=...")'
	@$(PYTHON) -c 'import os, sys, sysconfig as s; h = s.get_path("include") + "/Python.h"; sys.exit(not os.path.exists(h) and f"{h} is missing; install the Python headers (on Debian: python3-dev)")'
	@for c in $${CXX:-c++ g++ clang++}; do command -v $$c >/dev/null && exit; done; \
	  echo 'No C++ compiler found: install g++ or clang, or name one with CXX=...' >&2; exit 1
	@echo "Creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)

# The build tools go into .venv too, so that the compiled part is rebuilt in seconds and without a network; setuptools,
# because rouge-score is only published as source, which the one that comes with Python 3.11 cannot build.
$(STAMP): pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*) | $(BIN)/pip
	@echo 'Installing terseformer and what it needs into $(VENV) (some minutes the first time)'
	@$(INSTALL) scikit-build-core nanobind cmake ninja setuptools
	@$(INSTALL) --no-build-isolation --editable '.[dev]'
	@touch $@
