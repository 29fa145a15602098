# What there is to make: `make` or `make help` prints it.

PYTHON  ?= python3
WORKERS ?= 2
SHELL   := bash
SST2    ?= ../shared/data/sst2
VENV    := .venv
BIN     := $(VENV)/bin

# Every extra, so that the tests skip nothing and constraints.txt pins all.
EVERYTHING := all,dev

# The exact versions, for the packages and for the backend that builds this one.
export PIP_CONSTRAINT                := constraints.txt
export PIP_BUILD_CONSTRAINT          := constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help demo test lint bench study format constraints clean
.DELETE_ON_ERROR:

help: ## print this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "  PYTHON=$(PYTHON) makes the environment in $(VENV); WORKERS=$(WORKERS) run the tests"

demo: $(VENV)/.ready-demo ## adapt a small model and write the evidence to runs/demo/report.html
	$(BIN)/rankwise demo

test: lint ## check the style, the types and the rooms, then run the tests
	$(BIN)/python -m pytest -n $(WORKERS)

lint: $(VENV)/.ready-dev ## check the style, the types and the rooms
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports --no-logo

bench: $(VENV)/.ready-dev ## measure the costs beside PEFT's and write benchmarks/records/
	$(BIN)/python -m benchmarks.speed --sst2 $(SST2)

study: $(VENV)/.ready-demo ## run or go on with both experiments; SST2=FOLDER has train.tsv and dev.tsv
	@mkdir -p runs
	@ln -sfn "$$($(BIN)/python -c 'from rankwise.lab.demo import model_folder; print(model_folder())')" \
	    runs/all-MiniLM-L6-v2
	$(BIN)/python experiments/pydocs-minilm/rows.py
	$(BIN)/rankwise compare --config experiments/pydocs-minilm/compare.yaml
	$(BIN)/rankwise compare --config experiments/pydocs-minilm/head-lr.yaml
	$(BIN)/python -m experiments.ranks experiments/pydocs-minilm
	$(BIN)/python -m experiments.ranks experiments/pydocs-minilm --results results-head-lr
	$(BIN)/rankwise compare --config experiments/sst2-minilm/compare.yaml \
	    --data $(SST2)/train.tsv --eval $(SST2)/dev.tsv
	$(BIN)/python -m experiments.ranks experiments/sst2-minilm \
	    --data $(SST2)/train.tsv --eval $(SST2)/dev.tsv

format: $(VENV)/.ready-dev ## mend what can be mended by machine
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

constraints: $(VENV)/.ready-dev ## write down in constraints.txt what the environment holds now
	@{ echo "# Every package of the development environment, at the version the tests ran with."; \
	   echo "# Written by \`make constraints\`. pyproject.toml has the lower bounds. A local build of torch"; \
	   echo "# (2.13.0+cpu) satisfies the plain version; its CUDA build brings further packages, which"; \
	   echo "# torch itself pins."; \
	   $(BIN)/python -m pip freeze --all --exclude pip --exclude rankwise | \
	       sed -E 's/[+][[:alnum:].]+$$//'; } > constraints.new
	mv constraints.new constraints.txt

clean: ## remove the environment, the caches and the builds; runs/ stays
	rm -rf $(VENV) build dist
	rm -rf .hypothesis .import_linter_cache .pytest_cache .ruff_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# pip is the last thing a new environment gets, so a half-made one is made again.
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "Rankwise needs Python \
	3.11 or newer, and $(PYTHON) is %d.%d. Name a newer one: make PYTHON=python3.12 ..." % v[:2])'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.ready-demo: EXTRAS := demo
$(VENV)/.ready-dev: EXTRAS := $(EVERYTHING)

# Of what pip has to say, only what takes long (downloads of a megabyte and more, the installing
# itself) is passed on, and its warnings and errors.
$(VENV)/.ready-demo $(VENV)/.ready-dev: pyproject.toml constraints.txt | $(BIN)/pip
	@echo "Installing rankwise[$(EXTRAS)] into $(VENV); the first time brings torch and takes minutes."
	@set -o pipefail; $(BIN)/python -u -m pip install --progress-bar off -e ".[$(EXTRAS)]" | { \
	    grep --line-buffered -oE '^ *Downloading .*[0-9] [MG]B[)]|^(Installing|Successfully).{0,90}' \
	    || true; }
	@touch $@
