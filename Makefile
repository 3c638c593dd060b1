# Each target sets up what it needs by itself (see requirements/install.py) and then runs.
# It starts from PYTHON=..., else from the active environment, else from python3.11 or python3.

START = $(or $(PYTHON),$(if $(VIRTUAL_ENV),$(VIRTUAL_ENV)/bin/python),$(if $(CONDA_PREFIX),$(CONDA_PREFIX)/bin/python),$(shell \
	for python in python3.11 python3; do $$python -c '' 2>/dev/null && echo $$python && break; done),python3)
WITH = @"$(START)" requirements/install.py

.DEFAULT_GOAL := help
.PHONY: help demo demo-det demo-inst demo-seg test test-slow test-original docs lint format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

demo: ## prune a small classifier from start to end (a few minutes, CPU; set-up about 3 minutes once)
	$(WITH) demo tools/demo.py $(ARGS)

docs: export NO_MKDOCS_2_WARNING = 1 # a notice of the theme's about its successor

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

# What OpenMMLab's original packages can run without compiled ops: docs/reliability.md.
ORIGINAL = .venv-original
CORE = $(wildcard tests/functional $(addprefix tests/test_,$(addsuffix .py,\
	blocks budget importance latency masking packed plans shrink report)) \
	$(addprefix tests/engine/test_,$(addsuffix .py,\
	config distributed faults launchers model optim_wrapper pruning_hook random_state resume runner)))

test-original: $(ORIGINAL)/complete ## run the tests' core with the original packages (set-up about 2 minutes once)
	@PYTHONPATH=. CUDA_VISIBLE_DEVICES= $(ORIGINAL)/bin/python -m pytest -W default --disable-warnings $(CORE) $(ARGS)

$(ORIGINAL)/complete: requirements/original.txt requirements/constraints.txt
	@"$(START)" -c 'import sys; sys.exit("torch 2.1 wants Python 3.10 or 3.11: make test-original PYTHON=python3.11" if not (3, 10) <= sys.version_info[:2] <= (3, 11) else 0)'
	@"$(START)" -m venv --clear $(ORIGINAL)
	@$(ORIGINAL)/bin/python -m pip install --quiet --disable-pip-version-check -c requirements/constraints.txt -r requirements/original.txt
	@$(ORIGINAL)/bin/python -m pip uninstall --quiet --yes opencv-python opencv-python-headless  # they share their files
	@$(ORIGINAL)/bin/python -m pip install --quiet --no-deps --disable-pip-version-check opencv-python-headless==4.11.0.86
	@touch $@

# Not --quiet: warnings that are not shown are not counted as errors either.
docs: ## build the documentation into site/; a warning, or a link that leads nowhere, is an error
	$(WITH) docs -m mkdocs build

lint: ## check style and format
	$(WITH) lint -m ruff check .
	$(WITH) lint -m ruff format --check .

format: ## mend style and format
	$(WITH) lint -m ruff check --fix .
	$(WITH) lint -m ruff format .

clean: ## remove .venv and all that was built or cached in this folder; the cache of built wheels stays
	@if [ -e .venv ] && [ ! -e .venv/mmsmart-setup.json ]; then echo 'left alone: .venv, not made by make'; else rm -rf .venv; fi
	@rm -rf $(ORIGINAL) build dist site *.egg-info mmsmart/.mim .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
