# `make repro` runs the whole pipeline on the embedded data set, `make test` the test suite; both set up first.
PYTHON ?= $(shell for p in python3 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null && echo $$p && break; done)
UV_VERSION := 0.13.8
BIN := .venv/bin

# An allocator that keeps large blocks; see "On a CPU" in docs/performance.md.
export MALLOC_MMAP_THRESHOLD_ := 1073741824
export MALLOC_TRIM_THRESHOLD_ := 8589934592
export NO_ALBUMENTATIONS_UPDATE := 1
export MLFLOW_DISABLE_TELEMETRY := true
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export DO_NOT_TRACK := 1
# Processes that run tests side by side, each with one thread.
TESTS_AT_A_TIME ?= 2
PYTEST := $(BIN)/python -m pytest -n $(TESTS_AT_A_TIME) --dist loadfile
# Compiled modules halve the start of every process.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup repro test test-slow test-soak bench lint pins services services-down ui

setup: .venv/ready

.venv/ready: pins.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "make: found no Python 3.11 or 3.12; install one, or name it with make PYTHON=..."; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	$(BIN)/uv pip install --python $(BIN)/python --quiet --require-hashes -r pins.txt
	$(BIN)/uv pip install --python $(BIN)/python --quiet --no-deps --no-build-isolation -e .
	@touch $@

# The whole pipeline: prepare, extractor, reference, experiment. Opens nothing; says what to open.
repro: setup
	@PATH="$(CURDIR)/$(BIN):$$PATH" dvc repro

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: setup lint
	$(PYTEST)

# Fault and end-to-end tests with real processes and servers.
test-slow: setup
	$(PYTEST) -m slow

# More of these, minutes each and one at a time: before a release, and after a change of what they name.
test-soak: setup
	$(BIN)/python -m pytest -m soak

# Did a training step or sampling become slower? Three minutes on one core, against the committed ratios.
bench: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.steps --resolutions 64 --precisions fp32 \
		--baseline benchmarks/results/baseline_64.json

# MLflow and Prefect servers and a Prefect worker for a team on one machine, loopback only.
services: setup
	$(BIN)/python -m infra.services up

services-down: setup
	$(BIN)/python -m infra.services down

# The local tracking page, without services.
ui: setup
	@echo "The runs: http://127.0.0.1:5000/#/experiments"
	$(BIN)/mlflow ui --backend-store-uri sqlite:///mlflow.db --port 5000

# Write the pins anew from pyproject.toml: names, versions and hashes, no addresses.
pins: setup
	$(BIN)/uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 --upgrade --no-header \
		--no-emit-index-url --no-annotate --generate-hashes --quiet -o pins.txt
