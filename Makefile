# Everything a task needs is made on the way to it; only python3 (3.11 or newer) and make are assumed.
#   make train ARGS="--help"      make test ARGS="tests/kernels -k gla"      make test PYTHON=python3.12
PYTHON ?= python3
ARGS ?=
ifndef ACCELERATOR
ACCELERATOR := $(shell if nvidia-smi -L >/dev/null 2>&1; then echo cuda; \
	elif ls /dev/accel[0-9]* >/dev/null 2>&1 || [ -n "$$TPU_ACCELERATOR_TYPE" ] || \
		{ ls /dev/vfio/[0-9]* && grep -q 0x1ae0 /sys/bus/pci/devices/*/vendor; } >/dev/null 2>&1; \
	then echo tpu; else echo cpu; fi)
endif

VENV := .venv
BIN := $(VENV)/bin
EXTRA := $(filter-out cpu,$(ACCELERATOR))
comma := ,
# What the installation depends on, besides these files: a new one replaces the old in place.
FOR_TRAIN := $(VENV)/.train-$(ACCELERATOR)
FOR_DEV := $(VENV)/.dev-$(ACCELERATOR)
FOR_PARITY := $(VENV)/.parity-$(ACCELERATOR)
FOR_EVAL := $(VENV)/.eval-$(ACCELERATOR)
FOR_TPU_AOT := $(VENV)/.tpu-aot-$(ACCELERATOR)
SOURCES := pyproject.toml setup.py $(wildcard constraints/*.txt)

LINE = $(shell $(BIN)/python -c 'import sys; print("py311" if sys.version_info < (3, 12) else "py312")')

# Python compiles what is imported; compiling all that is installed takes a third of the time.
install = $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --editable \
	'.[$(1)$(if $(EXTRA),$(comma)$(EXTRA))]' --constraint constraints/$(LINE).txt

.PHONY: help train test test-x64 test-core test-readme test-parity test-eval test-tpu-aot docs lint types format \
	constraints clean same-python

help:  ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile

train: $(FOR_TRAIN)  ## train a model on this computer's own text, with flags in ARGS
	$(BIN)/python experiments/train.py $(ARGS)

test: $(FOR_DEV)  ## the whole suite, once more with x64 on; or what ARGS names
	$(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal $(ARGS)
ifeq ($(strip $(ARGS)),)
	@$(MAKE) --no-print-directory test-x64
endif

test-x64: $(FOR_DEV)  ## the laws of kernels and layers with x64 on, where a stray dtype shows
	JAX_ENABLE_X64=1 $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal \
		tests/kernels tests/layers -k "not float64 and not hopper and not interpreters" $(ARGS)

# Without kernels for TPUs, interpreted: jax 0.12's XLA takes one of them more than ten minutes to compile.
test-core: $(FOR_DEV)  ## ladder, parity, checkpoints and command line: what another JAX would break
	$(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal -m core -k "not pallas" $(ARGS)

test-readme: $(FOR_DEV)  ## the README's commands as printed, in a fresh clone with a fresh environment
	$(BIN)/python -m pytest tests/extras/test_readme.py $(ARGS)

test-parity: $(FOR_PARITY)  ## models drawn at random against transformers, in torch on the CPU
	$(BIN)/python -m pytest -n logical --maxprocesses 8 --dist loadscope tests/extras/test_transformers.py $(ARGS)

test-eval: $(FOR_EVAL)  ## lm-evaluation-harness over our models
	$(BIN)/python -m pytest tests/extras/test_harness.py $(ARGS)

test-tpu-aot: $(FOR_TPU_AOT)  ## every kernel through the TPU's own compiler, without a TPU
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -m tpu_aot tests/kernels/test_tpu_aot.py $(ARGS)

docs: $(FOR_DEV)  ## these pages, the notebooks and the docstrings as a site in build/docs
	JAX_PLATFORMS=cpu $(BIN)/python -m sphinx --fail-on-warning --keep-going docs build/docs

lint: $(FOR_DEV)  ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(FOR_DEV)  ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(FOR_DEV)  ## pyright
	@mkdir -p $(VENV)/tree && ln -sfn ../.. $(VENV)/tree/scanax
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright

constraints: $(BIN)/python  ## exact versions of what the ranges allow today, for this Python
	$(BIN)/python constraints/update.py

clean:  ## remove the environment and caches; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(FOR_TRAIN): $(BIN)/python $(SOURCES) | same-python
	@echo "installing scanax for training ($(ACCELERATOR)) in $(VENV): a minute or two, once"
	@$(call install,train)
	@touch $@

$(FOR_DEV): $(BIN)/python $(SOURCES) | same-python
	@echo "installing scanax with its tests' tools ($(ACCELERATOR)) in $(VENV): a minute or two, once"
	@$(call install,dev)
	@touch $@ $(FOR_TRAIN)

$(FOR_PARITY): $(FOR_DEV)
	@echo "installing transformers and torch in $(VENV): a minute or two, once"
	@$(call install,dev$(comma)parity) $(PIP_ARGS)
	@touch $@

$(FOR_EVAL): $(FOR_DEV)
	@echo "installing lm-evaluation-harness in $(VENV): a few minutes, once"
	@$(call install,dev$(comma)eval)
	@touch $@

$(FOR_TPU_AOT): $(FOR_DEV)
	@echo "installing the TPU's compiler in $(VENV): a few minutes, once"
	@$(call install,dev$(comma)tpu-aot)
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		for newer in python3.13 python3.12 python3.11; do \
			if $$newer -c '' 2>/dev/null; then \
				echo "scanax needs Python 3.11 or newer; type: make PYTHON=$$newer $(MAKECMDGOALS)"; exit 1; \
			fi; \
		done; \
		echo "scanax needs Python 3.11 or newer, and $(PYTHON) is not; install one, then type:" \
			"make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		version=$$($(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])'); \
		echo "$(PYTHON) cannot make a virtual environment; type: sudo apt install python$$version-venv"; \
		exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# A Python that is asked for by name is the one that runs, or it is an error.
same-python: $(BIN)/python
ifneq ($(origin PYTHON),file)
	@show='import sys; print("%d.%d" % sys.version_info[:2])'; \
	if [ "$$($(PYTHON) -c "$$show")" != "$$($(BIN)/python -c "$$show")" ]; then \
		echo "$(VENV) was made with another Python; type: make clean VENV=$(VENV), then the same again"; \
		exit 1; fi
endif
