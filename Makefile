# Two commands for a fresh machine: `make demo` and `make test`. `make help` lists all.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Options of the demo and of pytest, for example `make demo ARGS=--quick` or `make test ARGS="-k units"`.
ARGS ?=

PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
INSTALL := $(PIP) install --quiet --constraint constraints.txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo test lint clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(STAMP) ## make .venv with the package, its development tools and pinned dependencies

# PyTorch and setuptools come first: the package is then built with the pinned setuptools, and nothing unpinned is
# fetched for an isolated build.
$(STAMP): pyproject.toml constraints.txt
	@command -v "$(PYTHON)" >/dev/null || { echo "make: no $(PYTHON): install Python 3.11 to 3.13, or name one: make PYTHON=python3.12" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' || { echo "make: $(PYTHON) is $$("$(PYTHON)" -V 2>&1), but Python 3.11 to 3.13 is needed: name one, for example make PYTHON=python3.12" >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { echo "make: $(PYTHON) cannot make virtual environments: install python3-venv" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { echo "making $(VENV) with $$("$(PYTHON)" -V)"; "$(PYTHON)" -m venv --clear $(VENV); }
	@echo "installing PyTorch, the largest download"
	@$(INSTALL) setuptools torch
	@echo "installing the package and what else it needs"
	@$(INSTALL) --no-build-isolation --editable '.[dev]'
	@$(BIN)/sparq --version
	@touch $@

demo: $(STAMP) ## run the whole job on the embedded corpus and print the table
	$(BIN)/sparq demo $(ARGS)

# The pretrained models are built first, so that the tests that need them run instead of being skipped. A process a core,
# each with one thread: most models here are too small for two.
test: $(STAMP) ## run all tests, those on real pretrained models too
	$(BIN)/sparq pretrained
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto $(ARGS)

lint: $(STAMP) ## check style, types and the direction of imports
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

clean: ## remove .venv and caches; runs, demo-out and built models stay
	rm -rf $(VENV) build .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache src/*.egg-info
	find src tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +
