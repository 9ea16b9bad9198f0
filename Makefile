# keybroker: `make` lists the targets.

GO      ?= go
DESTDIR ?=
PREFIX  ?= /usr
RUN     ?=
TESTS   ?=

# An older Go says so instead of downloading another.
export GOTOOLCHAIN = local

# one after the other, so that what fails first is shown last
.NOTPARALLEL:

STATIC = CGO_ENABLED=0 $(GO) build -trimpath -ldflags '-s -w'

.PHONY: help demo test unit lab build bench lint vuln install uninstall clean
.PHONY: vet staticcheck race fuzz e2e programs lab-programs distclean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

demo: ## show it: a libvirt VM opens its encrypted disk with a key that keybroker pushed (root or sudo)
	@e2e/setup.sh 6
	@$(MAKE) -s --no-print-directory lab-programs
	@exec bin/lab demo

test: ## all that CI runs: vet, staticcheck, unit tests with the race detector, fuzzing, e2e in the lab (root or sudo)
	@e2e/setup.sh 4 gcc openssl cpio curl
	@$(MAKE) --no-print-directory lint race fuzz
	@$(MAKE) -s --no-print-directory lab-programs
	@exec bin/lab test $(if $(TESTS),-test.run='$(TESTS)')

unit: ## the unit tests (no root, no lab)
	$(GO) test ./...

lab: ## a root shell in a host with broker, libvirt and defined VMs; make lab RUN='COMMAND' runs COMMAND there (root or sudo)
	@e2e/setup.sh 3 >&2
	@$(MAKE) -s --no-print-directory lab-programs
	@exec bin/lab $(if $(RUN),run "$$RUN",shell)
lab: override export RUN := $(value RUN)

e2e: ## only the end-to-end tests; TESTS='REGEXP' chooses some (root or sudo)
	@e2e/setup.sh 4
	@$(MAKE) -s --no-print-directory lab-programs
	@exec bin/lab test $(if $(TESTS),-test.run='$(TESTS)')

build: ## bin/keybroker and bin/keybroker-agent, static
	$(STATIC) -o bin/keybroker ./cmd/broker
	$(STATIC) -o bin/keybroker-agent ./cmd/guest-agent

# packages with tests that may skip elsewhere, for want of dm-crypt, libvirtd, vsock, cgroups, mounts or a newer kernel
LAB_TESTED = ./inject/sink ./hypervisor/libvirt ./cmd/guest-agent ./internal/caller ./internal/audit ./derive

lab-programs: build
	$(STATIC) -o bin/guest ./e2e/guest
	$(STATIC) -o bin/tsm ./e2e/tsm
	CGO_ENABLED=0 $(GO) test -c -o bin/e2e.test ./e2e
	CGO_ENABLED=0 $(GO) test -c -o bin/ $(LAB_TESTED)
	$(GO) build -o bin/lab ./e2e/lab

bench: ## what a key costs: one table, each ratio within one run (docs/performance.md)
	@cd internal/daemon && $(GO) test -count=1 -timeout 30m -run '^TestTable$$' -table

lint: vet staticcheck ## gofmt, vet and staticcheck

vet:
	@files=$$(gofmt -l $$(git ls-files -co --exclude-standard '*.go')); [ -z "$$files" ] || { echo "not gofmt-ed: $$files" >&2; exit 1; }
	$(GO) vet ./...

staticcheck:
	$(GO) build -C internal/tools -o ../../bin/staticcheck honnef.co/go/tools/cmd/staticcheck
	bin/staticcheck ./...

vuln: ## govulncheck (needs the network)
	$(GO) build -C internal/tools -o ../../bin/govulncheck golang.org/x/vuln/cmd/govulncheck
	bin/govulncheck ./...

race:
	$(GO) test -race ./...

fuzz:
	@internal/tools/fuzz.sh 10s

