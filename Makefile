# Two commands set everything up by themselves: `make demo` runs the main job, `make test` the tests.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
comma := ,
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt

.PHONY: demo test install lint clean

demo: $(VENV)/.installed
	$(BIN)/cotbal demo

test: $(VENV)/.developed
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

install: $(VENV)/.developed

# torch comes first and alone: deepspeed's build imports it, and nothing later may pick another one.
NEEDS := pyproject.toml setup.py constraints.txt requirements-demo.txt
define install
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch setuptools
	$(PIP) -e ".[$(1)]"
	$(PIP) --no-deps -r requirements-demo.txt
endef

$(VENV)/.installed: $(NEEDS)
	$(call install,trainer)
	touch $@

$(VENV)/.developed: $(NEEDS)
	$(call install,trainer$(comma)dev)
	touch $(VENV)/.installed $@

lint: $(VENV)/.developed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info
