# All set-up is done here: `make demo` and `make test` need python3 (3.11 or newer) and make.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python -m
NLSQ_VENV := .venv-nlsq
# The nlsq package needs Python 3.12 or newer; the first of these that is one makes its environment.
NLSQ_PYTHON ?= python3 python3.12 python3.13 python3.14 $(wildcard $(HOME)/.pyenv/versions/3.1[2-9]*/bin/python)

.PHONY: demo test test-all test-matrix check-wheel lint docs pictures figures bench bench-nlsq-env clean

# The pictures are in demo-output; `make demo DEMO=--wait` keeps the live page until Enter.
demo: $(VENV)/demo.stamp
	$(RUN) docs.demo $(DEMO)

# As many processes as there are cores, up to four: most of the time goes into compiling models.
test: $(VENV)/test.stamp
	$(RUN) pytest -m "not slow" -n logical --maxprocesses 4 --dist worksteal

# The slow ones take the machine for themselves, one by one.
test-all: test
	$(RUN) pytest -m slow

# A short part of the tests with several versions of Python, and with the lowest versions of the
# dependencies, in environments of their own; `make test-matrix MATRIX="3.12 lowest"` selects some.
test-matrix:
	MATRIX="$(MATRIX)" .ci/matrix

# Builds a wheel, installs it in an empty environment, and runs the code of the README there.
check-wheel:
	PYTHON="$(PYTHON)" .ci/check-wheel

lint: $(VENV)/dev.stamp
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy

# docs/_build/html/index.html; `make docs DOCS_EXECUTE=cache` shows what the notebooks print, too.
docs: $(VENV)/docs.stamp
	DOCS_EXECUTE=$(or $(DOCS_EXECUTE),off) $(RUN) sphinx -W --keep-going -q docs docs/_build/html

# Those of the gallery, the notebooks and the README (needs Chromium); `make pictures PAGES=tides`
# draws one.
pictures: $(VENV)/test.stamp
	$(RUN) docs.make_pictures $(PAGES)

# Writes the table of the README from benchmarks/results.
figures: $(VENV)/demo.stamp
	$(RUN) benchmarks.readme

# `make bench BENCH="--quick"` tries the suite out; `make bench BENCH=kernel` runs one part of it.
bench: $(VENV)/test.stamp
	$(RUN) benchmarks.run $(BENCH)

# Optional, large: what in_memory.py compares with. Without it that comparison is left out.
bench-nlsq-env: $(NLSQ_VENV)/nlsq.stamp

clean:
	rm -rf $(VENV) $(NLSQ_VENV) .venv-matrix build dist demo-output docs/_build docs/notebooks .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# One stamp for each extra; a new pyproject.toml means a new install.
$(VENV)/%.stamp: pyproject.toml | $(VENV)/bin/python
	$(RUN) pip install --quiet --disable-pip-version-check --editable ".[$*]"
	touch $@

$(NLSQ_VENV)/nlsq.stamp:
	@for python in $(NLSQ_PYTHON); do \
		if $$python -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; then \
			set -ex; \
			$$python -m venv $(NLSQ_VENV); \
			echo '*' > $(NLSQ_VENV)/.gitignore; \
			$(NLSQ_VENV)/bin/pip install --quiet --disable-pip-version-check nlsq==0.7.6; \
			touch $@; \
			exit 0; \
		fi; \
	done; \
	echo "No Python 3.12 or newer found: make bench-nlsq-env NLSQ_PYTHON=/path/to/python3.12"; \
	exit 1
