# All set-up is done here: `make demo` and `make test` need python3 (3.11 or newer) and make.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python -m

.PHONY: demo test test-all lint clean

demo: $(VENV)/demo.stamp
	$(VENV)/bin/python notebooks/climate_record.py --output demo-output

test: $(VENV)/test.stamp
	$(RUN) pytest -m "not slow"

test-all: $(VENV)/test.stamp
	$(RUN) pytest

lint: $(VENV)/dev.stamp
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy

clean:
	rm -rf $(VENV) build dist demo-output .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# One stamp for each extra; a new pyproject.toml means a new install.
$(VENV)/%.stamp: pyproject.toml | $(VENV)/bin/python
	$(RUN) pip install --quiet --disable-pip-version-check --editable ".[$*]"
	touch $@
