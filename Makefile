# The environment is .venv/ in this folder; every target makes what it needs.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# One OpenMP thread a process: steps and training ranks already use the cores, and spinning threads slow each other.
export OMP_NUM_THREADS := 1
export PYTHONUNBUFFERED := 1

.PHONY: install install-dev quickstart test test-faults test-services soak bench-engine bench-tracking bench-kernels bench-layers bench-plans test-gpu sanitize-kernels lint clean help

help:  ## Show the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/'

install: $(VENV)/.installed  ## Make .venv and install Ropewalk into it

install-dev: $(VENV)/.installed-dev  ## The same, with the development tools

quickstart: $(VENV)/.installed  ## Install, then run the whole chain on this machine
	$(BIN)/ropewalk run quickstart

# Many tests wait for servers and processes: two files of tests at a time fill two cores.
PYTEST := $(BIN)/python -m pytest --numprocesses=2 --dist=loadfile --durations=15

test: $(VENV)/.installed-dev  ## Lint, types, import contracts and all tests
	$(MAKE) --no-print-directory lint
	$(PYTEST)

test-faults: $(VENV)/.installed-dev  ## The long tests: kills, damage, full disks, two drivers, a short soak
	$(PYTEST) -m faults

MINUTES ?= 10
soak: $(VENV)/.installed-dev  ## Random pipelines, drivers, kills and damage for MINUTES=10; SEED=... repeats a soak
	$(BIN)/python tests/faults/soak.py --minutes $(MINUTES) $(if $(SEED),--seed $(SEED)) $(if $(STORE),--store $(STORE))

test-services: $(VENV)/.installed-dev  ## PostgreSQL, S3 and the MLflow server on loopback; installs PostgreSQL if need be
	$(PIP) --constraint constraints.txt --editable ".[dev,services]"
	tests/services/install_postgresql.sh
	$(BIN)/python -m pytest -m services

bench-engine: $(VENV)/.installed-dev  ## Speed of the engine beside DVC, Snakemake, redun and Prefect; OUTPUT=FILE.json
	$(BIN)/python tests/benchmarks/engine_speed.py --output $(or $(OUTPUT),build/engine_speed.json) $(if $(ENVIRONMENTS),--environments $(ENVIRONMENTS))

bench-tracking: $(VENV)/.installed-dev  ## Step time of a training while MLflow is down, slow or failing; OUTPUT=FILE.json
	$(BIN)/python tests/benchmarks/tracking_outage.py --output $(or $(OUTPUT),build/tracking_outage.json)

PRESET ?= core
bench-kernels: $(VENV)/.installed-dev  ## Speed of attention on this machine's GPU, other libraries beside it; PRESET=full
	$(BIN)/python tests/benchmarks/kernels_speed.py --preset $(PRESET) $(if $(DEVICE),--device $(DEVICE)) --output $(or $(OUTPUT),build/kernels_speed.json)

bench-layers: $(VENV)/.installed-dev  ## A 128K training step of an 8B-shaped layer stack, masked beside full attention
	$(BIN)/python tests/benchmarks/layer_stack_speed.py --output $(or $(OUTPUT),build/layer_stack.json)

bench-plans: $(VENV)/.installed-dev  ## What a batch pays for its attention plan; DEVICE=cuda
	$(BIN)/python tests/benchmarks/kernels_plan_cost.py $(if $(DEVICE),--device $(DEVICE)) --output $(or $(OUTPUT),build/plan_cost.json)

test-gpu: $(VENV)/.installed-dev  ## The kernels' tests on this machine's GPU
	$(BIN)/python -m pytest --numprocesses=8 tests/kernels/attention/test_attention_on_gpu.py -m 'not slow'
	$(BIN)/python -m pytest tests/kernels/attention/test_attention_on_gpu.py -m slow

sanitize-kernels: $(VENV)/.installed-dev  ## Memory errors and races of small attention, by CUDA's compute-sanitizer
	for tool in memcheck racecheck; do \
		PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 1 \
			$(BIN)/python tests/benchmarks/kernels_small_cases.py || exit 1; \
	done

lint: $(VENV)/.installed-dev  ## ruff, pyright and import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	tests/check_installed.sh $(BIN)

clean:  ## Remove the environment (the store .ropewalk/ stays)
	rm -rf $(VENV)

# torch first, by its pinned version: a range would take the newest build with gigabytes of CUDA.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || python3 -m venv $(VENV)
	$(PIP) "$$(grep '^torch==' constraints.txt)"
	$(PIP) --constraint constraints.txt --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) --constraint constraints.txt --editable ".[dev]"
	touch $@
