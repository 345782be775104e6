# The commands of the README: `make` lists them. Each does its own set-up, and touches nothing outside this folder and uv's cache.
VENV   := .venv
BIN    := $(CURDIR)/$(VENV)/bin
PYTHON ?= python3
SETS   ?= digits-vit docs-llama scenes-pi3
CORES  ?= 2
# Where the jobs of `make report` run: a folder of profiles/, empty for this machine. Elsewhere their errors are not seen here, and
# Snakemake tells them only where it tells all about the jobs.
PROFILE ?=
PROFILES := $(patsubst profiles/%/config.yaml,%,$(wildcard profiles/*/config.yaml))
ifneq ($(filter-out $(PROFILES),$(PROFILE)),)
$(error `PROFILE` must be empty or one of [$(PROFILES)], got '$(PROFILE)')
endif

# One thread per process: CORES notebooks run side by side, and sums do not depend on the number of cores.
export OMP_NUM_THREADS ?= 1
export OPENBLAS_NUM_THREADS ?= $(OMP_NUM_THREADS)
export PATH := $(BIN):$(PATH)
export JUPYTER_PATH := $(CURDIR)/$(VENV)/share/jupyter
export JUPYTER_PREFER_ENV_PATH := 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help report compare publish site test test-fast cluster-test lab lint bench gpu soak notebooks readme lock

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*  ## \(.*\)/\1|\2/p' $(MAKEFILE_LIST) | while IFS='|' read -r name text; do printf '%-14s%s\n' "$$name" "$$text"; done

report: $(VENV)/.ok  ## execute the notebooks for SETS into outputs/run/, and compare with the published results in outputs/
	snakemake $(if $(PROFILE),--profile profiles/$(PROFILE),--cores $(CORES)) --config sets='$(SETS)' \
		--rerun-incomplete --nolock --keep-going --quiet host reason $(if $(PROFILE),,rules)
	@python -m lowrank.report compare || test $$? = 1 # a difference is a finding, not a failed command

compare: $(VENV)/.ok  ## the results in outputs/run/ against the published ones; fails if any differs beyond its tolerance
	python -m lowrank.report compare

publish: $(VENV)/.ok  ## put the results of SETS in the place of the published ones, and fill the README
	python -m lowrank.report publish $(SETS)
	python -m lowrank.report readme

site: $(VENV)/.ok  ## the results of SETS, your own or the published ones, as pages in _site/: start with _site/index.html
	python -m lowrank.report site $(SETS)

test: lint  ## ruff, pyright, unit tests, notebook guards, nbval
	python -m pytest -q -n $(CORES) --dist loadfile
	LOWRANK_OUTPUTS=$$(mktemp -d) python -m pytest -q -n $(CORES) --dist loadfile --nbval-lax --nbval-current-env notebooks

test-fast: lint  ## lint and the quick unit tests, under two minutes
	python -m pytest -q -n $(CORES) -m 'not slow and not browser and not report'

cluster-test: $(VENV)/.ok  ## a small report on a real Slurm of one node, installed from Debian's packages; needs root
	tests/cluster/run

lint: $(VENV)/.ok  ## ruff, pyright, and the import contract
	ruff check
	ruff format --check
	pyright
	lint-imports --no-logo

lab: $(VENV)/.ok  ## JupyterLab; .py and .ipynb of a pair both open as a notebook
	jupyter lab --notebook-dir $(CURDIR) $(if $(filter 0,$(shell id -u)),--allow-root)

bench: $(VENV)/.ok  ## ratios of time and memory, measured in one run
	python -m pytest -q -o addopts= benchmarks/bench_*.py --benchmark-only --benchmark-columns=median,rounds

gpu:  ## the measured parts at real sizes on one GPU, in minutes; needs torch, transformers, timm and peft, not Jupyter
	PYTHONPATH=$(CURDIR) $(PYTHON) benchmarks/gpu.py

soak: $(VENV)/.ok  ## kill the report at 20 random moments: it ends with the published tables
	python tests/soak.py '$(SETS)' --cores $(CORES)

notebooks: $(VENV)/.ok  ## store the notebooks with the outputs of their default sets
	python -m lowrank.report pair

readme: $(VENV)/.ok  ## fill the README's tables from outputs/
	python -m lowrank.report readme

lock: $(VENV)/.ok  ## resolve pyproject.toml anew
	uv pip compile -q --universal --python-version 3.11 --all-extras --generate-hashes --no-header \
		--no-emit-package lowrank pyproject.toml -o requirements.lock

# JupyterLab opens a .py of a pair as text, and asks about news from the web, unless it is told not to.
LAB_SETTINGS := {"@jupyterlab/docmanager-extension:plugin": {"defaultViewers": {"python": "Jupytext Notebook"}}, "@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": false}}

# uv comes from the lock too: its pin is read from there.
$(VENV)/.ok: requirements.lock pyproject.toml
	@test ! -L $(VENV) || { echo "error: $(VENV) must be a folder of this checkout, got a link to $$(readlink -f $(VENV)):" \
		"an install there would take the package away from its own checkout; remove the link, and make sets up a new one" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check "$$(sed -n 's/^\(uv==[^ ]*\).*/\1/p' requirements.lock)"
	$(BIN)/uv pip sync -q --python $(BIN)/python --require-hashes requirements.lock
	$(BIN)/uv pip install -q --python $(BIN)/python --no-deps --no-build-isolation -e .
	$(BIN)/python -m ipykernel install --sys-prefix --name python3 --display-name "Python 3 (lowrank)" > /dev/null 2>&1
	mkdir -p $(VENV)/share/jupyter/lab/settings $(VENV)/etc/ipython
	printf '%s' '$(LAB_SETTINGS)' > $(VENV)/share/jupyter/lab/settings/overrides.json
	printf '%s' '{"IPKernelApp": {"log_level": 40}}' > $(VENV)/etc/ipython/ipython_kernel_config.json
	touch $@
