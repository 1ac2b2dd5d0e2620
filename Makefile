# One command per purpose: `make demo` shows the product, `make test` proves it. Both install what they need first.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
EXTRAS := ros,realsense,ik,web,lerobot,zarr,spacemouse,dev
# pip warns once per package about every local package folder that lacks it; errors and other warnings stay visible.
QUIET_PIP := 2> >(grep -v '^WARNING: Location .* is ignored' >&2 || true)
# Without an NVIDIA driver the CPU build of torch saves gigabytes; folders of wheels given to pip come first.
CPU_TORCH := https://download.pytorch.org/whl/cpu

.PHONY: help setup demo test lint benchmark

help:
	@sed -n 's/^## //p' Makefile

## make setup      create .venv, install pinned dependencies and missing system libraries
setup: $(READY)

$(READY): pyproject.toml constraints.txt requirements/robomimic.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed, $$($(PYTHON) --version) found: make setup PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  { sudo=""; test "$$(id -u)" = 0 || sudo="sudo -n"; echo "Installing python3-venv"; \
	    $$sudo apt-get update -qq || true; $$sudo apt-get install -y -qq python3-venv && \
	    $(PYTHON) -c 'import venv, ensurepip'; } || \
	  { echo "Python cannot create virtual environments. Run: sudo apt-get install -y python3-venv"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing dependencies into $(VENV) (a few minutes)"
	@index=""; \
	if ! command -v nvidia-smi >/dev/null && ! $(BIN)/pip config list | grep find-links >/dev/null; then \
	  index="--extra-index-url $(CPU_TORCH)"; fi; \
	$(BIN)/pip install -q $$index -c constraints.txt -e '.[$(EXTRAS)]' $(QUIET_PIP); \
	$(BIN)/pip install -q --no-deps -r requirements/robomimic.txt $(QUIET_PIP)
	@$(BIN)/simtoreal doctor --install
	@touch $@

## make demo       learn a skill from demonstrations and deploy it over ROS 2; ends with a report
demo: $(READY)
	@$(BIN)/simtoreal demo

## make test       run the test suite
# Tests against live robot processes run one by one and mostly wait. What they leave of the cores is used by the others,
# with the lowest priority: in a session of their own, because Linux weighs sessions before it weighs processes. There
# are three workers, as some of them wait, too; files stay together, and with them what their tests share. A worker that
# crashes is not replaced: with files kept together, pytest-xdist would wait forever.
test: $(READY)
	@others=$$(mktemp); \
	setsid env --default-signal=INT nice -n 19 bash -c 'echo 19 2>/dev/null >/proc/self/autogroup || true; exec "$$@"' low-priority \
	  $(BIN)/python -m pytest -n 3 --max-worker-restart 0 --dist loadfile \
	    --no-loadscope-reorder -m "not realtime" >"$$others" 2>&1 & pid=$$!; \
	trap 'kill -- -$$pid 2>/dev/null || true; rm -f "$$others"' EXIT; \
	status=0; \
	$(BIN)/python -m pytest -m realtime || status=$$?; \
	echo "The other tests:"; tail -n +1 -f --pid=$$pid "$$others" & \
	wait $$pid || status=$$?; wait; \
	exit $$status

## make lint       ruff on everything, mypy --strict on the contract modules
lint: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@# mypy resolves imports from folders: show it the package as it is installed (see pyproject.toml, package-dir).
	@rm -rf build/types && mkdir -p build/types/simtoreal && ln -s $(CURDIR)/simtoreal/* build/types/simtoreal/
	@for folder in envs data_collection policies evaluation world_models robot configs; do \
	  ln -s $(CURDIR)/$$folder build/types/simtoreal/$$folder; done
	@$(BIN)/mypy

## make benchmark  run the benchmarks and write docs/results.md (a day on two cores, resumable; run make demo and simtoreal demo --full first)
BENCHMARKS := vector_env rendering image_env window_sampler train_step collection expert control_loop pick_place \
  recorder_kills recorder_latency teleop_latency compatibility_reach2d compatibility_pick_place compatibility_move \
  diversity trajectory_weighting move world_model wovr rlco rlir demo_full
benchmark: $(READY)
	@for name in $(BENCHMARKS); do echo "== $$name"; LP_NUM_THREADS=1 $(BIN)/python benchmarks/$$name.py; done
	@$(BIN)/python benchmarks/render_results.py
