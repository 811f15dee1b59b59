# Everything runs in .venv, which is made on first use from python3 and the package index.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DISTRIBUTED := $(VENV)/distributed

.PHONY: quickstart test test-distributed style check clean

$(BIN)/.installed: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

quickstart: $(BIN)/.installed  ## train, sample under budgets and compare, on text that is already installed
	$(BIN)/python recipes/quickstart.py

test: $(BIN)/.installed  ## lint and tests
	$(MAKE) check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile tests  # the workers share the cores

# DeepSpeed stands apart, in an environment that also sees .venv: it slows every start and writes to the output.
$(DISTRIBUTED)/.installed: $(BIN)/.installed
	$(PYTHON) -m venv $(DISTRIBUTED)
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" > \
		$$($(DISTRIBUTED)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/venv.pth
	$(DISTRIBUTED)/bin/python -m pip install --quiet -c constraints.txt -e '.[distributed]'
	touch $@

test-distributed: $(DISTRIBUTED)/.installed  ## two processes under DDP, ZeRO-1, 2, 3 and FSDP2 against one
	$(DISTRIBUTED)/bin/python -m pytest -m 'not slow' tests/trainers/test_distributed.py

check: $(BIN)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

style: $(BIN)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info
