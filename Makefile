# Everything here builds .venv first if it is missing. PYTHON chooses the interpreter it is made with.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install run test test-all lint format

help:  ## list these commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-10s %s\n", $$1, $$2}'

install: $(INSTALLED)  ## build .venv with the tested versions and the development tools

# torch alone and pinned first: where pip may choose, it takes a CUDA build of several gigabytes
$(INSTALLED): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[tested,dev]'
	touch $@

run: $(INSTALLED)  ## train, evaluate and inspect on the embedded data set
	@rm -rf runs/quickstart
	$(BIN)/bncli train configs/quickstart.yaml --run-dir runs/quickstart
	$(BIN)/bncli eval runs/quickstart/last.pt
	$(BIN)/bncli inspect-stats runs/quickstart/last.pt

test: $(INSTALLED)  ## run the quick tests
	$(BIN)/python -m pytest

test-all: $(INSTALLED)  ## run all tests, slow proofs included
	$(BIN)/python -m pytest -m ''

lint: $(INSTALLED)  ## check style and types
	$(BIN)/ruff check bncli tests
	$(BIN)/ruff format --check bncli tests
	$(BIN)/mypy

format: $(INSTALLED)  ## format the code
	$(BIN)/ruff format bncli tests
	$(BIN)/ruff check --fix bncli tests
