# make demo    the main job on this machine, with numbers      make test    every test
# Both install what is missing first (see scripts/setup); the second time that does nothing.

CARGO ?= cargo

.PHONY: demo test setup bench check

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
BENCH ?= cutover proxy
bench: setup
	$(foreach name,$(BENCH),$(CARGO) bench --locked --bench $(name) -- $(BENCH_ARGS) &&) true

check:
	$(CARGO) fmt --all --check
	$(CARGO) clippy --locked --workspace --all-targets -- -D warnings

setup:
	@scripts/setup
