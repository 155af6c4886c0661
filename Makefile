# `make demo` and `make test` do all set-up themselves; `make` alone lists what there is.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready

help:
	@echo "make demo    set up, then grow a forest from the bundled corpus (about 10 minutes on two cores)"
	@echo "make quick   the same in about one minute, too short to show a gain"
	@echo "make test    set up, then lint, types and tests"
	@echo "make docs    write docs/commands.md from the code"
	@echo "make format  rewrite the code in the house style"

demo: $(READY)
	$(BIN)/elmwood demo

quick: $(READY)
	$(BIN)/elmwood demo --quick

test: lint
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy elmwood

docs: $(READY)
	$(BIN)/python -m typer elmwood.cli utils docs --name elmwood --output docs/commands.md

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# torch first and pinned: where the package index offers a CPU build, that one is taken, and CUDA stays out.
$(READY): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --editable '.[dev]'
	@touch $@

.PHONY: help demo quick test lint docs format
