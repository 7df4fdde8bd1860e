# make demo    the main job on this machine, with numbers      make test    every test
# Both install what is missing first (see scripts/setup); the second time that does nothing.

CARGO ?= cargo

.PHONY: demo test setup bench differential drivers torture catalogue mutants versions kill-phases restore soak namespaces simulate fuzz check

demo: setup
	$(CARGO) run --locked --quiet -- demo

# Same profile as the demo, so that nothing is built twice.
test: setup
	scripts/setup test
	@if $(CARGO) nextest --version >/dev/null 2>&1; then \
		$(CARGO) nextest run --locked --workspace; \
	else \
		$(CARGO) test --locked --workspace -- --test-threads=2; \
	fi

# Release build; TMPDIR=/dev/shm keeps the servers on tmpfs. Options: docs/benchmarks.md
BENCH ?= cutover proxy seeding
bench: setup
	$(foreach name,$(BENCH),$(CARGO) bench --locked --bench $(name) -- $(BENCH_ARGS) &&) true

# Scripts of a folder on a lone server and through the proxy: docs/differential.md
differential: setup
	@test -n "$(DIR)" || { echo 'which folder? make differential DIR=tests/differential' >&2; exit 2; }
	PGTANDEM_SCRIPTS="$(abspath $(DIR))" PGTANDEM_SCRIPTS_ONLY="$(ONLY)" \
		$(CARGO) test --locked --quiet --test differential -- --nocapture

# The drivers' own test suites on a lone server and through the proxy: docs/drivers.md
drivers: setup
	scripts/setup test
	scripts/driver-suites $(DRIVER)

# Random transactions, servers compared, for as long as it takes: the seeds SEED .. SEED + SEEDS - 1. A red run prints a script.
SEED ?= $(shell date +%s)
SEEDS ?= 100
TRANSACTIONS ?= 10000
NODES ?= 2
torture: setup
	TORTURE_SEED=$(SEED) TORTURE_SEEDS=$(SEEDS) TORTURE_TRANSACTIONS=$(TRANSACTIONS) TORTURE_NODES=$(NODES) \
		$(CARGO) test --locked --test torture -- --nocapture random_transactions

# The catalogue of anomalies, on NODES nodes; CASE=a17 plays one.
catalogue: setup
	CATALOGUE_NODES=$(NODES) CATALOGUE_CASE=$(CASE) $(CARGO) test --locked --test catalogue -- --nocapture --test-threads=1

# Each rule of replication broken in a copy, and a test red for it; MUTANT=barrier tries one.
mutants: setup
	scripts/mutants $(MUTANT)

# Nodes filled with PostgreSQL 16, 17 and 18, whose programs are fetched from npm; VERSION=18 takes one.
versions: setup
	CARGO=$(CARGO) scripts/versions "$(VERSION)"

# kill -9 of each process in each phase of a recovery: the schedules of SEED.
ROUNDS ?= 200
kill-phases: setup
	KILL_ROUNDS=$(ROUNDS) KILL_SEED=$(SEED) $(CARGO) test --locked --test kill_phases -- --nocapture

# Rounds on real hosts, each with a random load and a random fault, until ROUNDS of SEED are done in all runs together: the state and the logs
# of red rounds are in SOAK_DIR. ROUND=12 plays one again.
SOAK_DIR ?= $(CURDIR)/target/soak
soak: setup
	SOAK_SEED=$(if $(filter file,$(origin SEED)),1,$(SEED)) SOAK_ROUNDS=$(ROUNDS) SOAK_ROUND=$(ROUND) SOAK_DIR=$(SOAK_DIR) \
		$(CARGO) test --locked --test soak -- --nocapture rounds_of_a_seed

# docs/failover.md, typed as it stands there, on two hosts with a network of their own between them. Wants root.
namespaces: setup
	@test "$$(id -u)" = 0 || { echo 'make namespaces makes network namespaces: run it as root' >&2; exit 2; }
	@command -v ip >/dev/null && command -v setpriv >/dev/null || { echo 'please install iproute2 and util-linux' >&2; exit 2; }
	$(CARGO) test --locked --test namespaces -- --nocapture --test-threads=1

# A server of ROUNDS random moments of a busy run, each exactly as it was: the moments of SEED.
restore: setup
	RESTORE_ROUNDS=$(ROUNDS) RESTORE_SEED=$(SEED) $(CARGO) test --locked --test archive -- --nocapture exactly_as_the_server_was

# The membership core through long lives drawn from the seeds SEED .. SEED + SEEDS - 1; SEED=7 SEEDS=1 plays one again.
simulate:
	SIMULATE_SEED=$(SEED) SIMULATE_SEEDS=$(SEEDS) \
		$(CARGO) test --locked --test membership -- --nocapture long_lives

# Fuzz targets, SECONDS each; TARGET=lexer runs one: docs/fuzz.md
fuzz:
	@scripts/setup fuzz
	SECONDS=$(or $(SECONDS),3600) scripts/fuzz $(TARGET)

check:
	$(CARGO) fmt --all --check
	$(CARGO) clippy --locked --workspace --all-targets -- -D warnings
	$(CARGO) clippy --locked --test namespaces -- -D warnings

setup:
	@scripts/setup