# the units that make install puts in place, of which a host may have enabled any
INSTALLED_UNITS = $(notdir $(wildcard deploy/systemd/*))
UNITS       = $(DESTDIR)$(PREFIX)/lib/systemd/system
SYSUSERS    = $(DESTDIR)$(PREFIX)/lib/sysusers.d
TMPFILES    = $(DESTDIR)$(PREFIX)/lib/tmpfiles.d
HOOKS       = $(DESTDIR)/etc/libvirt/hooks/qemu.d
SHARE       = $(DESTDIR)$(PREFIX)/share/keybroker
MAN         = $(DESTDIR)$(PREFIX)/share/man/man1
COMPLETIONS = $(DESTDIR)$(PREFIX)/share

# $(call place,MODE,SOURCE,TARGET) installs a text that names the programs, with the path that they have here.
place = sed 's|/usr/bin/keybroker|$(PREFIX)/bin/keybroker|g' $(2) | install -D -m $(1) /dev/stdin $(3)

install: ## install what `make build` built: programs, units, user, libvirt hook, examples, manual, completions (DESTDIR, PREFIX)
	@[ -x bin/keybroker ] || { echo 'make: run "make build" first' >&2; exit 1; }
	install -D -t $(DESTDIR)$(PREFIX)/bin bin/keybroker bin/keybroker-agent
	for unit in $(notdir $(wildcard deploy/systemd/*)); do $(call place,644,deploy/systemd/$$unit,$(UNITS)/$$unit) || exit; done
	install -D -m 644 -t $(SYSUSERS) deploy/sysusers.d/*
	install -D -m 644 -t $(TMPFILES) deploy/tmpfiles.d/*
	$(call place,755,deploy/libvirt/hook,$(HOOKS)/keybroker)
	$(call place,755,deploy/libvirt/hook,$(SHARE)/libvirt-hook)
	$(call place,644,deploy/guest/keybroker-agent.service,$(SHARE)/guest/keybroker-agent.service)
	install -D -m 644 -t $(SHARE)/guest deploy/guest/agent.toml
	install -D -m 644 -t $(SHARE)/examples deploy/policy/policy.toml
	install -d $(MAN) $(COMPLETIONS)/bash-completion/completions $(COMPLETIONS)/zsh/site-functions $(COMPLETIONS)/fish/vendor_completions.d
	bin/keybroker man $(MAN)
	bin/keybroker completion bash >$(COMPLETIONS)/bash-completion/completions/keybroker
	bin/keybroker completion zsh >$(COMPLETIONS)/zsh/site-functions/_keybroker
	bin/keybroker completion fish >$(COMPLETIONS)/fish/vendor_completions.d/keybroker.fish
	if [ -z '$(DESTDIR)' ]; then systemd-sysusers && systemd-tmpfiles --create keybroker.conf && systemctl daemon-reload; fi

uninstall: ## stop the broker and remove what `make install` installed; keys and policy stay
	if [ -z '$(DESTDIR)' ]; then systemctl disable --now $(INSTALLED_UNITS) || true; fi
	rm -f $(DESTDIR)$(PREFIX)/bin/keybroker $(DESTDIR)$(PREFIX)/bin/keybroker-agent $(HOOKS)/keybroker
	rm -f $(addprefix $(UNITS)/,$(notdir $(wildcard deploy/systemd/*)))
	rm -f $(SYSUSERS)/keybroker.conf $(TMPFILES)/keybroker.conf $(MAN)/keybroker.1 $(MAN)/keybroker-*.1
	rm -f $(COMPLETIONS)/bash-completion/completions/keybroker $(COMPLETIONS)/zsh/site-functions/_keybroker
	rm -f $(COMPLETIONS)/fish/vendor_completions.d/keybroker.fish
	rm -rf $(SHARE)
	if [ -z '$(DESTDIR)' ]; then systemctl daemon-reload || true; fi

clean: ## remove what was built here; the lab's cache stays
	rm -rf bin

distclean: clean ## and the lab's cache, of every recipe, with the logs of its runs
	rm -rf "$${XDG_CACHE_HOME:-$$HOME/.cache}/keybroker" 2>/dev/null || sudo rm -rf "$${XDG_CACHE_HOME:-$$HOME/.cache}/keybroker"
