# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: GPL-3.0-or-later
#
# Every target sets itself up: packages of the system that the tests compare with (.ci/packages), a virtual environment in
# the tree, its pinned requirements, the library, and the accelerator where cargo is present. A stamp stands for each.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DONE := $(VENV)/done
PIP := $(BIN)/pip --disable-pip-version-check --quiet install --constraint requirements/constraints.txt
CARGO := $(shell command -v cargo 2> /dev/null)
ACCEL := $(wildcard pylib/accel/Cargo.toml pylib/accel/Cargo.lock pylib/accel/pyproject.toml pylib/accel/build.rs pylib/accel/src/*.rs pylib/accel/src/*/*.rs)
RESULTS := .cache/results

.NOTPARALLEL:
.PHONY: help demo test test-library test-collection test-integration test-heavy lint sanity molecule bench bench-hosts docs dev accel packages clean

help:
	@sed -n 's/^#: //p' Makefile

#: make demo [IMAGE=path]   a template, four thin clones of it, one encrypted, a snapshot of all; and a second run that changes nothing
demo: $(DONE)/demo accel
	@.ci/demo $(if $(IMAGE),"$$(realpath --no-symlinks -- "$(IMAGE)")")

#: make test                the library with the accelerator and without, under the newest and the oldest Python, and the collection
test: test-library test-collection test-integration
	@$(BIN)/python .ci/tally.py $(RESULTS)

test-library: $(DONE)/test accel packages
	@rm -rf $(RESULTS) && mkdir -p $(RESULTS)
	@if [ -n "$(CARGO)" ]; then .ci/library $(RESULTS) require 3.13; fi
	@.ci/library $(RESULTS) off 3.9

test-collection: $(DONE)/test
	@mkdir -p $(RESULTS) && .ci/units $(RESULTS)

test-integration: $(DONE)/test $(DONE)/molecule accel packages
	@mkdir -p $(RESULTS) && .ci/integration $(RESULTS)
	@.ci/installed $(RESULTS)
	@.ci/molecule thin_clones

#: make test-heavy          rbd and gluster against Ceph and GlusterFS, which it installs; as root, some minutes
test-heavy: packages
	@.ci/heavy

#: make lint                ruff, mypy --strict, clippy, shellcheck, REUSE, the changelog, and what no file may say
lint: $(DONE)/lint
	@.ci/lint

#: make sanity              ansible-test sanity, ansible-lint, the docs linter, the Galaxy importer, build and install
#:                          and with CORES="2.18:3.11 2.21:3.13" (release:Python) the same and more under other releases of ansible-core
sanity: $(DONE)/sanity
	@.ci/sanity
	@if [ -n "$(CORES)" ]; then .ci/cores $(CORES); fi

#: make molecule            the roles by molecule, each twice; SCENARIO=name for one alone
molecule: $(DONE)/molecule
	@.ci/molecule $(SCENARIO)

#: make bench               speed against qemu-img and cp in the same run, as a table of ratios and as JSON
bench: $(DONE)/test accel packages
	@$(BIN)/python pylib/bench/run.py $(ARGS)

#: make bench-hosts         what a task costs on fifty hosts, against the command module
bench-hosts: $(DONE)/sanity packages
	@$(BIN)/python pylib/bench/hosts.py $(ARGS)

#: make docs                the manual and the collection's reference as one site in build/docs; every command shown is run
docs: $(DONE)/test $(DONE)/docs accel packages
	@.ci/docs

#: make dev                 everything that the other targets install, at once
dev: $(DONE)/test $(DONE)/lint $(DONE)/sanity $(DONE)/docs $(DONE)/molecule accel

packages:
	@.ci/packages

accel: $(if $(and $(CARGO),$(ACCEL)),$(DONE)/accel)
	@$(if $(CARGO),:,echo "The accelerator is absent: there is no cargo to build it with. Everything works without it.")

clean:
	rm -rf $(VENV) .venvs .cache build dist pylib/accel/target

$(DONE)/venv: .ci/venv
	@.ci/venv $(VENV) $(PYTHON)
	@mkdir -p $(DONE) && touch $@

$(DONE)/demo: $(DONE)/venv requirements/demo.txt requirements/constraints.txt pylib/pyproject.toml pylib/bin/diskwright
	@$(PIP) -r requirements/demo.txt
	@$(PIP) --no-build-isolation --no-deps --editable pylib
	@touch $@

$(DONE)/test $(DONE)/lint $(DONE)/sanity $(DONE)/docs $(DONE)/molecule: $(DONE)/%: $(DONE)/demo requirements/%.txt
	@$(PIP) -r requirements/$*.txt
	@touch $@

$(DONE)/accel: $(DONE)/demo requirements/accel.txt $(ACCEL)
	@echo "Building the accelerator."
	@$(PIP) -r requirements/accel.txt
	@rm -rf build/accel && mkdir -p build/accel
	@$(BIN)/pip --disable-pip-version-check --quiet wheel --no-build-isolation --no-deps --wheel-dir build/accel ./pylib/accel
	@$(PIP) --no-deps --force-reinstall build/accel/*.whl
	@touch $@
