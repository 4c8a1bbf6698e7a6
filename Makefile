# Everything here builds .venv first if it is missing. PYTHON chooses the interpreter it is made with.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
RUN_DIR := runs/quickstart-$(shell date +%Y%m%d-%H%M%S)
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install run test test-all lint format bench-accuracy bench-inspection bench-population bench-scale

help:  ## list these commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-16s %s\n", $$1, $$2}'

install: $(INSTALLED)  ## build .venv with the tested versions and the development tools

# the extra `tested` pins torch: left to choose, pip may take a CUDA build of several gigabytes
$(INSTALLED): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[tested,dev]'
	touch $@

run: $(INSTALLED)  ## train, evaluate and inspect on the embedded data set
	$(BIN)/bncli train configs/quickstart.yaml --run-dir $(RUN_DIR)
	$(BIN)/bncli eval $(RUN_DIR)/last.pt
	$(BIN)/bncli inspect-stats $(RUN_DIR)/last.pt

test: $(INSTALLED)  ## run the quick tests
	$(BIN)/python -m pytest -n logical --maxprocesses 4

test-all: $(INSTALLED)  ## run all tests, slow proofs included
	$(BIN)/python -m pytest -m ''

lint: $(INSTALLED)  ## check style and types
	$(BIN)/ruff check bncli tests
	$(BIN)/ruff format --check bncli tests
	$(BIN)/mypy

format: $(INSTALLED)  ## format the code
	$(BIN)/ruff format bncli tests
	$(BIN)/ruff check --fix bncli tests

# options go into ARGS: make bench-population ARGS="--network resnet50"; ARGS=--help lists them
bench-accuracy: $(INSTALLED)  ## time bncli train to an accuracy; ARGS="CONFIG --target 0.9"
	@$(BIN)/python -m tests.benchmarks.accuracy $(ARGS)

bench-inspection: $(INSTALLED)  ## time bncli inspect-stats on large files
	@$(BIN)/python -m tests.benchmarks.inspection $(ARGS)

bench-population: $(INSTALLED)  ## compare population statistics with fvcore's and update_bn's
	@$(BIN)/python -m tests.benchmarks.population $(ARGS)

bench-scale: $(INSTALLED)  ## measure speed by size of the data, peak memory and start; ARGS="CONFIG"
	@$(BIN)/python -m tests.benchmarks.scale $(ARGS)
