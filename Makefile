# Everything runs in .venv, which is made on first use from python3 and the package index.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: quickstart test style check clean

$(BIN)/.installed: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

quickstart: $(BIN)/.installed  ## train, sample under budgets and compare, on text that is already installed
	$(BIN)/python recipes/quickstart.py

test: $(BIN)/.installed  ## lint and tests
	$(MAKE) check
	$(BIN)/python -m pytest -n 2 --dist loadfile tests

check: $(BIN)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

style: $(BIN)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info
