# `make check` is what CI runs. PYTHON may name another interpreter: make check PYTHON=.venv/bin/python
PYTHON ?= $(if $(wildcard .venv/bin/python),.venv/bin/python,python3)

.PHONY: check lint layers test slow types format networks benchmarks

check: lint layers test

lint:
	$(PYTHON) -m ruff check .

layers:
	$(PYTHON) -m pytest tests/test_layers.py

test:
	$(PYTHON) -m pytest

slow:
	$(PYTHON) -m pytest -m slow --timeout 1200

types:
	$(PYTHON) -m pyright --pythonpath $(shell command -v $(PYTHON))

format:
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

networks:
	$(PYTHON) -m benchmarks.networks > docs/networks.md.new && mv docs/networks.md.new docs/networks.md

benchmarks:
	$(PYTHON) -m benchmarks.cutting
	$(PYTHON) -m benchmarks.step
	$(PYTHON) -m benchmarks.fusing
	$(PYTHON) -m benchmarks.masked_vs_cut
	$(PYTHON) -m benchmarks.episode
