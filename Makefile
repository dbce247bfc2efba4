# make test and make demo each create the environment they need; neither needs the other.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: env test lint demo bench clean

env: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

test: env
	$(BIN)/python -m pytest

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

demo: env
	$(BIN)/python -m tl_headnorm demo

bench: env
	$(BIN)/python -m tl_headnorm bench

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
