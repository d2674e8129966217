# Everything runs in .venv, which the first call makes; a later call installs only what pyproject.toml or the
# constraints changed.
#   PYTHON=python3.12    the interpreter to make .venv from (3.11 or newer)
#   CONSTRAINTS=file     other versions than those of constraints.txt; an empty file means the newest
#   WORKERS=4            test processes, of one thread each

PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
WORKERS ?= 2

# Relative, so that the path of the checkout may contain spaces; modules instead of scripts for the same reason.
VENV := .venv
RUN := $(VENV)/bin/python
# Not compiled: what is imported is compiled then, and most of it never is. It must be kept, though: without, every process
# of the tests compiles torch anew.
export PYTHONDONTWRITEBYTECODE :=
PIP_INSTALL := $(RUN) -m pip install --disable-pip-version-check --no-compile -c "$(CONSTRAINTS)"

# One thread per process: two processes of two threads on two cores are five to nine times slower, as the threads spin.
# worksteal keeps the tests of a file, and what they share, in one process.
PYTEST := OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(WORKERS) --dist worksteal

.PHONY: help demo test test-all lint format install constraints clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1	\2/p' Makefile | expand -t 20

demo: $(VENV)/.installed  ## train and repaint digits on a CPU, a few minutes
	GOMP_SPINCOUNT=10000 $(RUN) examples/digits.py

test: lint  ## lint, types and the default tests
	$(PYTEST) -m "not slow"

test-all: lint  ## the same with the slow tests
	$(PYTEST)

lint: $(VENV)/.installed-test  ## ruff and pyright, changes nothing
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m pyright

format: $(VENV)/.installed-test  ## let ruff format the code and mend what it can
	$(RUN) -m ruff check --fix
	$(RUN) -m ruff format

install: $(VENV)/.installed-test  ## an environment for development in .venv

constraints: | $(RUN)  ## write the newest versions that fit into constraints.txt
	$(RUN) -m pip install --quiet --dry-run --ignore-installed --report $(VENV)/resolved.json ".[test,bench]"
	sed -n '/^#/p' constraints.txt > $(VENV)/constraints.txt
	$(RUN) -c 'import json, sys; \
	  packages = [package["metadata"] for package in json.load(sys.stdin)["install"]]; \
	  print(*sorted({p["name"] + "==" + p["version"] for p in packages}, key=str.lower), sep="\n")' \
	  < $(VENV)/resolved.json > $(VENV)/resolved.txt
	grep -vE '^(unveil|nvidia-|cuda-|triton)' $(VENV)/resolved.txt >> $(VENV)/constraints.txt
	mv $(VENV)/constraints.txt constraints.txt

clean:  ## remove caches and build outputs, not .venv (5.5 GB to fetch again) and not runs/
	rm -rf build dist src/*.egg-info .pytest_cache .ruff_cache
	find src tests examples -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS) | $(RUN)
	@echo "Installing into $(VENV): about 5.5 GB, mostly PyTorch; a few minutes the first time."
	$(PIP_INSTALL) -e .
	@touch $@

$(VENV)/.installed-test: pyproject.toml $(CONSTRAINTS) | $(RUN)
	@echo "Installing into $(VENV): about 6 GB, mostly PyTorch; a few minutes the first time."
	$(PIP_INSTALL) -e ".[test]"
	@touch $(VENV)/.installed $@

$(RUN):
	@for python in "$(PYTHON)" python3.13 python3.12 python3.11; do \
	  "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue; \
	  rm -rf $(VENV); \
	  "$$python" -m venv $(VENV) && exit 0; \
	  rm -rf $(VENV); \
	  echo "$$python cannot make a virtual environment; on Debian and Ubuntu, install python3-venv." >&2; \
	  exit 1; \
	done; \
	echo "Unveil needs Python 3.11 or newer, and the PATH has none; install one, or name it: make PYTHON=..." >&2; \
	exit 1
