# Every target creates the virtual environment that it needs; no other set-up is necessary.
# Stamp files record what was installed, so running a target again needs no network.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The folders with Python code that exist.
CODE := $(wildcard aiotaskq tests examples benchmarks)
# Python programs without the ending by which tools find them.
PROGRAMS := scripts/check-house scripts/audit
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --use-pep517
# More arguments for pytest: make test ARGS="-k redis -x"
ARGS ?=
# Tests mostly wait for servers and processes, so many run at once. One at a time: make test SPREAD=
CORES := $(shell nproc 2>/dev/null || echo 2)
SPREAD ?= --numprocesses $(shell echo $$(($(CORES) < 4 ? 2 * $(CORES) : 8)))

.PHONY: help
help: ## List the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# --- set-up ---

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	    || { echo "Python 3.11 or later is needed: make PYTHON=python3.12 ..." >&2; exit 1; }
	@echo "creating $(VENV)"
	@$(PYTHON) -m venv --clear $(VENV) \
	    || { rm -rf $(VENV); echo "cannot create it: apt-get install python3-venv" >&2; exit 1; }
	@touch $@

$(VENV)/.base: pyproject.toml | $(VENV)/.made
	@echo "installing aiotaskq"
	@$(PIP) --editable .
	@touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/.made
	@echo "installing aiotaskq and the development tools"
	@$(PIP) --editable '.[dev]'
	@touch $@ $(VENV)/.base

.PHONY: install
install: $(VENV)/.dev ## Install the package and all development tools into .venv

# --- checks ---

.PHONY: fmt
fmt: $(VENV)/.dev ## Format the code and apply automatic fixes
	$(BIN)/ruff format $(CODE) $(PROGRAMS)
	$(BIN)/ruff check --fix $(CODE) $(PROGRAMS)

.PHONY: lint
lint: $(VENV)/.dev ## Check format and lint rules
	$(BIN)/ruff format --check $(CODE) $(PROGRAMS)
	$(BIN)/ruff check $(CODE) $(PROGRAMS)

.PHONY: types
types: $(VENV)/.dev ## Check types with mypy --strict and pyright
	$(BIN)/mypy $(CODE)
	$(foreach program,$(PROGRAMS),$(BIN)/mypy $(program) &&) true
	$(BIN)/pyright --pythonpath $(BIN)/python $(CODE)

.PHONY: arch
arch: $(VENV)/.dev ## Check layers and forbidden imports
	$(BIN)/lint-imports --no-cache

.PHONY: house
house: $(VENV)/.dev ## Names, docstrings and sizes: the rules that no other tool has
	$(BIN)/python scripts/check-house

.PHONY: audit
audit: $(VENV)/.dev ## Look for known vulnerabilities in all dependencies; needs the network
	$(BIN)/python scripts/audit

.PHONY: check
check: lint types arch house ## All checks without tests: lint, types, arch, house

# --- tests ---

.PHONY: servers
servers:
	@scripts/install-servers

.PHONY: test
test: $(VENV)/.dev servers ## Run all tests; installs and starts the servers for them
	$(BIN)/python -m pytest $(SPREAD) $(ARGS)

.PHONY: test-fast
test-fast: $(VENV)/.dev ## Run the fast tests that need no server
	$(BIN)/python -m pytest $(SPREAD) -m "not slow and not server" $(ARGS)

.PHONY: test-pythons
test-pythons: ## Run the fast tests on every Python at hand; all tests: make test-pythons ARGS=tests
	@scripts/test-pythons $(ARGS)

.PHONY: conformance
conformance: $(VENV)/.dev servers ## Run the conformance suites for every driver
	$(BIN)/python -m pytest tests/conformance $(ARGS)

.PHONY: faults
faults: $(VENV)/.dev servers ## Run the long fault tests and random histories, with new seeds: an hour
	AIOTASKQ_TESTS_FAULTS=long $(BIN)/python -m pytest $(SPREAD) tests/faults tests/properties $(ARGS)
	AIOTASKQ_TESTS_FAULTS=long $(BIN)/python -m pytest $(SPREAD) tests/conformance -k histories

# Seconds for each driver: make fuzz FUZZ=600
FUZZ ?= 120

.PHONY: fuzz
fuzz: $(VENV)/.dev servers ## Write hostile entries into every store beside good tasks, with a new seed each time
	AIOTASKQ_TESTS_FUZZ=$(FUZZ) $(BIN)/python -m pytest -s tests/fuzz $(ARGS)

# Number and duration: make soak TASKS=100000000 MINUTES=480
TASKS ?= 10000000
MINUTES ?= 60

.PHONY: soak
soak: $(VENV)/.dev servers ## Run TASKS, then kill worker processes for MINUTES; memory must not grow
	$(BIN)/python -m benchmarks soak --tasks $(TASKS)
	AIOTASKQ_TESTS_SOAK_MINUTES=$(MINUTES) $(BIN)/python -m pytest -s tests/faults/test_soak.py $(ARGS)

# --- programs ---

.PHONY: demo
demo: $(VENV)/.base ## Start a worker process, send tasks to it, print the results
	@$(BIN)/python examples/demo.py

.PHONY: examples
examples: $(VENV)/.dev servers ## Run every example and check its output
	$(BIN)/python -m pytest tests/examples $(ARGS)

.PHONY: bench
bench: $(VENV)/.dev servers ## Run the benchmarks: a few minutes; a single one: make bench ARGS=latency
	$(BIN)/python -m benchmarks $(ARGS)

.PHONY: bench-compare
bench-compare: $(VENV)/.dev servers ## Compare with other task queues: installs them, an hour
	$(BIN)/python -m benchmarks.compare $(ARGS)

.PHONY: bench-brokers
bench-brokers: $(VENV)/.dev servers ## Compare on PostgreSQL and RabbitMQ, update docs/performance.md: half an hour
	$(BIN)/python -m benchmarks.compare --only pgqueuer,procrastinate --workloads noop \
		--json benchmarks/results/compare-postgres.json $(ARGS)
	$(BIN)/python -m benchmarks.compare --only taskiq-aio-pika,celery-rabbitmq --workloads noop \
		--json benchmarks/results/compare-rabbitmq.json $(ARGS)
	$(BIN)/python -m tests.examples.documents

.PHONY: bench-plots
bench-plots: $(VENV)/.dev ## Draw the plots of docs/performance.md from benchmarks/results/
	@$(PIP) matplotlib
	$(BIN)/python -m benchmarks.report

# --- packages ---

.PHONY: build
build: $(VENV)/.made ## Build the wheel and the sdist into dist/
	@$(PIP) build
	$(BIN)/python -m build

.PHONY: clean
clean: ## Remove all generated files
	rm -rf $(VENV) $(VENV)-* build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis benchmarks/.venvs
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
