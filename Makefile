# Everything runs from nothing: each target makes the environment it needs.
# `make test PYTHON=python3.13` takes another Python, with an environment of its own.
PYTHON ?= python3
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
ENVIRONMENT := $(if $(filter python3,$(PYTHON)),.venv,.venv-$(VERSION))
# Pinned for 3.11, which 3.12 shares, and for 3.13 with the newest stack.
CONSTRAINTS := constraints/$(if $(filter 3.11 3.12,$(VERSION)),py311,py313).txt
BIN := $(ENVIRONMENT)/bin
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/$(ENVIRONMENT)/jax-cache
export TF_CPP_MIN_LOG_LEVEL ?= 2

.PHONY: test test-slow demo docs build lint format environment clean

test: environment lint  ## linters and the fast suite
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: environment  ## full-size models and long runs (10 GB of memory)
	$(BIN)/python -m pytest -m slow

demo: environment  ## the whole method in the toy world, and its report (11 minutes)
	$(BIN)/python -m safetydpo_jax.toyworld.demo --out demo

docs: environment  ## the documentation as a site, in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: environment
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

format: environment
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

build: environment  ## the wheel and the sdist, in dist/
	$(BIN)/python -m build

environment: $(ENVIRONMENT)/ready

$(ENVIRONMENT)/ready: requirements.txt pyproject.toml $(wildcard constraints/*.txt)
	$(PYTHON) -m venv $(ENVIRONMENT)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install -qq --no-compile --editable ".[dev]" -c $(CONSTRAINTS)
	touch $@

clean:
	rm -rf .venv .venv-* build dist
