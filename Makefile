# Every target sets up what it needs. The versions are those of constraints.txt, which were
# tried together; `make CONSTRAINTS= test` takes the newest within the bounds of settings.ini.
PYTHON ?= python3
VENV ?= .venv
TGI_VENV ?= .venv-tgi
CONSTRAINTS ?= constraints.txt
ARGS ?=

BIN := $(VENV)/bin
READY := $(VENV)/.ready
TGI_READY := $(TGI_VENV)/.ready
PIP := -m pip --disable-pip-version-check -qq
CHECK_PYTHON := import sys; v = sys.version.split()[0]; \
  sys.version_info >= (3, 11) or sys.exit("llmnotes needs Python 3.11 or newer and $(PYTHON) is " \
  + v + "; name another one: make PYTHON=python3.12 ...")

.DEFAULT_GOAL := help
.PHONY: help setup run test lab docs bench sync update tgi-client clean distclean

help: ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1 # \2/p' Makefile | awk -F'#' '{printf "%-18s%s\n", $$1, $$2}'

setup: $(READY) ## Make the environment in .venv; quick when it is there

$(READY): settings.ini setup.py pyproject.toml $(CONSTRAINTS)
	@command -v "$(PYTHON)" >/dev/null || { echo "llmnotes needs Python 3.11 or newer and there is no $(PYTHON); name one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@"$(PYTHON)" -c '$(CHECK_PYTHON)'
	@echo "Setting up $(VENV): about 2 GB, some minutes, once"
	@"$(PYTHON)" -m venv "$(VENV)"
	@"$(BIN)/python" $(PIP) install $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) -e '.[dev]'
	@touch $@

run: $(READY) ## One model from raw text to a served endpoint; ARGS="--scale gpu" and the like
	@"$(BIN)/llmnotes" run $(ARGS)

test: $(READY) ## Run all tests; ARGS="-k structure" and the like
	@"$(BIN)/python" -m pytest $(ARGS)

lab: $(READY) ## Open the notebooks in JupyterLab
	@"$(BIN)/jupyter" lab nbs $(ARGS)

docs: $(READY) ## Build the site into _docs (needs Quarto)
	@command -v quarto >/dev/null || { echo "make docs needs Quarto (quarto.org). README.md does not: make sync" >&2; exit 1; }
	@"$(BIN)/python" tools/sync.py && touch README.md
	@PATH="$(abspath $(BIN)):$$PATH" nbdev_docs && cp llms.txt _docs/

bench: $(READY) ## Run every benchmark; tables go to benchmarks/results
	@set -e; for f in benchmarks/[a-z]*.py; do echo "$$f"; "$(BIN)/python" "$$f" $(ARGS); done

sync: $(READY) ## Before a commit: export, clean, and remake what is derived
	@PATH="$(abspath $(BIN)):$$PATH"; nbdev_export && nbdev_clean
	@"$(BIN)/python" tools/sync.py

update: ## Try the newest versions within the bounds, and write constraints.txt
	@"$(MAKE)" CONSTRAINTS= VENV=.venv-new PYTHON="$(PYTHON)" test
	@.venv-new/bin/python tools/pin.py > constraints.new && mv constraints.new constraints.txt

tgi-client: $(TGI_READY) ## The text-generation client, in an environment of its own

# text-generation 0.7.0 wants huggingface-hub below 1.0, transformers 5 wants 1.x.
$(TGI_READY): Makefile
	@"$(PYTHON)" -c '$(CHECK_PYTHON)'
	@"$(PYTHON)" -m venv "$(TGI_VENV)"
	@"$(TGI_VENV)/bin/python" $(PIP) install text-generation==0.7.0 requests
	@touch $@

clean: ## Remove what was built; environments and runs stay
	rm -rf _proc _docs build dist *.egg-info .pytest_cache .ruff_cache nbs/nbdev.yml nbs/sidebar.yml
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

distclean: clean ## Remove environments and runs as well
	rm -rf "$(VENV)" .venv-new "$(TGI_VENV)" runs
