# Everything here builds .venv first if it is missing: with the first Python on PATH that is new enough, or
# with the one that PYTHON names. `make run` installs what running needs, the others the development tools too.
usable = $(shell for one in $(1); do \
	"$$one" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$one" && break; done)
NAMES := python3 python3.14 python3.13 python3.12 python3.11
PYTHON ?= $(call usable,$(NAMES))
VENV := .venv
BIN := $(VENV)/bin
RUN_DIR := runs/quickstart-$(shell date +%Y%m%d-%H%M%S)
RUNNING := $(VENV)/.installed-tested
DEVELOPING := $(VENV)/.installed-tested-dev
# the extra `tested` pins torch: left to choose, pip may take a CUDA build of several gigabytes
PIP_INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:  # no half-made .venv
.NOTPARALLEL:  # one pip at a time
.PHONY: help install run test test-all lint format bench-accuracy bench-exact bench-export bench-inspection bench-loading bench-population bench-processes bench-ranks bench-report bench-scale bench-step bench-streamed

help:  ## list these commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-16s %s\n", $$1, $$2}'

install: $(DEVELOPING)  ## build .venv with the tested versions and the development tools

# first the links to a Python that is gone
$(BIN)/python:
	rm -f $@*
	"$(or $(call usable,"$(PYTHON)"),$(error Python 3.11 or newer with venv is needed; \
	not found as $(or $(PYTHON),$(NAMES)). Install it (Debian, Ubuntu: apt install python3-venv), \
	or say where it is: make PYTHON=/path/to/python3))" -m venv $(VENV)

$(RUNNING): pyproject.toml $(BIN)/python
	$(PIP_INSTALL) '.[tested,report]'
	touch $@

$(DEVELOPING): pyproject.toml $(BIN)/python
	$(PIP_INSTALL) '.[tested,dev]'
	touch $(RUNNING) $@

run: $(RUNNING)  ## train, evaluate and inspect on the embedded data set
	$(BIN)/bncli train quickstart --run-dir $(RUN_DIR)
	$(BIN)/bncli eval $(RUN_DIR)/last.pt
	$(BIN)/bncli inspect-stats $(RUN_DIR)/last.pt
	$(BIN)/bncli report $(RUN_DIR) --measure

test: $(DEVELOPING)  ## run the quick tests
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal

test-all: $(DEVELOPING)  ## run all tests, slow proofs included
	$(BIN)/python -m pytest -m ''

lint: $(DEVELOPING)  ## check style and types
	$(BIN)/ruff check bncli tests
	$(BIN)/ruff format --check bncli tests
	$(BIN)/mypy

format: $(DEVELOPING)  ## format the code
	$(BIN)/ruff format bncli tests
	$(BIN)/ruff check --fix bncli tests

# options go into ARGS: make bench-population ARGS="--network resnet50"; ARGS=--help lists them
bench-accuracy: $(DEVELOPING)  ## time bncli train to an accuracy; ARGS="CONFIG --target 0.9"
	@$(BIN)/python -m tests.benchmarks.accuracy $(ARGS)

bench-exact: $(DEVELOPING)  ## time recalibration by the method exact
	@$(BIN)/python -m tests.benchmarks.exact $(ARGS)

bench-export: $(DEVELOPING)  ## time bncli predict with a checkpoint and its exports; ARGS="CHECKPOINT"
	@$(BIN)/python -m tests.benchmarks.export $(ARGS)

bench-inspection: $(DEVELOPING)  ## time bncli inspect-stats on large files
	@$(BIN)/python -m tests.benchmarks.inspection $(ARGS)

bench-loading: $(DEVELOPING)  ## time bncli's loading of a checkpoint beside PyTorch's
	@$(BIN)/python -m tests.benchmarks.loading $(ARGS)

bench-population: $(DEVELOPING)  ## compare population statistics with fvcore's and update_bn's
	@$(BIN)/python -m tests.benchmarks.population $(ARGS)

bench-processes: $(DEVELOPING)  ## time training in several processes; ARGS="CONFIG --processes 2"
	@$(BIN)/python -m tests.benchmarks.processes $(ARGS)

bench-ranks: $(DEVELOPING)  ## time population statistics by two processes against one
	@$(BIN)/python -m tests.benchmarks.ranks $(ARGS)

bench-report: $(DEVELOPING)  ## time bncli report on 10,000 layers, and the browser opening it
	@$(BIN)/python -m tests.benchmarks.report $(ARGS)

bench-scale: $(DEVELOPING)  ## measure speed by size of the data, peak memory and start; ARGS="CONFIG"
	@$(BIN)/python -m tests.benchmarks.scale $(ARGS)

bench-step: $(DEVELOPING)  ## compare the training step with that of an earlier commit; ARGS="speedrun --data-root data"
	@$(BIN)/python -m tests.benchmarks.step $(ARGS)

bench-streamed: $(DEVELOPING)  ## time recalibration from an image folder, and measure its memory
	@$(BIN)/python -m tests.benchmarks.streamed $(ARGS)
