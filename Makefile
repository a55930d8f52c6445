# make          what every change passes: lint, types, tests
# make test     the tests alone; sets up everything on a fresh machine
# make bench    how long things take, beside their peers, in one run
#
# Needs Python 3.11 or newer with venv, and git.  Everything else goes into .venv/, except
# Mosquitto, which comes from the system's package manager where that is allowed (root, or
# Homebrew); without it the tests that need a broker are skipped, and fail where CI is set.

PYTHON ?= python3
VENV   := .venv
python := $(VENV)/bin/python

RUNTIME := 'paho-mqtt>=2,<3'
TOOLS   := pytest==9.2.0 pytest-timeout==2.4.0 hypothesis==6.170.15 ruff==0.17.6 mypy==2.4.1

check: lint types test  ## what every change passes

lint: $(VENV)/ready
	$(VENV)/bin/ruff check --quiet --line-length 100 --select E,F,I,B,UP,SIM,RUF --ignore RUF009 hive.py tests
	$(VENV)/bin/ruff format --quiet --line-length 100 --check hive.py tests

types: $(VENV)/ready
	$(VENV)/bin/mypy --strict hive.py tests

test: $(VENV)/ready mosquitto
	$(python) -m pytest -q --timeout 120 tests

bench: $(VENV)/ready mosquitto
	$(python) tests/bench.py

venv: $(VENV)/ready  ## a virtual environment with paho-mqtt; then: . .venv/bin/activate

$(VENV)/ready: Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "hive needs Python 3.11 or newer, this is $$($(PYTHON) --version 2>&1); install one and say: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "Python's venv module is missing; on Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(python) -m pip install --quiet --disable-pip-version-check $(RUNTIME) $(TOOLS)
	@touch $@

# RUNLEVEL=1 keeps Debian's package from starting a broker of its own.
mosquitto:
	@PATH="$$PATH:/usr/sbin:/usr/local/sbin:/opt/homebrew/sbin"; \
	if command -v mosquitto >/dev/null && command -v mosquitto_pub >/dev/null; then :; \
	elif command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
	  echo "installing Mosquitto with apt-get"; \
	  { apt-get update -qq && RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive \
	    apt-get install -y -qq mosquitto mosquitto-clients; } >/dev/null || true; \
	elif command -v brew >/dev/null; then \
	  echo "installing Mosquitto with Homebrew"; brew install --quiet mosquitto >/dev/null || true; \
	else echo "Mosquitto is missing: tests that need a broker will be skipped (apt-get install mosquitto)"; fi

clean:  ## remove what make has made
	rm -rf $(VENV) .cache .hypothesis .mypy_cache .pytest_cache .ruff_cache __pycache__ tests/__pycache__

.PHONY: check lint types test bench venv mosquitto clean
