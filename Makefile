# Two commands matter: `make demo` and `make test`. Both set up what they need first, and do it once.
# Variables: PYTHON=python3.12  VENV=.venv  TORCH_INDEX=<index of torch's CPU wheels>  ARGS="more arguments for the command"

SHELL := /usr/bin/env bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
ARGS ?=
export PYTHON VENV TORCH_INDEX

BIN := $(VENV)/bin
RUNTIME := $(VENV)/.installed-runtime
DEV := $(VENV)/.installed-dev
INSTALL_INPUTS := pyproject.toml constraints.txt .ci/install
CODE := $(wildcard dstrain tests launch benchmarks)

$(RUNTIME): $(INSTALL_INPUTS)
	@.ci/install runtime
	@touch $@

$(DEV): $(INSTALL_INPUTS)
	@.ci/install dev
	@touch $(RUNTIME) $@

.PHONY: venv demo test test-cluster test-browser check format format-check lint types floors docs versions clean distclean help

venv: $(DEV)  ## set up .venv with dstrain and the development tools

demo: $(RUNTIME)  ## pretrain, resume, export and fine-tune on the embedded corpora (a laptop will do)
	@$(BIN)/dstrain demo $(ARGS)

test: $(DEV)  ## run every test that is not marked slow
	@$(BIN)/python -m pytest $(ARGS)

test-cluster: $(DEV)  ## run the tests on several hosts with a real SLURM, built on this machine (root, apt)
	@$(BIN)/python -m pytest -m cluster -n 2 --dist worksteal tests/cluster $(ARGS)

test-browser: $(DEV)  ## look at TensorBoard's pages in a headless Chromium (fetched with apt as root where there is none)
	@$(BIN)/python -m pytest -m browser tests/browser $(ARGS)

check: format-check lint types floors test  ## everything a change must pass: style, lint, types, floors, tests

format: $(DEV)  ## rewrite the code in the house style
	@$(BIN)/ruff format $(CODE)
	@$(BIN)/ruff check --fix-only --quiet $(CODE)

format-check: $(DEV)
	@$(BIN)/ruff format --check --quiet $(CODE) || { echo "style: run 'make format'"; exit 1; }

lint: $(DEV)  ## ruff
	@$(BIN)/ruff check $(CODE)

types: $(DEV)  ## mypy, strict on dstrain/
	@$(BIN)/mypy

floors: $(DEV)  ## import-linter: imports go down only, libraries enter by their doors
	@$(BIN)/lint-imports

docs: $(DEV)  ## renew the tables of docs/configuration.md and docs/planner.md from the code
	@$(BIN)/python tests/support/configuration_page.py
	@$(BIN)/python -m tests.support.published_runs

versions: $(RUNTIME)  ## the versions in use
	@$(BIN)/python -c 'import importlib.metadata as m, sys; print("python", sys.version.split()[0], *("%s %s" % (n, m.version(n)) for n in ("dstrain", "torch", "deepspeed", "transformers", "datasets", "webdataset", "numpy")), sep="\n")'

clean:  ## remove caches and build left-overs; keeps .venv and every run
	@rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis *.egg-info
	@find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean  ## also remove .venv
	@rm -rf $(VENV)

help:  ## this list
	@echo "make demo   sets everything up and runs the whole line on embedded text"
	@echo "make test   sets everything up and runs the tests"
	@echo
	@grep -hE '^[a-z-]+:.*  ## ' $(MAKEFILE_LIST) | sed -E 's/:.*  ## /:/' | while IFS=: read -r name what; do printf '  make %-12s %s\n' "$$name" "$$what"; done
