# Two commands do all set-up on a fresh Debian machine with Python 3.11: `make demo`, `make test`.
# Needs: python3, python3-venv, g++ and make (apt-get install python3-venv g++ make).
#
# PYTHON is Debian's own interpreter; override it for another one. torch is pinned in
# constraints.txt: where pip offers only the CUDA build, TORCH_INDEX=URL names an index with the
# CPU build (see pytorch.org) and saves several GB that a machine without a GPU does not need.

PYTHON ?= $(firstword $(wildcard /usr/bin/python3) python3)
VENV := .venv
BIN := $(VENV)/bin
TORCH_INDEX ?=
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help install demo test check unit bench docs references clean

help:  ## show the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(VENV)/.installed  ## create .venv and install kunserve with its test tools

$(VENV)/.installed: pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "kunserve needs Python 3.11 or newer; set PYTHON=/path/to/python3" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null \
		|| { echo "python3-venv is missing: apt-get install python3-venv" >&2; exit 2; }
	test -x $(BIN)/pip || { rm -rf $(VENV); $(PYTHON) -m venv $(VENV); }
	@echo "installing into $(VENV) (torch first; a minute or two)"
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==2.13.0
	$(PIP) --editable '.[dev,bench]'
	@touch $@

demo: install  ## ask the embedded model; the same burst under recompute and kunserve (4 min)
	$(BIN)/kunserve demo

check: install  ## format, lint, types, layer contract
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

unit: install  ## the fast tests
	$(BIN)/pytest -q tests/unit

test: check  ## the whole check and all tests but the slow ones
	$(BIN)/pytest -q -m "not slow"

bench: install  ## measure this machine and the engine
	$(BIN)/kunserve bench engine

docs: install  ## draw the protocol's diagram into docs/architecture.md again
	$(BIN)/python docs/diagram.py

references: install  ## make the reference tokens of tests again, with transformers (minutes)
	$(BIN)/python tests/references/generate.py

clean:  ## remove what was built (not the model cache in ~/.cache/kunserve)
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find kunserve -name '*.so' -delete
