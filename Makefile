# make          what every change passes: lint, types, tests, 20 s of fuzzing
# make test     the tests alone; sets up everything on a fresh machine
# make demo     what hive does, in ten seconds; KEEP=1 leaves it running, to play with;
#               LIVE=1 shows three nodes at work, and one in trouble
# make test-agents     against real Claude Code, Codex, Gemini CLI and OpenCode, from npm (1.5 GB, 70 s)
# make test-openclaw   against a real OpenClaw, installed from npm into .cache/ (790 MB, 90 s)
# make test-web  the page in a real Chromium, with axe-core from npm, and a real Prometheus
#               (Debian's packages, as root)
# make dist     dist/hive: one file with paho-mqtt inside, for machines where nothing is installed;
#               and a wheel, for pip and pipx
# make fuzz     mutated traffic against the embedded broker, for SECONDS=3600 (20 of it in check)
# make brokers  the end-to-end tests on NATS, one and a cluster, RabbitMQ, aedes and amqtt, as a table
# make bench    how long things take, beside their peers, in one run
# make bench-journal  the same for messages a second, and for send
# make bench-fleet  what 10, 100 and 1000 nodes cost, and how soon a death is noticed, beside Serf;
#               SCENARIO=60: 500 nodes through an hour of trouble, and who is wrongly told of
# make bench-members  the memory of a daemon that knows up to 10,000 others
# make mutants  how tight the tests are: which of N=150 small mistakes in hive.py they find
# make faults   what survives which fault, counted, as a table
# make bench-broker   what the embedded broker does, beside Mosquitto
# make install  hive and hive-cli into ~/.local/bin, a unit, ~/.config/hive; START=1 starts it.
#               PREFIX=/usr/local, as root: for the whole machine.  DESTDIR=... for packages.
#
# Needs Python 3.11 or newer with venv, and git.  Everything else goes into .venv/, except
# Mosquitto, Dovecot and the checkers of the units, which come from the system's package manager
# where that is allowed (root, or Homebrew); without them the tests that need them are skipped,
# and fail where CI is set.

PYTHON ?= python3
VENV   := .venv
python := $(VENV)/bin/python

OPENCLAW := .cache/openclaw
AXE     := .cache/axe
AGENTS := .cache/agents
PROGRAMS := node@26.10.0 @anthropic-ai/claude-code@2.1.332 @openai/codex@0.169.0 \
            @google/gemini-cli@0.61.0 opencode-ai@1.18.33 @modelcontextprotocol/inspector@0.15.0
RUNTIME := 'paho-mqtt>=2,<3'
TOOLS   := pytest==9.2.0 pytest-timeout==2.4.0 pytest-xdist==3.8.0 hypothesis==6.170.15 ruff==0.17.6 mypy==2.4.1 \
           radicale==3.9.0 icalendar==7.3.2 recurring-ical-events==3.8.2 hatchling==1.33.0 \
           prometheus_client==0.26.0 'grafana-foundation-sdk==1769699998!10.1.0' pyte==0.8.2 mcp==2.3.0 playwright==1.65.2

SCRIPTS := contrib/handlers/git-sync contrib/handlers/health-check contrib/handlers/hive-upgrade contrib/dist.py contrib/demo.py contrib/man.py \
           contrib/handlers/sentinel.py contrib/handlers/check-email contrib/handlers/check-calendar \
           contrib/handlers/check-url contrib/pip/hatch_build.py
SOURCES := hive.py tests $(SCRIPTS)

check: lint types test fuzz-check  ## what every change passes

lint: $(VENV)/tools
	$(VENV)/bin/ruff check --quiet --line-length 100 --select E,F,I,B,UP,SIM,RUF --ignore RUF009 $(SOURCES)
	$(VENV)/bin/ruff format --quiet --line-length 100 --check $(SOURCES)

types: $(VENV)/tools
	$(VENV)/bin/mypy --strict hive.py tests
	$(foreach script,$(SCRIPTS),MYPYPATH=contrib/handlers $(VENV)/bin/mypy --strict $(script) &&) true

test: $(VENV)/tools mosquitto dovecot checkers
	$(python) -m pytest -q -rs -n 4 --dist worksteal --timeout 120 tests

demo: $(VENV)/ready
	@$(python) contrib/demo.py $(if $(KEEP),--keep) $(if $(LIVE),--live)

pictures: $(VENV)/tools chromium  ## the README's, of the page of such a live demo
	$(python) contrib/demo.py --live --pictures contrib/pictures

