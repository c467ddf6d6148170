# Needs Python 3.11 or newer, make and git; `make setup` puts everything else into .venv.
#   make up                    a running stack with the default model; ARGS="--model DIR --workers 4" are its flags
#   make setup TORCH=...       another torch, for example TORCH="torch==2.11.0"
#   make test PYTEST="-k name" some of the tests
#   make exact                the promise of the same bits in 10,000 random cases; CASES=100 for fewer (make test: 40)
#   make chaos                 workers killed under load again and again; KILLS=100 is how often
#   make bench-large           a model of 13 GB, quantized and served within a third of it; needs 20 GB of disk
#   make test-system           with real parts (Prometheus, Docker, …); as root, says what it installs

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := up
.PHONY: setup up test exact chaos test-system lint protos bench bench-large clean

BIN := .venv/bin
READY := .venv/.ready
BUF := @bufbuild/buf@1.75.0

setup:
	@scripts/setup.sh
	@touch $(READY)

$(READY): pyproject.toml scripts/setup.sh
	@scripts/setup.sh
	@touch $@

up: $(READY)
	@exec $(BIN)/consilium up $(ARGS)

test: $(READY)
	@$(BIN)/consilium model fetch default
	@$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0 tests/chaos tests/gpu tests/integration tests/parity tests/unit $(PYTEST)

exact: $(READY)
	@EXACT_CASES=$(or $(CASES),10000) $(BIN)/python -m pytest -o faulthandler_timeout=0 tests/unit/test_exactness.py --hypothesis-show-statistics $(PYTEST)

chaos: $(READY)
	@ROUTER_ABSENCE=60 ROUTER_KILLS=$(or $(KILLS),100) WORKER_KILLS=$(or $(KILLS),100) $(BIN)/python -m pytest -o faulthandler_timeout=0 -s tests/chaos/test_router_faults.py tests/chaos/test_worker_faults.py $(PYTEST)
	@$(BIN)/python -m bench.goodput
	@$(BIN)/python -m bench.joining

test-system: $(READY)
	@scripts/system-setup.sh
	@$(BIN)/consilium model fetch default
	@$(BIN)/python -m pytest tests/system $(PYTEST)

lint: $(READY)
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@scripts/protos.sh --check
	@if command -v npx >/dev/null; then npx --yes $(BUF) lint; else echo "buf lint left out: it needs npx (Node.js)"; fi

protos: $(READY)
	@scripts/protos.sh

bench: $(READY)
	@$(BIN)/python -m bench $(ARGS)

bench-large: $(READY)
	@$(BIN)/python -m bench.large $(ARGS)

clean:
	@rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
