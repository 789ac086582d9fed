# A bare machine needs python3.11 (or a newer python3), gcc, make and git. `make` alone lists the targets.
SHELL := bash
.DEFAULT_GOAL := help
.PHONY: help demo visionprefer paper compare test test-all lint bench docs setup clean

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTHON ?= $(shell for python in python3.11 python3; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
# scripts/bench_*_trl.py is the peer's side of a benchmark, not one by itself.
BENCHES := $(filter-out %_trl.py,$(wildcard scripts/bench_*.py))

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

demo: $(STAMP) ## fine-tune the embedded Stable Diffusion against VP-Score by DDPO (minutes on two CPU cores)
	$(BIN)/python train.py experiment=ddpo_vpscore

visionprefer: $(STAMP) ## build VisionPrefer in the embedded world: 500 prompts x 4 images, rated, with a dataset card
	$(BIN)/python scripts/build_visionprefer.py prompts.train=400 prompts.validation=50 prompts.test=50

paper: $(STAMP) ## the paper's claims in the embedded world: 70 jobs, some two hours, one page; stop it and start it again
	$(BIN)/python scripts/paper.py

compare: $(STAMP) ## every method for the same time each, at the guidance people use: one table; stop it and start it again
	$(BIN)/python scripts/compare.py

# Files are dealt out to processes of one thread each: twice as fast on two cores as one process of two threads.
PARALLEL := -n logical --maxprocesses 4 --dist loadfile

test: $(STAMP) ## the default test suite: CPU, offline
	$(BIN)/python -m pytest $(PARALLEL)

test-all: $(STAMP) ## with the slow tests, and those for a GPU where there is one
	$(BIN)/python -m pytest $(PARALLEL) -m "not bench"

lint: $(STAMP) ## ruff, pyright and the import contracts
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/basedpyright
	$(BIN)/lint-imports

bench: $(STAMP) ## every scripts/bench_*.py, one after the other; leave the machine idle
	@set -e; for script in $(BENCHES); do echo "== $$script"; $(BIN)/python $$script; done

docs: $(STAMP) ## the pages of docs/ as a site in build/docs, for any browser
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "open build/docs/index.html"

setup: $(STAMP) ## the environment alone, and the git hooks
	$(BIN)/pre-commit install

clean: ## removes the environments and caches; outputs and data stay
	rm -rf $(VENV) .bench .pytest_cache .ruff_cache .import_linter_cache build *.egg-info

$(STAMP): pyproject.toml
	@test -n "$(PYTHON)" || { echo "vp_rl needs Python 3.11 or newer: install python3.11, or run make PYTHON=/path/to/it" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@
