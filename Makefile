# Everything a developer or CI does. Each target sets up what it needs, and does so once.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
# an environment with the base dependencies alone: what a device has
BASE := .venv-base/ready
# what a device without a GPU has: the base dependencies and ONNX Runtime
DEVICE := .venv-device/ready
# constraints.txt pins what needs Python 3.11; edgeres itself runs on 3.10
NEW_ENOUGH = $(PYTHON) -c "import sys; sys.version_info < (3, 11) and sys.exit('development needs Python 3.11 or newer,\
 and $(PYTHON) is %d.%d: make PYTHON=python3.11 $(MAKECMDGOALS)' % sys.version_info[:2])"

.PHONY: help demo test test-slow gpu-check check format clean

help:                ## this list
	@sed -n 's/^\([a-z-]*\): .*## /\1\t/p' Makefile | expand -t 14

demo: $(READY)       ## the whole flow offline: train, export, quantize, build, validate
	@$(BIN)/edgeres demo

test: $(READY) $(BASE) $(DEVICE) ## the tests
	$(BIN)/pytest -n auto --maxprocesses 4 --dist loadfile

test-slow: $(READY) $(DEVICE) ## the tests at real sizes
	$(BIN)/pytest -m slow

gpu-check: $(if $(WHEELS),,$(READY)) ## all that takes an NVIDIA GPU, in one run; WHEELS=DIR: without network
	@$(if $(WHEELS),$(PYTHON),$(BIN)/python) benchmarks/gpu/check.py $(if $(WHEELS),--wheels $(WHEELS))

check: $(READY)      ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(READY)     ## format and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:               ## remove the environments and everything built
	rm -rf .venv .venv-base .venv-device .venv-gpu dist engines/out .mypy_cache .pytest_cache .ruff_cache

$(READY): pyproject.toml constraints.txt
	@$(NEW_ENOUGH)
	@echo "setting up .venv (once)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

$(BASE): pyproject.toml constraints.txt
	@$(NEW_ENOUGH)
	@$(PYTHON) -m venv .venv-base
	@.venv-base/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(DEVICE): pyproject.toml constraints.txt
	@$(NEW_ENOUGH)
	@$(PYTHON) -m venv .venv-device
	@.venv-device/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e . onnxruntime
	@touch $@
