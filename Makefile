# Each target does all its own set-up on a fresh machine with python3, g++ and make; a second call skips it.
#   make demo       verify, bench, and a hybrid model with and without the kernels, into out/demo
#   make test       the tests; then Triton's kernels, interpreted on the CPU and compiled for GPUs that need not be there
#   make bench      the full benchmark table and plot, into out/bench
#   make lint       ruff, mypy, clang-format
#   make gpu-check  on a GPU machine: everything worth running there, with the python that is there; OUT=folder
#   make clean      remove what make made
#   make help       this list

PYTHON ?= python3
TORCH ?= torch==2.13.0
OUT ?= out/gpu
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh') CMakeLists.txt setup.py

.PHONY: demo test bench lint gpu-check clean help
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

demo: $(VENV)/built
	$(BIN)/python -m sleepkern demo --out out/demo

test: $(VENV)/built
	$(BIN)/python -m pytest
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/triton_interpreted
	$(BIN)/python tests/triton_offline/gate.py

bench: $(VENV)/built
	mkdir -p out/bench
	$(BIN)/python -m sleepkern bench --json out/bench/bench.json --plot out/bench/bench.png
	$(BIN)/python -m pytest benchmarks --benchmark-only --benchmark-json=out/bench/pytest-benchmark.json

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(filter csrc/%,$(SOURCES))

# Torch comes first and pinned: without it other packages would pull a build with gigabytes of CUDA.
$(VENV)/installed: requirements.txt
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo "Installing the packages of requirements.txt into $(VENV): a few minutes, once"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/built: $(VENV)/installed $(SOURCES) pyproject.toml
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python setup.py --quiet build_ext --inplace
	touch $@

# No network and no virtual environment: builds in place and runs with what the machine has, in under 8 minutes. One red
# part does not hide the others: all run, and the exit status is the last bad one.
gpu-check:
	mkdir -p $(OUT)
	timeout 150 $(PYTHON) setup.py --quiet build_ext --inplace
	status=0; \
	timeout 60 $(PYTHON) -m sleepkern info --json $(OUT)/info.json || status=$$?; \
	timeout 120 $(PYTHON) -m sleepkern verify --device cuda --quick --json $(OUT)/verify.json || status=$$?; \
	timeout 140 $(PYTHON) -m sleepkern bench --device cuda --quick --json $(OUT)/bench.json --plot $(OUT)/bench.png \
	  || status=$$?; \
	exit $$status

clean:
	rm -rf $(VENV) build out dist *.egg-info sleepkern/*.so

help:
	@sed -n 's/^#   //p' $(firstword $(MAKEFILE_LIST))
