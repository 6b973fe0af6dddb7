# make demo: watch a reward being hacked, and RSA-FT against it.   make test: the test suite.
# make docs: the site of docs/, in build/site.   make notebook: run the quickstart notebook.
# All create .venv if it is missing and install once, with the versions of constraints.txt.

PYTHON ?= $(firstword $(shell command -v python3.11 python3.12 python3.13 python3))
VENV ?= .venv
RUN := $(VENV)/bin/python

.PHONY: demo test slow lint types docs notebook install clean

demo: install
	$(VENV)/bin/rsaft demo

test: install
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist loadscope

slow: install
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist loadscope --runslow

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: install
	$(VENV)/bin/mypy

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet

notebook: $(VENV)/.installed-docs
	$(VENV)/bin/jupyter-execute examples/quickstart.ipynb --timeout=300

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
