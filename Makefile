# The environment is .venv; it is made on first use and again only when pyproject.toml or constraints.txt change.
#
#   PYTHON          interpreter that makes the environment (3.10 or newer)
#   PIP_TORCH_ARGS  further pip arguments for torch, e.g. --index-url of another build
#   PYTEST_ARGS     pytest arguments besides; two workers if not given; "-k routing" for some of the tests
#   DEMO_ARGS, BENCH_ARGS, FAULTS_ARGS, COMPARE_ARGS

PYTHON ?= python3
PIP_TORCH_ARGS ?=
PYTEST_ARGS ?= -n 2 --dist worksteal
DEMO_ARGS ?=
BENCH_ARGS ?=
FAULTS_ARGS ?=
COMPARE_ARGS ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CODE := smoe_train tests scripts

# One thread per process: the tests start several processes, and spinning threads slow each other down.
PYTEST := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest
FAULTS := OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -m faults

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-slow faults faults-nightly lint types format bench-moe bench-step bench-scaling bench-adaptive bench-loader bench-memory bench-parallel bench-save compare compare-curriculum docs docker clean

help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' Makefile

demo: .venv/package.stamp ## train a small model with 2 expert-parallel processes (a few minutes on a CPU)
	$(BIN)/smoe-train demo $(DEMO_ARGS)

test: lint types ## lint, types and all tests that are not slow
	$(PYTEST) -m "not slow" $(PYTEST_ARGS)

test-slow: .venv/dev.stamp ## the slow tests
	$(PYTEST) -m slow $(PYTEST_ARGS)

faults: .venv/dev.stamp ## inject every fault some dozens of times (at most 10 minutes); writes reliability.json
	$(FAULTS) --scale commit $(FAULTS_ARGS)

faults-nightly: .venv/dev.stamp ## inject every fault as often as a night allows
	$(FAULTS) --scale nightly $(FAULTS_ARGS)

lint: .venv/dev.stamp ## ruff: rules and format
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)

types: .venv/dev.stamp ## mypy, strict
	$(BIN)/mypy

format: .venv/dev.stamp ## rewrite the code to the format
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

bench-moe: .venv/package.stamp ## time training steps beside a dense twin and peers; fails if a recorded ratio has fallen
	$(BIN)/python scripts/bench_moe.py $(BENCH_ARGS)

bench-step: .venv/package.stamp ## time what is around the experts: trainer, optimizer, attention, loss, recomputation
	$(BIN)/python scripts/bench_step.py $(BENCH_ARGS)

bench-scaling: .venv/package.stamp ## time steps against experts, tokens, k, layers, ranks; writes docs/performance.md
	$(BIN)/python scripts/bench_scaling.py --write-docs $(BENCH_ARGS)

bench-adaptive: .venv/package.stamp ## time adaptive gating by its share of tokens with two experts
	$(BIN)/python scripts/bench_adaptive.py $(BENCH_ARGS)

bench-loader: .venv/package.stamp ## time the loader beside training steps; an epoch of a 4 GB store (needs 8 GB of disk)
	$(BIN)/python scripts/bench_loader.py $(BENCH_ARGS)

bench-memory: .venv/package.stamp ## measure the memory of training: peak and growth; BENCH_ARGS=--billion, a large model
	$(BIN)/python scripts/bench_memory.py $(BENCH_ARGS)

bench-parallel: .venv/package.stamp ## time expert-parallel processes beside one process, and count what they send
	$(BIN)/python scripts/bench_parallel.py $(BENCH_ARGS)

bench-save: .venv/package.stamp ## time what a checkpoint costs: in the background, waited for, not at all
	$(BIN)/python scripts/bench_save.py $(BENCH_ARGS)

compare: .venv/dev.stamp ## train every routing policy on a piece of enwik8 and write the table (about an hour)
	$(BIN)/python scripts/compare_policies.py $(COMPARE_ARGS)

compare-curriculum: .venv/package.stamp ## train adaptive gating on SST-2 in plain and in easy-first order (about an hour)
	$(BIN)/python scripts/compare_curriculum.py $(COMPARE_ARGS)

docs: .venv/docs.stamp ## build the documentation into site/
	$(BIN)/mkdocs build --strict

docker: ## build the CPU and the CUDA image
	docker build -f docker/Dockerfile.cpu -t smoe-train:cpu --build-arg PIP_TORCH_ARGS="$(PIP_TORCH_ARGS)" .
	docker build -f docker/Dockerfile.cuda -t smoe-train:cuda .

clean: ## remove caches and built files; the environment and runs/ stay
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis dist site
	find . \( -path ./.venv -o -path ./runs -o -path ./.git \) -prune -o -name __pycache__ -type d -exec rm -rf {} +

# torch goes first and alone, so that every later install keeps the tested build.
.venv/torch.stamp: constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed; give PYTHON=")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) install -c constraints.txt $(PIP_TORCH_ARGS) torch
	touch $@

.venv/package.stamp: .venv/torch.stamp pyproject.toml
	$(PIP) install -c constraints.txt -e .
	touch $@

.venv/dev.stamp: .venv/torch.stamp pyproject.toml
	$(PIP) install -c constraints.txt -e ".[dev]"
	touch .venv/package.stamp $@

.venv/docs.stamp: .venv/torch.stamp pyproject.toml
	$(PIP) install -c constraints.txt -e ".[docs]"
	touch .venv/package.stamp $@
