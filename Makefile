# Everything happens in .venv, made from the pinned versions of requirements.txt.
#
#   make demo     distill, attack and report on real 8x8 digits, about two minutes on 2 cores
#   make test     the tests but for the slow ones; the first time about 11 minutes on 2 cores, as it
#                 compiles, then fewer (test-slow: those that take more than about ten seconds each,
#                 whole runs of the commands among them)
#   make lint     lint, format check and type check
#   make site     builds the documentation, docs/_build/html/index.html
#   make notebooks  executes colab/*.py and writes the notebooks beside them, about seven minutes
#                 (NOTEBOOKS=quickstart: one; NOTEBOOKS=--smoke: at the least sizes, nothing is written)
#   make attack-table  measures the attacks' costs and writes the table of docs/attacks.md
#   make parity   the attacks beside other toolkits at full size; writes docs/parity.md
#                 (parity-small: a few images and steps, minutes)
#   make bench    the attacks' speed beside other toolkits; writes runs/bench-attacks.json
#   make bench-lanes  the cheap part of the bench on the oldest, pinned, and newest versions by turns;
#                 writes runs/bench-lanes.json; about half an hour
#   make device   checks and times an accelerator in at most 8 minutes, with the machine's own JAX;
#                 writes runs/device/device.json (before, on a CPU: make device-reference; and
#                 make device-wheels, if that machine lacks packages)
#   make reliability  damages every kind of file of a workdir, and kills runs; an hour; writes
#                 docs/reliability.md
#   make floor    the marked tests on the oldest supported versions, in .venv-floor
#   make newest   the same on the newest, in .venv-newest (Python 3.12 or newer)

PYTHON ?= python3
# For Colab's versions and the newest: 3.13 or 3.12, where one is there and PYTHON is not set.
LANE_PYTHON ?= $(or $(if $(filter file,$(origin PYTHON)),$(shell bash .ci/python)),$(PYTHON))
PIP_OPTIONS := --quiet --disable-pip-version-check
# The accelerator's own Python, whose JAX knows the accelerator.
DEVICE_PYTHON ?= $(if $(wildcard .venv/bin/python),.venv/bin/python,python3)
DEVICE_OPTIONS ?=
SITE_BUILDER ?= html
DEVICE_WHEELS := absl-py etils flatbuffers flax msgpack optax PyYAML rich typing_extensions

.PHONY: demo test test-slow lint site notebooks attack-table parity parity-small bench bench-lanes device \
	device-reference device-wheels floor newest install clean reliability

demo: .venv/installed
	.venv/bin/python -m jdistill defend digits --workdir runs/demo

test: .venv/installed
	.venv/bin/python -m pytest -n 2 --dist loadgroup -m "not parity and not slow" $(TEST_OPTIONS)

test-slow: .venv/tpu/installed
	.venv/bin/python -m pytest -n 2 --dist loadgroup -m "slow and not parity" $(TEST_OPTIONS)

lint: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

site: .venv/installed
	.venv/bin/python -m sphinx -W --keep-going -j 2 -b $(SITE_BUILDER) docs docs/_build/$(SITE_BUILDER)

notebooks: .venv/installed
	.venv/bin/python colab/make_notebooks.py $(NOTEBOOKS)

attack-table: .venv/installed
	.venv/bin/python docs/make_attacks.py

parity-small: .venv/peers
	.venv/bin/python -m pytest tests/parity

parity: .venv/peers
	JDISTILL_PARITY=full .venv/bin/python -m pytest tests/parity

bench: .venv/peers
	.venv/bin/python -m experiments.bench attacks --json runs/bench-attacks.json

bench-lanes: .venv/installed .venv-floor/installed .venv-newest/installed
	.venv/bin/python -m experiments.bench.lanes --json runs/bench-lanes.json

device:
	$(DEVICE_PYTHON) -m experiments.device run $(DEVICE_OPTIONS)

device-reference: .venv/installed
	.venv/bin/python -m experiments.device reference

device-wheels:
	$(PYTHON) -m pip download $(PIP_OPTIONS) --no-deps --only-binary=:all: -c requirements.txt \
		--python-version 3.12 --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 \
		--platform manylinux2014_x86_64 -d runs/device/wheels $(DEVICE_WHEELS)

reliability: .venv/installed
	.venv/bin/python -m experiments.reliability --num-random 2000 --num-kills 20 --num-kills-of-two 20 \
		--output docs/reliability.md

floor: .venv-floor/installed
	.venv-floor/bin/python -m pytest -n 2 --dist loadgroup -m floor $(TEST_OPTIONS)

newest: .venv-newest/installed
	.venv-newest/bin/python -m pytest -n 2 --dist loadgroup -m floor $(TEST_OPTIONS)

install: .venv/installed

.venv/installed: requirements.txt pyproject.toml
	$(call make-venv,.venv,requirements.txt,$(PYTHON),11)

.venv-floor/installed: requirements-floor.txt pyproject.toml
	$(call make-venv,.venv-floor,requirements-floor.txt,$(LANE_PYTHON),11)

.venv-newest/installed: requirements-newest.txt pyproject.toml
	$(call make-venv,.venv-newest,requirements-newest.txt,$(LANE_PYTHON),12)

.venv/peers: .venv/installed requirements-peers.txt
	@.venv/bin/python -m pip install $(PIP_OPTIONS) --no-deps -r requirements-peers.txt
	@touch $@

.venv/tpu/installed: .venv/installed requirements-tpu.txt
	@.venv/bin/python -m pip install $(PIP_OPTIONS) --no-deps --upgrade --target .venv/tpu -r requirements-tpu.txt
	@touch $@

# Folder, file of versions, Python, and the least minor version of it. Another Python than the
# folder's starts it anew.
define make-venv
	@$(3) -c 'import sys; sys.exit(sys.version_info < (3, $(4)))' || \
		{ echo "error: expected Python 3.$(4) or newer, got $$($(3) --version); run make PYTHON=python3.$(4)"; exit 1; }
	@echo "installing the pinned packages into $(1)"
	@$(3) -m venv $$([ "$$($(1)/bin/python --version 2>&1)" = "$$($(3) --version 2>&1)" ] || echo --clear) $(1)
	@$(1)/bin/python -m pip install $(PIP_OPTIONS) -r $(2)
	@$(1)/bin/python -m pip install $(PIP_OPTIONS) --no-deps --no-build-isolation -e .
	@touch $@
endef

clean:
	rm -rf .venv .venv-floor .venv-newest build dist .jax_cache .pytest_cache .ruff_cache .mypy_cache
