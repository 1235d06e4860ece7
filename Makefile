# Everything runs from nothing: each target makes the environment it needs.
PYTHON ?= python3
BIN := .venv/bin
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.venv/jax-cache
export TF_CPP_MIN_LOG_LEVEL ?= 2

.PHONY: test test-slow demo docs lint format environment clean

test: environment lint  ## the fast suite (under 15 minutes on two cores)
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: environment  ## full-size models and long runs (10 GB of memory)
	$(BIN)/python -m pytest -m slow

demo: environment  ## the whole method in the toy world, and its report (10 minutes)
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

environment: .venv/ready

.venv/ready: requirements.txt requirements-dev.txt constraints.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt -c constraints.txt
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

clean:
	rm -rf .venv
