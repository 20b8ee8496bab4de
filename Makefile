# `make demo` and `make test` each work first, on a fresh clone with only python3 and its venv module.
#
#   PYTHON       interpreter that makes .venv
#   VENV_ARGS    for example --system-site-packages, to use the torch that is already installed
#   CONSTRAINTS  pip constraints; set it to /dev/null to take the newest releases
#   PIP_ARGS     more arguments for pip, for example the index of a torch build
#   PYTEST_ARGS  more arguments for pytest
#   BENCH_ARGS   more for the table of other libraries, for example --mib 1024 --directory /on/the/disk
#   PLOTS        where its plots are put
#   WORKERS      tests at a time; one more than two cores have, because many of them wait

PYTHON ?= python3
VENV_ARGS ?=
CONSTRAINTS ?= tests/constraints.txt
PIP_ARGS ?=
PYTEST_ARGS ?=
BENCH_ARGS ?=
PLOTS ?= .bench
WORKERS ?= 3
SOAK_SECONDS ?= 3600

# Hundreds of interpreters start: without bytecode each of them would compile the whole package.
unexport PYTHONDONTWRITEBYTECODE

BIN := .venv/bin
STAMP := .venv/.installed
PEERS := .bench/peers
PEERS_STAMP := $(PEERS)/.installed
STORES_STAMP := .venv/.installed-stores
AZURITE := 3.37.0

.PHONY: demo test collected lint bench stores soak reliability clean

demo: $(STAMP)
	@$(BIN)/ckptmgr demo

# Hundreds of real daemons, kills and process groups on few cores: what fails beside all the others
# is run once more alone, in sight; what fails then has failed.
test: $(STAMP)
	@$(MAKE) --no-print-directory -j 2 lint collected
	@$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(PYTEST_ARGS) \
		|| $(BIN)/python -m pytest --last-failed --last-failed-no-failures none $(PYTEST_ARGS)

# Compiles the tests once, beside the linters, and not once in each worker.
collected: $(STAMP)
	@$(BIN)/python -m pytest --collect-only --quiet --quiet --no-header >/dev/null

lint: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy --strict ckptmgr $(wildcard plugins/*/ckptmgr_*)

# Our own figures, then other libraries beside us (docs/performance.md): a quarter of an hour.
bench: $(STAMP) $(PEERS_STAMP)
	@$(BIN)/ckptmgr bench
	@PYTHONPATH=tests $(BIN)/python -m bench.beside --environment $(PEERS) \
		--json .bench/peers.jsonl --plots $(PLOTS) $(BENCH_ARGS)

# The counts that docs/reliability.md reports; hours, not minutes.
reliability: $(STAMP)
	@CKPTMGR_RELIABILITY=1 $(BIN)/python -m pytest -n 2 -m reliability --timeout 14400 $(PYTEST_ARGS)

# Every store that can be started here, one after the other; docs/stores.md says what came of it.
# What needs root or a Debian package that is missing is skipped, and the page says so.
stores: $(STORES_STAMP)
	@CKPTMGR_STORES=1 PYTHONPATH=$(CURDIR)/tests $(BIN)/python -m pytest -m stores \
		-p stores.report --stores-table docs/stores.md $(PYTEST_ARGS)

soak: $(STAMP)
	@CKPTMGR_SOAK_SECONDS=$(SOAK_SECONDS) $(BIN)/python -m pytest -m soak --timeout 0 $(PYTEST_ARGS)

# A changed pyproject.toml or pin installs again; source changes do not (editable install).
$(STAMP): pyproject.toml $(wildcard plugins/*/pyproject.toml) tests/constraints.txt
	$(PYTHON) -m venv $(VENV_ARGS) .venv
	$(BIN)/python -m pip install --quiet --no-compile $(PIP_ARGS) -c $(CONSTRAINTS) -e ".[torch,dev]" \
		$(addprefix -e ,$(wildcard plugins/*))
	@touch $@

# Never in .venv: they are no dependencies of ours, and theirs must not become ours unseen.
$(PEERS_STAMP): $(addprefix tests/bench/beside/,constraints.txt environment.py roster.py)
	PYTHONPATH=tests $(PYTHON) -m bench.beside.environment $(PEERS) $(PIP_ARGS)
	@touch $@

# Azurite is the one server that comes from npm; without npm its tests skip.
$(STORES_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c $(CONSTRAINTS) -e ".[stores]"
	npm install --silent --no-fund --no-audit --prefix .venv/node azurite@$(AZURITE) \
		|| echo "npm failed; tests that need Azurite will skip" >&2
	@touch $@

clean:
	rm -rf .venv .bench .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
	find ckptmgr plugins tests -name __pycache__ -type d -prune -exec rm -rf {} +
