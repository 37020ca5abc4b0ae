# Everything a newcomer needs: `make run` and `make test`. Each sets up the virtual environment first, once.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# An index of torch's CPU builds; empty: the configured index. The public index's torch is a CUDA build of gigabytes.
TORCH_INDEX_URL ?=
PROTOS := $(wildcard proto/staffetta/v1/*.proto)
STAMP  := $(VENV)/.installed
KERNELS := kernels/cpu/build/libstaffetta_cpu.so

.PHONY: setup run test same-tokens bench check proto proto-check
.DEFAULT_GOAL := help

.PHONY: help
help: ## Shows the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

setup: $(STAMP) $(KERNELS) ## Creates the virtual environment, installs everything, pinned, and builds the CPU kernels

# torch first and alone, because TORCH_INDEX_URL has nothing else; the later resolve keeps what is installed.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(if $(TORCH_INDEX_URL),--index-url '$(TORCH_INDEX_URL)') torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

$(KERNELS): $(wildcard kernels/cpu/src/*) kernels/cpu/CMakeLists.txt | $(STAMP)
	$(BIN)/python -m kernels.cpu.build
	@touch $@

run: setup ## Starts gateway, prefill and decode with the embedded model, and streams one answer
	@$(BIN)/staffetta serve demo

test: setup ## Runs the tests
	@$(BIN)/python -m pytest

same-tokens: setup ## Proves that tokens and log-probabilities have the same bits in every way a request can run
	@seed=$${SEED:-$$(shuf -i 1-1000000 -n 1)}; echo "seed $$seed"; \
	  $(BIN)/python -m tests.same_tokens.system --full --seed $$seed

bench: setup ## Measures kernels and W1-W4 on this machine beside its limits, in a quarter of an hour; BENCH=--quick: two minutes
	@$(BIN)/python -m bench.run $(BENCH)

check: setup proto-check ## Lint, security rules, formatting, strict types, layering
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest -q tests/test_layering.py

proto: setup ## Generates the code of proto/staffetta/v1
	@cd proto && ../$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --grpc_python_out=. \
	  --plugin=protoc-gen-mypy=../$(BIN)/protoc-gen-mypy --plugin=protoc-gen-mypy_grpc=../$(BIN)/protoc-gen-mypy_grpc \
	  --mypy_out=quiet:. --mypy_grpc_out=quiet:. $(PROTOS:proto/%=%)

proto-check: setup ## Fails when the committed generated code is not what `make proto` makes
	@$(BIN)/python -m tests.proto_check
