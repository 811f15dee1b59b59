# Everything runs in .venv, which is made on first use from python3 and the package index.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTRAS := $(VENV)/extras

.PHONY: docs quickstart test test-distributed test-extras test-demo test-wheel style check clean

$(BIN)/.installed: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

quickstart: $(BIN)/.installed  ## train, sample under budgets and compare, on text that is already installed
	$(BIN)/python recipes/quickstart.py

test: $(BIN)/.installed  ## lint and tests
	$(MAKE) check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile tests  # the workers share the cores

# DeepSpeed, Triton, the image networks and what reports stand apart, in an environment that also sees .venv: they are
# large, and DeepSpeed slows every start and writes to the output.
$(EXTRAS)/.installed: $(BIN)/.installed
	$(PYTHON) -m venv $(EXTRAS)
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" > \
		$$($(EXTRAS)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/venv.pth
	$(EXTRAS)/bin/python -m pip install --quiet -c constraints.txt -e '.[distributed,images-proxy,liger]' \
		tensorboard wandb
	touch $@

test-distributed: $(EXTRAS)/.installed  ## two processes under DDP, ZeRO-1, 2, 3 and FSDP2 against one
	$(EXTRAS)/bin/python -m pytest -m 'not slow' tests/trainers/test_distributed.py

test-extras: $(EXTRAS)/.installed  ## what needs optional packages; Liger's kernel is interpreted, without a GPU
	TRITON_INTERPRET=1 $(EXTRAS)/bin/python -m pytest tests/models/test_head.py tests/evaluation/test_image_metrics.py \
		tests/trainers/test_reports.py

# Gradio stands apart as well: it wants an older Pillow than the one that the tests of pictures ran with.
test-demo: $(BIN)/.installed  ## the demonstration; with Chromium and its driver (playwright), in a browser too
	$(PYTHON) -m venv $(VENV)/demo
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" > \
		$$($(VENV)/demo/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/venv.pth
	sed /^pillow/d constraints.txt > $(VENV)/demo/constraints.txt
	$(VENV)/demo/bin/python -m pip install --quiet -c $(VENV)/demo/constraints.txt -e '.[demo]' playwright
	OMP_NUM_THREADS=1 $(VENV)/demo/bin/python -m pytest tests/test_demo.py

test-wheel:  ## sdist and wheel, and the wheel with each extra in an empty environment
	PYTHON=$(PYTHON) .ci/wheel

docs: $(BIN)/.installed  ## the site, in site/; a warning or a broken link ends it
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

check: $(BIN)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

style: $(BIN)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist site *.egg-info
