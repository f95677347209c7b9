# Two commands from a clean clone: `make study` and `make test`; each sets up .venv by itself. `make help` lists the rest.
SHELL := /bin/bash
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.textrec-ready
SCALE ?= smoke
WORKERS ?= 2
# the first interpreter at hand that the pins hold for; set PYTHON to choose another
PYTHON ?= $(shell for name in python3.11 python3.12 python3.13 python3 python; do \
	"$$name" -c 'import sys, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && echo "$$name" && break; done)
ifdef DATA
export TEXTREC_DATA := $(abspath $(DATA))
endif

.PHONY: help setup test study report lab bench lock clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/:[^#]*## /\t/' | expand -t 10

setup: $(READY)  ## make .venv from constraints.txt (the other targets do it where it is missing or old)

$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "no Python 3.11, 3.12 or 3.13 with venv was found: install one, or run make PYTHON=/path/to/python"; exit 1; }
	test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[all]'
	touch $@

# two processes with two threads each slow each other down tenfold, and smoke models are too small for a second thread
test: export OMP_NUM_THREADS := 1
ifeq ($(SCALE),smoke)
study: export OMP_NUM_THREADS := 1
endif

test: export HF_HUB_OFFLINE := 1
test: $(READY)  ## lint, import contract, unit and parity tests, every notebook; ARGS are passed to pytest
	$(BIN)/ruff check
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --nbval-lax --nbval-current-env --durations 15 notebooks tests $(ARGS)

study: $(READY)  ## run every notebook and write figures/report.html; SCALE=laptop DATA=folder for real data
	$(BIN)/textrec study --scale $(SCALE) $(ARGS)

report: $(READY)  ## rebuild the report and the verdict table of README.md from the records
	$(BIN)/textrec report

lab: $(READY)  ## open the notebooks
	$(BIN)/jupyter lab --notebook-dir notebooks

bench: $(READY)  ## time ours against other implementations
	$(BIN)/textrec bench $(ARGS)

lock:  ## resolve the newest versions that pyproject.toml allows into constraints.txt; then run make test study
	rm -rf build/lock && "$(PYTHON)" -m venv build/lock
	build/lock/bin/python -m pip install --quiet --quiet --disable-pip-version-check '.[all]'
	{ sed -n '/^#/p' constraints.txt; build/lock/bin/python -m pip freeze --exclude textrec | sed -E 's/\+[a-z0-9.]+$$//'; } > build/constraints.txt
	mv build/constraints.txt constraints.txt

clean:  ## remove what a run leaves behind: the environment, caches, smoke runs; data and records stay
	rm -rf $(VENV) build papermill_runs/smoke figures/smoke figures/report.html .pytest_cache .ruff_cache .import_linter_cache *.egg-info
	find textrec tests notebooks -name __pycache__ -o -name .ipynb_checkpoints | xargs -r rm -rf