test-openclaw: $(VENV)/tools mosquitto dovecot $(OPENCLAW)/ready
	OPENCLAW_BIN=$(abspath $(OPENCLAW))/node_modules/.bin \
	  $(python) -m pytest -q --timeout 300 tests/real_openclaw.py

test-web: $(VENV)/tools mosquitto chromium prometheus $(AXE)/ready
	$(python) -m pytest -q -rs -s --timeout 120 tests/web_page.py

test-agents: $(VENV)/tools mosquitto tmux $(AGENTS)/ready
	AGENTS_BIN=$(abspath $(AGENTS))/node_modules/.bin \
	  $(python) -m pytest -q -rs --timeout 300 tests/real_agents.py tests/real_agents_via.py

bench-openclaw: $(VENV)/tools mosquitto $(OPENCLAW)/ready
	OPENCLAW_BIN=$(abspath $(OPENCLAW))/node_modules/.bin $(python) tests/bench_openclaw.py

# Not a file: what comes from there is.
npm:
	@command -v npm >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq npm >/dev/null; } || \
	  { echo "npm is missing (apt-get install npm): the real programs come from there"; exit 1; }

$(AXE)/ready: | npm
	@mkdir -p $(AXE) && echo '{"private": true}' >$(AXE)/package.json
	cd $(AXE) && npm install --loglevel=error --no-fund --no-audit axe-core@4.14.1
	@touch $@

$(AGENTS)/ready: | npm
	@mkdir -p $(AGENTS) && echo '{"private": true}' >$(AGENTS)/package.json
	cd $(AGENTS) && for try in 1 2 3; do \
	  npm install --loglevel=error --no-fund --no-audit $(PROGRAMS) && break; sleep 5; done
	for name in claude codex gemini opencode mcp-inspector; do \
	  test -e $(AGENTS)/node_modules/.bin/$$name || exit 1; done
	@touch $@

# A terminal for the programs that are to be woken in one.
tmux:
	@command -v tmux >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq tmux >/dev/null; } || \
	  echo "tmux is missing: what needs a terminal will be skipped (apt-get install tmux)"

$(OPENCLAW)/ready: | npm
	@mkdir -p $(OPENCLAW) && echo '{"private": true}' >$(OPENCLAW)/package.json
	cd $(OPENCLAW) && PATH="$$PWD/node_modules/.bin:$$PATH" && \
	for package in node@26.10.0 openclaw@2026.9.6; do \
	  for try in 1 2 3; do npm install --loglevel=error --no-fund --no-audit $$package && break; sleep 5; done; \
	done
	test -x $(OPENCLAW)/node_modules/.bin/openclaw && test -x $(OPENCLAW)/node_modules/.bin/node
	@touch $@

install uninstall:  ## see contrib/install.sh
	@PYTHON='$(PYTHON)' PAHO=$(RUNTIME) sh contrib/install.sh $@

