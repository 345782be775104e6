# The commands of the README. Each does its own set-up; nothing outside this folder is touched.
VENV   := .venv
BIN    := $(VENV)/bin
PYTHON ?= python3
SETS   ?= digits-vit docs-bert docs-llama
NOTEBOOKS ?=
CORES  ?= 2

# One thread per process: Snakemake runs CORES notebooks side by side, and sums do not depend on the machine's core count.
export OMP_NUM_THREADS ?= 1
export JUPYTER_PATH := $(CURDIR)/$(VENV)/share/jupyter
export JUPYTER_PREFER_ENV_PATH := 1

.PHONY: report test lab lint bench notebooks lock
