# Two commands set everything up by themselves: `make demo` runs the main job, `make test` the tests.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt

.PHONY: demo test install lint clean

demo: $(VENV)/.installed
	$(BIN)/cotbal demo

test: $(VENV)/.developed
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

install: $(VENV)/.developed

# torch comes first and alone: deepspeed's build imports it, and nothing later may pick another one.
$(VENV)/.installed: pyproject.toml setup.py constraints.txt requirements-demo.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch setuptools
	$(PIP) -e ".[trainer]"
	$(PIP) --no-deps -r requirements-demo.txt
	touch $@

$(VENV)/.developed: $(VENV)/.installed
	$(PIP) -e ".[trainer,dev]"
	touch $@

lint: $(VENV)/.developed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info