dist: $(VENV)/ready  ## then: scp dist/hive node: && ssh node python3 hive daemon
	$(python) contrib/dist.py
	$(python) -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist ./contrib/pip
	@ls dist/*.whl

bench: $(VENV)/tools mosquitto  ## RUNS=7, beside commit BASE=8360744
	$(python) tests/bench.py $(or $(RUNS),7) $(BASE)

bench-fleet: $(VENV)/tools mosquitto serf  ## Linux only; NODES=10,100; SCENARIO=60, minutes of trouble
	$(python) tests/bench_fleet.py $(if $(NODES),--nodes $(NODES)) \
	  $(if $(SCENARIO),--scenario $(SCENARIO),--plot contrib/pictures/fleet.svg)

bench-members: $(VENV)/tools mosquitto  ## Linux only
	$(python) tests/bench_members.py

bench-broker: $(VENV)/tools mosquitto
	$(python) tests/bench_broker.py

fuzz-check: $(VENV)/tools  ## twenty seconds with a fixed seed
	$(python) tests/fuzz_broker.py --seconds 20 --seed 1

SECONDS ?= 3600
fuzz: $(VENV)/tools  ## another seed each time; SEED=... to choose it
	$(python) tests/fuzz_broker.py --seconds $(SECONDS) --seed $(or $(SEED),$$(date +%s))

faults: $(VENV)/tools mosquitto  ## what survives which fault, as a table
	HIVE_FAULTS_TABLE=- HIVE_FAULTS_COUNT=$(or $(HIVE_FAULTS_COUNT),1000) \
	  $(python) -m pytest -q --timeout 150 tests/test_faults.py

brokers: $(VENV)/tools mosquitto  ## BROKERS="nats amqtt" for some of them
	$(python) tests/brokers.py $(BROKERS)

mutants: $(VENV)/tools mosquitto  ## takes hours, goes on where it stopped; SECTIONS=Broker,Loop
	$(python) tests/mutants.py --count $(or $(N),150) --seed $(or $(SEED),1) \
	  --jobs $(or $(JOBS),2) --sections '$(SECTIONS)' $(if $(AGAIN),--again)

bench-journal: $(VENV)/tools mosquitto
	$(python) tests/bench_journal.py

venv: $(VENV)/ready  ## a virtual environment with paho-mqtt; then: . .venv/bin/activate

$(VENV)/ready: Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "hive needs Python 3.11 or newer, this is $$($(PYTHON) --version 2>&1); install one and say: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "Python's venv module is missing; on Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	$(python) -m pip install --quiet --disable-pip-version-check $(RUNTIME)
	@for name in hive hive-cli; do ln -sf ../../hive-cli $(VENV)/bin/$$name; done
	@touch $@

# What tests and checks need besides.
$(VENV)/tools: $(VENV)/ready
	$(python) -m pip install --quiet --disable-pip-version-check $(TOOLS)
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

# What has the same purpose, to be measured beside hive.
serf:
	@command -v serf >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
	  apt-get update -qq && RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get install -y -qq serf >/dev/null; } || \
	  echo "Serf is missing: hive is measured alone (apt-get install serf)"

# A browser for the page; without what it recommends, which is a desktop.
chromium:
	@if command -v chromium >/dev/null || command -v chromium-browser >/dev/null; then :; \
	elif command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
	  echo "installing Chromium with apt-get"; \
	  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
	    apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core; } >/dev/null || true; \
	else echo "Chromium is missing: the page is not looked at (apt-get install chromium)"; fi

# It reads what is served for it; 48 MB, without a console of its own.
prometheus:
	@command -v prometheus >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
	  apt-get update -qq && RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive \
	  apt-get install -y -qq --no-install-recommends prometheus >/dev/null; } || \
	  echo "prometheus is missing: nobody reads the numbers (apt-get install prometheus)"

# A mail server for check-email, which each test starts for itself.
dovecot:
	@PATH="$$PATH:/usr/sbin:/usr/local/sbin:/opt/homebrew/sbin"; \
	if command -v dovecot >/dev/null; then :; \
	elif command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
	  echo "installing Dovecot with apt-get"; \
	  { apt-get update -qq && RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive \
	    apt-get install -y -qq --no-install-recommends dovecot-imapd; } >/dev/null || true; \
	else echo "Dovecot is missing: tests of check-email will be skipped (apt-get install dovecot-imapd)"; fi

# systemd-analyze and plistutil for tests/test_units.py, openssl, pgrep, groff, mandoc, shells that
# complete; ip for three machines.
checkers:
	@missing=; \
	command -v systemd-analyze >/dev/null || missing="systemd"; \
	command -v openssl >/dev/null || missing="$$missing openssl"; \
	command -v pgrep >/dev/null || missing="$$missing procps"; \
	command -v groff >/dev/null || missing="$$missing groff-base"; \
	for one in mandoc zsh fish; do command -v $$one >/dev/null || missing="$$missing $$one"; done; \
	[ "$$(uname)" != Linux ] || command -v ip >/dev/null || missing="$$missing iproute2"; \
	command -v plutil >/dev/null || command -v plistutil >/dev/null || missing="$$missing libplist-utils"; \
	if [ -z "$$missing" ] || ! command -v apt-get >/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ]; then \
	  echo "installing with apt-get: $$missing"; \
	  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
	    apt-get install -y -qq --no-install-recommends $$missing; } >/dev/null || true; \
	else echo "some tests of the units will be skipped (apt-get install $$missing)"; fi

clean:  ## remove what make has made
	rm -rf $(VENV) dist .cache .hypothesis .mypy_cache .pytest_cache .ruff_cache __pycache__ tests/__pycache__

.PHONY: check lint types test test-openclaw bench-openclaw install uninstall demo dist bench \
  bench-broker bench-fleet bench-journal bench-members brokers faults mutants fuzz fuzz-check venv mosquitto dovecot checkers clean \
  test-web pictures chromium prometheus test-agents tmux npm serf
