# `make` alone says what there is.
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all check bench serve clean
PYTHON_FILES := backend kernels client examples scripts tests bench model_repository
VENV := .venv/bin
# On two workers, which tests/conftest.py hands whole files, and one of them all that start servers.
PYTEST := $(VENV)/python -m pytest -n 2 --durations=20

help: ## say what there is
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-8s %s\n", $$1, $$2}'

setup: ## make .venv and .build (packages, tritonserver, base model); PYTHON=... names the interpreter
	@python=$$(sh scripts/find_python.sh) && exec "$$python" scripts/setup.py

demo: setup ## three adapters and the base model answer one mixed batch on a real tritonserver
	@$(VENV)/python examples/demo.py

test: setup ## the CPU test suite, real server included, in ten minutes; ARGS="-k name" is passed to pytest
	@$(PYTEST) -m "not slow" $(ARGS)

test-all: setup ## the same and the tests marked slow: what is long and rarely breaks
	@$(PYTEST) $(ARGS)

check: setup ## lint, format and types; changes nothing
	@$(VENV)/ruff check $(PYTHON_FILES)
	@$(VENV)/ruff format --check $(PYTHON_FILES)
	@$(VENV)/mypy

bench: setup ## a short form of the serving and the kernels' benchmarks, in minutes; saves nothing
	@$(VENV)/python bench/serving.py --short
	@$(VENV)/python bench/bench_kernels_cpu.py --repeats 3

serve: setup ## the base model and the example adapters on ports 8000 (HTTP), 8001 (gRPC), 8002 (metrics)
	@exec $(VENV)/manylora serve --base-model .build/base_model --adapter-root examples/adapters

clean: ## remove what set-up and tools have made
	rm -rf .venv .build .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info backend/*.egg-info
