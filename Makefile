PYTHON_BIN := .venv/bin/python
PYTEST := $(PYTHON_BIN) -m pytest
# Two processes, a file in either, in this order: most files keep one core busy. TEST_ARGS="-n 0" is one process.
TWO_AT_ONCE := -n 2 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup launch-env agents-env demo demo-agents demo-real test test-fast test-slurm gpu-check lint docs site bench lock clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup:  ## make .venv with the pinned packages (done by every target below)
	@tools/setup.sh

launch-env: setup  ## make .venv-launch, from which `megatron-opd launch` submits jobs
	@tools/setup.sh launch

agents-env: setup  ## make .venv-agents, in which ALFWorld and WebShop play (compiles for minutes the first time)
	@tools/setup.sh agents

demo: setup  ## train a student with a teacher, from nothing to a report (DEMO_ARGS=...)
	$(PYTHON_BIN) tools/demo.py $(DEMO_ARGS)

demo-agents: setup  ## agents in a toy world, with rewards alone and with SDAR, to a report of each (DEMO_ARGS=...)
	$(PYTHON_BIN) tools/demo_agents.py $(DEMO_ARGS)

demo-real: setup  ## the same with a real language model, SmolLM2-135M-Instruct (DEMO_ARGS=...)
	$(PYTHON_BIN) tools/demo_real.py $(DEMO_ARGS)

test: setup  ## every test but test-slurm's; those that need a GPU are skipped without one (TEST_ARGS=...)
	@nice tools/setup.sh agents >.venv-agents.log 2>&1 & AGENTS_SETUP=$$! $(PYTEST) $(TWO_AT_ONCE) -m "not slurm" $(TEST_ARGS)

test-fast: setup  ## the unit tests, without the slow ones
	$(PYTEST) tests/unit -m "not slow" $(TEST_ARGS)

test-slurm: launch-env  ## jobs on a real Slurm of two virtual nodes, which this sets up and takes down (as root)
	@tools/slurm_test_cluster.sh up
	@$(PYTEST) tests/slurm $(TEST_ARGS); code=$$?; tools/slurm_test_cluster.sh down; exit $$code

gpu-check: setup  ## check and measure on one GPU, in 7 minutes; small sizes, also on a CPU: SMALL=1 (GPU_ARGS=...)
	$(PYTHON_BIN) tools/gpu_check.py $(if $(SMALL),--small) $(GPU_ARGS)

lint: setup  ## style, formatting, types, and that the generated pages are current
	$(PYTHON_BIN) -m ruff check .
	$(PYTHON_BIN) -m ruff format --check .
	$(PYTHON_BIN) -m mypy
	$(PYTHON_BIN) tools/make_docs.py --check

docs: setup  ## write docs/config.md, docs/methods.md and others from the code
	$(PYTHON_BIN) tools/make_docs.py

site:  ## build the documentation as a site in build/site; a broken link is an error
	@tools/setup.sh docs
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/python -m mkdocs build --quiet

bench: setup  ## every benchmark, one after the other (hours on a small machine)
	@set -e; for file in benchmarks/*.py; do echo "== $$file"; $(PYTHON_BIN) $$file; done

lock: setup  ## resolve constraints/*.txt from pyproject.toml (LOCK_ARGS=--upgrade for newer versions)
	$(PYTHON_BIN) -m uv pip compile pyproject.toml --quiet --python $(PYTHON_BIN) --extra cpu --extra dev --extra agents --extra ifbench \
	    --override constraints/overrides.txt --custom-compile-command "make lock" $(LOCK_ARGS) -o constraints/cpu.txt
	cp constraints/cpu.txt constraints/gpu.txt  # whose versions are kept where they can be
	$(PYTHON_BIN) -m uv pip compile pyproject.toml --quiet --python $(PYTHON_BIN) --extra gpu --extra agents --extra ifbench \
	    --custom-compile-command "make lock" -o constraints/gpu.txt
	$(PYTHON_BIN) -m uv pip compile --group pyproject.toml:launch --quiet --python $(PYTHON_BIN) \
	    --custom-compile-command "make lock" $(LOCK_ARGS) -o constraints/launch.txt
	$(PYTHON_BIN) -m uv pip compile --group pyproject.toml:agents --quiet --python $(PYTHON_BIN) \
	    --custom-compile-command "make lock" $(LOCK_ARGS) -o constraints/agents.txt
	$(PYTHON_BIN) -m uv pip compile --group pyproject.toml:docs --quiet --python $(PYTHON_BIN) \
	    --custom-compile-command "make lock" $(LOCK_ARGS) -o constraints/docs.txt

clean:  ## remove .venv and every cache; runs/ stays
	rm -rf .venv .venv-launch .venv-agents .venv-docs build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
