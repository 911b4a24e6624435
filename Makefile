# One command per intention. The first one that needs it makes .venv; it is only brought up to date again when
# pyproject.toml or constraints.txt change.
PYTHON ?= python3
# A package index for torch alone, such as one with CPU builds; empty: wherever pip looks for everything.
TORCH_INDEX_URL ?=
ARGS ?=
# Processes that share the tests which need no service; 0: none beside pytest's own.
TEST_WORKERS ?= 2
# Where tests that need a service are: reading the others takes a while.
SERVICE_TESTS := tests/integration tests/e2e

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help run smoke train-demo test nightly check bench bench-http bench-fleet bench-train monitor dashboards clean chart-docs manifests image

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{ printf "  make %-10s %s\n", $$1, $$2 }'

run: .venv/serve ## start the service in the foreground, http://127.0.0.1:8000 (ARGS="--port 8001" and so on)
	$(BIN)/lorafleet serve $(ARGS)

smoke: .venv/serve ## start the service, make out/*.png with the command line, stop it
	$(BIN)/python scripts/smoke.py

train-demo: .venv/train ## train the two sample styles and measure what they learnt, out/train-demo; twelve minutes
	PYTHONPATH=scripts $(BIN)/python scripts/train_demo.py $(ARGS)

# Ray's workers, pytest's and every command of a test read the same modules: compiled once.
test nightly: export PYTHONDONTWRITEBYTECODE =

test: .venv/dev ## the whole test suite (ARGS="-k recipe" and so on: in one process)
ifeq ($(ARGS),)
	$(BIN)/python -m pytest --numprocesses $(TEST_WORKERS) --dist worksteal -m "not service and not nightly"
	$(BIN)/python -m pytest -m "service and not nightly" $(SERVICE_TESTS)
else
	$(BIN)/python -m pytest $(ARGS)
endif

nightly: .venv/dev ## the long tests (200 mixes against diffusers and PEFT, killed trainers, whole evaluations, images): an hour
	$(BIN)/python -m pytest -m nightly -o faulthandler_timeout=3600 $(ARGS)
ifeq ($(ARGS),)
	SERVICE_WAY=direct $(BIN)/python -m pytest -m "service and not nightly" tests/integration
endif

check: .venv/dev ## formatting, lint, types, directions of imports
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/python scripts/typecheck.py
	$(BIN)/lint-imports --no-cache

bench: .venv/serve ## images per second and latency of diffusers and our engine, with and without adapters, then what HTTP adds
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python loadtests/engine_bench.py $(ARGS)
	PYTHONPATH=scripts $(BIN)/python loadtests/http_bench.py

bench-http: .venv/serve ## requests per second and latency, in one process and over HTTP
	PYTHONPATH=scripts $(BIN)/python loadtests/http_bench.py $(ARGS)

bench-train: .venv/train ## images per second and memory of training, beside a loop as in diffusers' script; for GPUs
	PYTHONPATH=loadtests $(BIN)/python loadtests/train_bench.py $(ARGS)

bench-fleet: .venv/serve ## what the serving plane promises, on 2 replicas and 20 adapters: mixed, push, slow, kill, scale
	PYTHONPATH=scripts $(BIN)/python loadtests/fleet.py $(or $(ARGS),mixed push slow kill scale)

monitor: .venv/serve ## Prometheus beside a service that runs with metrics_port=9400 (ARGS="--metrics-port N" for another)
	$(BIN)/python scripts/monitor.py $(ARGS)

dashboards: .venv/dev ## write Grafana's dashboards anew from scripts/dashboard_panels.py
	$(BIN)/python scripts/dashboards.py

chart-docs: .venv/train ## write the chart's README.md and values.schema.json from its values.yaml
	$(BIN)/python scripts/chart_docs.py $(ARGS)

manifests: .venv/train ## write deploy/k8s from the chart; needs helm (HELM=... where it is)
	$(BIN)/python scripts/manifests.py $(ARGS)

image: ## build the image for serving without a GPU, lorafleet:dev-cpu (ARGS="--target serve-cuda --tag lorafleet:dev" for GPUs)
	docker build $(if $(TORCH_INDEX_URL),--build-arg TORCH_INDEX_URL=$(TORCH_INDEX_URL)) $(or $(ARGS),--target serve --tag lorafleet:dev-cpu) .

clean: ## remove what these targets made
	rm -rf .venv build dist out *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Lorafleet needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv

# torch comes first: it alone may need an index of its own, and nothing after it may bring another one.
.venv/torch: .venv/bin/python constraints.txt
	$(PIP) $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL)) torch
	@touch $@

.venv/serve: .venv/torch pyproject.toml
	$(PIP) --editable '.[serve]'
	@touch $@

.venv/train: .venv/serve
	$(PIP) --editable '.[serve,train]'
	@touch $@

.venv/dev: .venv/serve
	$(PIP) --editable '.[serve,train,eval,dev]'
	@touch $@
