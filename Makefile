PYTHON_BIN := .venv/bin/python
PYTEST := $(PYTHON_BIN) -m pytest

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup demo test test-fast lint docs bench lock clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup:  ## make .venv with the pinned packages (done by every target below)
	@tools/setup.sh

demo: setup  ## train a student with a teacher, from nothing to a report (DEMO_ARGS=...)
	$(PYTHON_BIN) tools/demo.py $(DEMO_ARGS)

test: setup  ## every test; those that need a GPU are skipped without one (TEST_ARGS=...)
	$(PYTEST) $(TEST_ARGS)

test-fast: setup  ## the unit tests, without the slow ones
	$(PYTEST) tests/unit -m "not slow" $(TEST_ARGS)

lint: setup  ## style, formatting, types, and that the generated pages are current
	$(PYTHON_BIN) -m ruff check .
	$(PYTHON_BIN) -m ruff format --check .
	$(PYTHON_BIN) -m mypy
	$(PYTHON_BIN) tools/make_docs.py --check

docs: setup  ## write docs/config.md and docs/methods.md from the code
	$(PYTHON_BIN) tools/make_docs.py

bench: setup  ## every benchmark, one after the other (hours on a small machine)
	@set -e; for file in benchmarks/*.py; do echo "== $$file"; $(PYTHON_BIN) $$file; done

lock: setup  ## resolve constraints/cpu.txt from pyproject.toml (LOCK_ARGS=--upgrade for newer versions)
	$(PYTHON_BIN) -m uv pip compile pyproject.toml --quiet --python $(PYTHON_BIN) --extra cpu --extra dev \
	    --override constraints/overrides.txt --custom-compile-command "make lock" $(LOCK_ARGS) -o constraints/cpu.txt

clean:  ## remove .venv and every cache; runs/ stays
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
