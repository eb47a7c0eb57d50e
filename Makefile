PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Tests start hundreds of Pythons, none of which should compile anew what another has.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: bench bench-behaviour bench-quick demo soak test lint

demo: $(STAMP)
	$(BIN)/python -m h2keep demo

test: lint
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal --max-worker-restart 2 \
		--cov --cov-report=term-missing:skip-covered

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# Clients that do everything at once, over a network that fails in every way: a minute of each kind, or as long as
# H2KEEP_SOAK_SECONDS says; H2KEEP_SOAK_SEED begins another one.
soak: $(STAMP)
	H2KEEP_SOAK_SECONDS=$${H2KEEP_SOAK_SECONDS:-60} $(BIN)/python -m pytest tests/soak

# About 35 minutes, on a machine that does nothing else; then docs/performance.md is made of it.
bench: $(STAMP)
	$(BIN)/python -m benchmarks run --profile-missed --minutes 33 --json benchmarks/results/speed.json
	$(BIN)/python -m benchmarks report benchmarks/results/speed.json

# Looks whether all works; its numbers mean nothing.
bench-quick: $(STAMP)
	$(BIN)/python -m benchmarks run --quick --json benchmarks/results/quick.json
	$(BIN)/python -m benchmarks report benchmarks/results/quick.json --output benchmarks/results/quick.md

# About 6 minutes: every client under every fault, then docs/behaviour.md.
bench-behaviour: $(STAMP)
	$(BIN)/python -m benchmarks.behaviour

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet --editable '.[cli,demo,fast,httpx,httpx2,socks,trio]' --group dev --group bench
	touch $@
