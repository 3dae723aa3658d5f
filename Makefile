# `make demo` and `make test` need Python >= 3.11 (with venv), make and a network; everything else is installed
# into $(VENV), once. Variables: PYTHON=python3.12, VENV=.venv-312, ARGS="-k matmul" (to pytest or to the demo).
# The kernels have an environment of their own, with the CUDA build of jax $(KERNELS_JAX) and KERNELS_PYTHON.
SHELL  := /bin/bash
PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=
WORKERS ?= 2

# Of a machine that is set up already: nothing is installed there.
GPU_PYTHON ?= python3

KERNELS_JAX    ?= 0.11.2
KERNELS_VENV   ?= .venv-kernels-$(KERNELS_JAX)
KERNELS_PYTHON ?= $(shell .ci/find-python 3.12)
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

.PHONY: help
help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' Makefile

.PHONY: demo
demo: $(VENV)/.stamp-base ## Convert a real model to 4 bits, compare it with the original, generate text
	$(BIN)/atom-jax demo $(ARGS)

PYTEST := $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# Compiled programs are kept between runs, for the most of the tests' time is compilation.
test test-all test-nightly: export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/jax
test test-all test-nightly: export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS ?= 0.1

.PHONY: test
test: $(VENV)/.stamp-test ## Run the tests that take seconds each, and compare SmolLM2 in float with transformers
	$(PYTEST) -m "not slow" $(ARGS)

.PHONY: test-all
test-all: $(VENV)/.stamp-test ## Run all tests (those marked cuda are skipped without a GPU)
	$(PYTEST) --durations=15 $(ARGS)

.PHONY: test-kernels
test-kernels: $(KERNELS_VENV)/.stamp ## Compile the GPU kernels for an H200 and run them interpreted and emulated, on the CPU
	JAX_PLATFORMS=cpu NPROC=16 $(KERNELS_VENV)/bin/python -m pytest -q -n $(WORKERS) --durations=10 \
	  tests/pallas_kernels/mosaic tests/pallas_kernels/ptx tests/pallas_kernels/verification -m 'not nightly' $(ARGS)

.PHONY: test-nightly
test-nightly: $(VENV)/.stamp-test $(KERNELS_VENV)/.stamp ## What CI has no time for: every scheme on SmolLM2, kernels at the layers of more models
	$(PYTEST) --durations=15 -m nightly $(ARGS)
	JAX_PLATFORMS=cpu $(KERNELS_VENV)/bin/python -m pytest -q -n $(WORKERS) --durations=10 \
	  tests/pallas_kernels/mosaic -m nightly $(ARGS)

.PHONY: kernels-report
kernels-report: $(KERNELS_VENV)/.stamp ## Compile the GPU kernels and write docs/kernels.md from their machine code
	JAX_PLATFORMS=cpu $(KERNELS_VENV)/bin/python -m bench.kernels_report $(ARGS)

.PHONY: gpu
gpu: ## Test and time kernels and model on a CUDA GPU, in nine minutes, installing nothing
	@PYTHONPATH='$(CURDIR)' $(GPU_PYTHON) -m bench.gpu $(ARGS)

.PHONY: lint
lint: $(VENV)/.stamp-test ## Check style and formatting with ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.PHONY: types
types: $(VENV)/.stamp-test ## Check types with pyright
	$(BIN)/pyright --pythonpath $(BIN)/python

.PHONY: format
format: $(VENV)/.stamp-test ## Fix what ruff can fix and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: hooks
hooks: $(VENV)/.stamp-test ## Install the git pre-commit hooks
	$(BIN)/pre-commit install

.PHONY: clean
clean: ## Remove the virtual environment, caches and build outputs
	rm -rf $(VENV) .venv-kernels-* .cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -name .git -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is written only when its install succeeded, and outlives everything but a change of pyproject.toml.
# A directory without a stamp is used if its pip runs and built anew if not (an interrupted `venv`).
$(VENV)/.stamp-venv:
	@command -v '$(PYTHON)' >/dev/null || { \
	  echo "Atom-JAX needs Python 3.11 or newer; there is no '$(PYTHON)'. Name one: make PYTHON=/path/to/python3" >&2; \
	  exit 1; }
	@'$(PYTHON)' -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Atom-JAX needs Python 3.11 or newer; '$(PYTHON)' is $$('$(PYTHON)' --version 2>&1)." \
	    "Name another one: make PYTHON=python3.12" >&2; \
	  exit 1; }
	@'$(PYTHON)' -c 'import ensurepip, venv' || { \
	  echo "'$(PYTHON)' lacks the venv module (Debian and Ubuntu: install python3-venv)." >&2; \
	  exit 1; }
	@$(PIP) --version >/dev/null 2>&1 || '$(PYTHON)' -m venv --clear '$(VENV)'
	@touch $@

$(VENV)/.stamp-base: pyproject.toml | $(VENV)/.stamp-venv
	@echo "Installing Atom-JAX into $(VENV) (first time: a few minutes) ..."
	@$(PIP) install -qq --editable .
	@touch $@

$(VENV)/.stamp-test: pyproject.toml | $(VENV)/.stamp-venv
	@echo "Installing Atom-JAX and its test and development tools into $(VENV) (first time: a few minutes) ..."
	@$(PIP) install -qq --editable '.[test,dev]'
	@touch $(VENV)/.stamp-base $@

$(KERNELS_VENV)/.stamp: pyproject.toml
	@[ -n '$(KERNELS_PYTHON)' ] || { \
	  echo "The kernels' environment needs Python 3.12. Name one: make test-kernels KERNELS_PYTHON=/path/to/python3.12" >&2; \
	  exit 1; }
	@echo "Installing Atom-JAX and the CUDA build of jax $(KERNELS_JAX) into $(KERNELS_VENV) (5 GB, a few minutes) ..."
	@'$(KERNELS_PYTHON)' -m venv --clear '$(KERNELS_VENV)'
	@$(KERNELS_VENV)/bin/python -m pip --disable-pip-version-check --no-input install -qq --editable '.[kernels]' \
	  'jax[cuda13]==$(KERNELS_JAX)'
	@touch $@
