.DEFAULT_GOAL := help
SHELL := bash
BIN := .venv/bin
# Each torch process gets one or two threads, or they starve each other.
export OMP_NUM_THREADS ?= 2
# Idle OpenMP threads sleep: spinning, they take the cores from the processes that have work.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: help
help: ## Show the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## (.*)/  \1\t\2/' | expand -t 18

.PHONY: setup
setup: ## Create .venv with what is pinned; does nothing where it is complete
	@bash scripts/setup.sh

.PHONY: demo
demo: setup ## Start a mesh, run a GRPO job on it, show how its reward rises
	@$(BIN)/python -m examples.demo

.PHONY: demo-smollm2
demo-smollm2: setup ## The same with a pretrained model, SmolLM2-135M-Instruct; slow on a CPU
	@bash scripts/fetch_smollm2.sh
	@$(BIN)/python -m examples.demo --config examples/smollm2.yaml --job examples/jobs/smollm2.yaml

# Files of long tests of the gateway; other long tests are marked.
TINKER := $(addprefix tests/contract/,test_gateway_fuzz.py test_openai_fuzz.py) tests/mesh/tinker \
	$(addprefix tests/mesh/,test_gateway.py test_gateway_fuzz.py test_local_gateway.py test_openai.py test_tinker_compatibility.py) \
	tests/chaos/test_gateway_kills.py
SHORT := -m "not long" $(TINKER:%=--ignore=%)

.PHONY: test
test: setup ## Run the tests, but those of test-long
	@$(BIN)/python -m pytest -n 2 $(SHORT) tests/unit
	@$(BIN)/python -m pytest -n 3 --dist loadfile $(SHORT) tests/contract
	@$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(SHORT) tests/mesh tests/chaos

.PHONY: test-long
test-long: setup ## Run the long tests: above all every method of the Tinker SDK, its cookbook, fuzz, kills of the gateway
	@$(BIN)/python -m pytest -m long tests
	@$(BIN)/python -m pytest $(TINKER)

.PHONY: chaos
chaos: setup ## The long chaos runs: kill trainers, coordinator and gateway N times at random points (SEED=), and samplers
	@CHAOS_KILLS=$(or $(N),60) CHAOS_COORDINATOR_KILLS=$(or $(N),30) CHAOS_GATEWAY_KILLS=$(or $(N),40) CHAOS_SEED=$(or $(SEED),20) CHAOS_TOKENS=500000 CHAOS_ROUNDS=8 CHAOS_PUBLISHES=10000 CHAOS_SCHEDULES=100000 CHAOS_ENVIRONMENT_FAULTS=30 \
		$(BIN)/python -m pytest -s tests/chaos

.PHONY: check
check: setup ## Lint, types, protos (lint and breaking), import rules, drift of generated files
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/buf lint
	$(BIN)/buf format --diff --exit-code
	@bash scripts/check_breaking.sh
	$(BIN)/lint-imports
	$(BIN)/python scripts/gen_protos.py --check
	$(BIN)/python -m scripts.gen_docs --check

.PHONY: format
format: setup ## Format the code and the protos
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/buf format --write

.PHONY: proto
proto: setup ## Generate rollmesh/api from protos/, docs/configuration.md from the models
	$(BIN)/buf lint
	$(BIN)/python scripts/gen_protos.py
	$(BIN)/python -m scripts.gen_docs

.PHONY: lock
lock: ## Resolve the dependencies anew and pin them in requirements/cpu.txt
	@bash scripts/lock.sh
