# Each target sets up what it needs by itself (see requirements/install.py) and then runs.
# It starts from PYTHON=..., else from the active environment, else from python3.11 or python3.

START = $(or $(PYTHON),$(if $(VIRTUAL_ENV),$(VIRTUAL_ENV)/bin/python),$(if $(CONDA_PREFIX),$(CONDA_PREFIX)/bin/python),$(shell \
	for python in python3.11 python3; do $$python -c '' 2>/dev/null && echo $$python && break; done),python3)
WITH = @"$(START)" requirements/install.py

.DEFAULT_GOAL := help
.PHONY: help demo demo-det demo-inst demo-seg test test-slow lint format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

demo: ## prune a small classifier from start to end (a few minutes, CPU; set-up about 3 minutes once)
	$(WITH) demo tools/demo.py $(ARGS)

# mmcv's ops are compiled for the CPU; with a GPU in sight MMEngine would move detectors onto it.
demo-det demo-inst test test-slow: export CUDA_VISIBLE_DEVICES ?=

demo-det: ## the same for a detector, YOLOX (set-up compiles mmcv's ops, about 15 minutes once)
	$(WITH) demo-det tools/demo.py det $(ARGS)

demo-inst: ## the same for instance segmentation, Mask R-CNN (set-up as for demo-det)
	$(WITH) demo-det tools/demo.py inst $(ARGS)

demo-seg: ## the same for semantic segmentation, DeepLabV3+ (set-up as for demo)
	$(WITH) demo-seg tools/demo.py seg $(ARGS)

test: ## run the tests and the examples in docstrings; ARGS='-k name' for some of them
	$(WITH) test -m pytest $(ARGS)

test-slow: ## run the tests that are too slow for every day
	$(WITH) test -m pytest -m slow $(ARGS)

lint: ## check style and format
	$(WITH) lint -m ruff check .
	$(WITH) lint -m ruff format --check .

format: ## mend style and format
	$(WITH) lint -m ruff check --fix .
	$(WITH) lint -m ruff format .

clean: ## remove .venv and all that was built or cached in this folder; the cache of built wheels stays
	@if [ -e .venv ] && [ ! -e .venv/mmsmart-setup.json ]; then echo 'left alone: .venv, not made by make'; else rm -rf .venv; fi
	@rm -rf build dist *.egg-info mmsmart/.mim .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
