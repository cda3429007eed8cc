# Two commands on a fresh machine: `make demo` and `make test`. Both create .venv and install what they need; both can be repeated.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
SOURCES := slrnet data_prep ray_jobs tests docs $(wildcard benchmarks)

PORT ?=
RUN ?=
ONLY ?=
SEED ?=
BUDGET ?=

.PHONY: help demo dashboard app test test-fast test-processors lint format docs chaos fuzz bench dist lock clean

help: ## list the targets
	@sed -n -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' Makefile | expand -t 18

$(STAMP): requirements.txt constraints.txt pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is not installed; slrnet needs Python 3.11 or newer" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("slrnet needs Python 3.11 or newer, and $(PYTHON) is " \
	    + sys.version.split()[0] + "; name a newer one: make PYTHON=python3.11 ...")'
	@echo "installing slrnet and its dependencies into .venv (several GB with PyTorch; some minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@: > .venv/install.log; $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev,app,aws,crf,coco,distill,docs,export,heic,tiff,xlsx]' > .venv/install.log 2>&1 \
	    & pip=$$!; trap "kill $$pip 2>/dev/null || true" INT TERM; \
	    tail --pid=$$pip -n +1 -f .venv/install.log 2>/dev/null | { n=0; while read -r word line; do case $$word in \
	        Collecting) ((++n % 25)) || echo "  $$n packages found";; Building) echo "  building $$line";; \
	        Installing) echo "  installing $$n packages";; esac; done; }; \
	    wait $$pip || { echo "the installation failed; its last lines (all of it: .venv/install.log):" >&2; tail -n 25 .venv/install.log >&2; exit 1; }
	@touch $@

demo: $(STAMP) ## train on the embedded data set through a local Ray cluster, from shards to scores
	@$(BIN)/slrnet demo

dashboard: $(STAMP) ## MLflow's page over the runs of the default storage; PORT=5000
	@$(BIN)/slrnet dashboard $(if $(PORT),--port $(PORT))

app: $(STAMP) ## a page where an image gets its mask by the newest run, or by RUN=...; PORT=7860
	@$(BIN)/slrnet app $(if $(PORT),--port $(PORT)) $(RUN)

# Side by side, with one thread each: the tests' networks are too small for more. Bytecode is kept: pytest's own takes long.
PYTEST := env -u PYTHONDONTWRITEBYTECODE OMP_NUM_THREADS=1 $(BIN)/python -m pytest
FAST := $(PYTEST) -m "not slow" --numprocesses auto --maxprocesses 4 --dist loadfile
SLOW := $(PYTEST) -m slow --numprocesses 2 --dist loadfile

test: $(STAMP) ## all tests; the slow ones also where a fast one fails
	@trap 'exit 130' INT TERM; fast=passed; slow=passed; \
	    $(FAST) | tee -i .venv/test-fast.log || fast=FAILED; \
	    $(SLOW) | tee -i .venv/test-slow.log || slow=FAILED; \
	    echo; grep -hE '^(FAILED|ERROR) ' .venv/test-fast.log .venv/test-slow.log || true; \
	    echo "fast tests: $$fast ($$(grep -E ' in [0-9.]+s' .venv/test-fast.log | tail -n 1))"; \
	    echo "slow tests: $$slow ($$(grep -E ' in [0-9.]+s' .venv/test-slow.log | tail -n 1))"; \
	    test "$$fast $$slow" = "passed passed"

test-fast: $(STAMP) ## the tests that start neither Ray nor servers, nor train to the end
	@$(FAST)

test-processors: $(STAMP) ## the numeric folders' fast tests as on other processors (half an hour); ONLY="NAME ..." chooses
	@$(BIN)/python tests/processors.py $(if $(ONLY),--only $(ONLY))

lint: $(STAMP) ## style, formatting, types
	@$(BIN)/ruff check $(SOURCES)
	@$(BIN)/ruff format --check $(SOURCES)
	@$(BIN)/mypy --strict slrnet

format: $(STAMP) ## fix style and formatting
	@$(BIN)/ruff check --fix $(SOURCES)
	@$(BIN)/ruff format $(SOURCES)

chaos: $(STAMP) ## faults at every write and in every phase of a training; then one whose processes and servers are killed
	@$(BIN)/python benchmarks/write_faults.py
	@$(BIN)/python benchmarks/chaos.py

fuzz: $(STAMP) ## damaged inputs for every reader; BUDGET=600 SEED=1 are the budget and the first input
	@$(BIN)/python benchmarks/fuzz.py $(if $(BUDGET),--seconds $(BUDGET)) $(if $(SEED),--seed $(SEED))

docs: $(STAMP) ## the documentation in site/; broken links fail
	@$(BIN)/python docs/generate.py
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(STAMP) ## every figure that the project claims, measured here into benchmarks/RESULTS.md; PEER=DIR compares
	@$(BIN)/python benchmarks/results.py $(if $(PEER),--peer-dir "$(PEER)")

dist: $(STAMP) ## wheel and source archive in dist/, and a bill of the image's materials (CycloneDX)
	@$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[dist]'
	@$(BIN)/python -m build --outdir dist .
	@$(BIN)/cyclonedx-py requirements --pyproject pyproject.toml --output-reproducible --output-file dist/slrnet.cdx.json requirements.lock

lock: ## requirements.lock from pyproject.toml and constraints.txt; needs the network and uv
	@{ sed -n '1,2p' requirements.lock; uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header \
	    --no-annotate --no-emit-index-url -c constraints.txt --extra aws --extra crf --extra coco --extra distill --extra app \
	    --extra heic --extra tiff --extra xlsx --extra export pyproject.toml; } > requirements.lock.new && mv requirements.lock.new requirements.lock

clean: ## remove .venv and all caches
	@rm -rf .venv build dist site *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
