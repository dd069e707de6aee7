# Everything runs in .venv, which the first command makes from constraints.txt; later calls do not reinstall.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
export RAY_worker_niceness ?= 0

.PHONY: demo test test-unit test-all lint embedded-model

demo: $(INSTALLED)
	$(BIN)/raydiff train jobs/recipes/emoji_draft_lv.toml

test: $(INSTALLED)
	$(BIN)/pytest -m "not slow and not gpu"

test-unit: $(INSTALLED)
	$(BIN)/pytest -m "not slow and not gpu and not ray"

test-all: $(INSTALLED)
	$(BIN)/pytest

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,jobs,rewards]"
	touch $@
