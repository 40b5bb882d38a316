# Husk. `make help` lists what there is.

PREFIX ?= /usr/local
DESTDIR ?=
export HUSK_CACHE ?= $(HOME)/.cache/husk
export PATH := $(HUSK_CACHE)/bin:$(PATH)

target := $(or $(CARGO_TARGET_DIR),$(CURDIR)/target)
dist := $(CURDIR)/target/dist
kvm_host := tests/support/kvm-host

.PHONY: help
help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

.PHONY: deps
deps: ## install what building, testing and linting needs (Debian 12 and 13)
	@tests/support/deps

.PHONY: guest-image
guest-image: ## all programs, and the guest's kernel and root file system in target/guest
	guest-image/build target/guest

.PHONY: build
build: guest-image ## everything, as it is installed, in target/dist
	packaging/stage $(dist)

.PHONY: dist
dist: build ## a tarball and a Debian package, and the symbols of their programs, in target
	packaging/dist

.PHONY: demo
demo: ## a pod in a virtual machine, from nothing, driven by crictl
	@tests/support/steps \
		'tools and images' 'tests/support/deps demo' \
		"Husk's own programs, the guest's kernel and runc" '$(MAKE) --no-print-directory build' \
		'pods' '$(kvm_host) --timeout 2400 -- tests/demo'

.PHONY: deps-test
deps-test:
	@tests/support/deps test

.PHONY: test
test: deps-test build ## some of each kind of tests, what changes touch, and a part of the rest that is another one each day
	tests/support/run-tests $(if $(MINUTES),--minutes $(MINUTES))

.PHONY: test-all
test-all: deps-test build ## every test there is, conformance and benchmarks too: hours
	@tests/support/deps posix bench dist
	tests/support/run-tests --all

HANDLER ?= kata-runtime
.PHONY: critest
critest: deps-test build ## cri-tools' conformance suite; FOCUS=regex PART=N/M HANDLER=name, results in target/critest
	tests/conformance/run --handler '$(HANDLER)' --focus '$(FOCUS)' --part '$(PART)'

.PHONY: posix
posix: deps-test build ## pjdfstest on a volume in a pod, results in target/posix
	@tests/support/deps posix
	mkdir -p target/posix
	$(kvm_host) --timeout 3600 --rwdir target/posix -- tests/posix/run --results target/posix

.PHONY: fuzz
fuzz: deps-test ## fuzz what reads hostile bytes; MINUTES=n shared by all targets, or TARGET=name alone; to target/fuzz
	tests/fuzz/run $(if $(MINUTES),--minutes $(MINUTES)) $(addprefix --target ,$(TARGET))

VICTIM ?= huskd
.PHONY: crash
crash: deps-test build ## huskd dies wherever it has done something; VICTIM=huskd|vmm|fs|disk PART=N/M REQUEST=name
	cargo build --release --workspace --exclude husk-tests --bins --features huskd/crash-points
	rm -rf target/crash && cp -a $(dist) target/crash
	install -t target/crash/bin $(target)/release/huskd
	$(kvm_host) --timeout 7200 --memory 8G -- $(HUSK_CACHE)/python/test/bin/python tests/crash/run \
		--victim '$(VICTIM)' $(if $(PART),--part $(PART)) $(REQUEST)

# The release whose pods this one takes over: the one before it.
FROM ?= 0.1.0
.PHONY: upgrade
upgrade: deps-test build ## this huskd over pods of an earlier release, and the way back; FROM=version, built from git's history
	release=$$(tests/support/release '$(FROM)') && \
		HUSK_UPGRADE_FROM=$$release $(kvm_host) --timeout 3600 --memory 8G -- tests/integration/run test_upgrade.py

.PHONY: bench
bench: deps-test build ## start-up times, memory, streams and volumes beside containerd's, to target/bench
	@tests/support/deps bench
	cargo build --release --workspace --bins
	install -D -t $(dist)/bin $(target)/release/husk-bench
	mkdir -p target/bench
	$(kvm_host) --timeout 3000 --rwdir target/bench -- tests/bench/run

.PHONY: test-dist
test-dist: deps-test dist ## installs, upgrades and removes both packages in clean roots of Debian 12 and 13
	@tests/support/deps dist
	tests/dist/run

.PHONY: lint
lint: ## formatting, clippy, licences, advisories, ruff, shellcheck, and the documentation's links
	@tests/support/deps lint
	tests/support/layers
	cargo fmt --all --check
	cargo fmt --check --manifest-path tests/fuzz/Cargo.toml
	tests/support/lint
	tests/support/cargo-deny
	tests/support/book
	cargo clippy --release --workspace --all-targets --all-features -- -D warnings

.PHONY: book
book: ## the documentation as a book, target/book/html; refuses broken links
	@tests/support/deps lint
	tests/support/book

.PHONY: kvm-shell
kvm-shell: deps-test ## a shell in the KVM host that the tests run in
	$(kvm_host) shell

.PHONY: install
install: ## what is built, the configuration and the systemd unit below PREFIX; what the tarball of `make dist` has
	@tree=$$(mktemp -d) && trap 'rm -rf "$$tree"' EXIT && \
		packaging/stage --symbols "$$tree/symbols" "$$tree" && install packaging/install.sh "$$tree" && \
		"$$tree/install.sh" --prefix '$(PREFIX)' --destdir '$(DESTDIR)'

.PHONY: clean
clean: ## remove what was built; the cache in ~/.cache/husk stays
	cargo clean
	rm -rf target
