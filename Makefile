# `make demo` and `make test` do all the set-up on a fresh machine with Python and make.
PYTHON ?= python3
VENV ?= .venv
# The PyTorch requirement installed when the environment has none: pinned, so that nothing pulls in a newer one.
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# One worker per core, each with one thread: the tests are many and small.
PYTEST_ARGS ?= -n auto

.PHONY: help demo test lint typecheck format clean

help:
	@echo "make demo       a video of the small model that comes with the project, dense and block-sparse"
	@echo "make test       run the test suite"
	@echo "make lint       ruff, make typecheck  mypy, make format  rewrite by ruff"

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/python -m bsa_compile compare --output demo_output

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The subpackages sit beside the package in the source tree, so mypy sees them only in an installed copy.
typecheck: $(STAMP)
	rm -rf build/typecheck
	$(BIN)/python -m pip install --quiet --no-deps --target build/typecheck .
	$(BIN)/mypy --config-file pyproject.toml build/typecheck/bsa_compile

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist demo_output .pytest_cache .ruff_cache .mypy_cache
