# Each target does all its own set-up on a fresh machine with python3, g++ and make; a second call skips it.
#   make demo       verify, bench, a hybrid model with and without the kernels, asleep, and thinking, into out/demo
#   make test       the tests; then CUDA's and Triton's kernels, run on the CPU and compiled for GPUs that need not be there
#   make test-hardening  what takes two hours more: 20,000 random calls under sanitizers, thousands of examples of every
#                   property, a search for the worst errors, the integrations with the oldest and the newest transformers,
#                   a build for each fault planted in a CUDA kernel, Triton's kernels for every GPU
#   make check      lint, layers, and a quick slice of the tests: two minutes, for each commit
#   make test-cpu, test-triton, test-cuda-emulated, test-sleep, test-integrations, test-offline
#                   one part of make test each; test-mutation: all faults planted in kernels are found
#   make bench      the full benchmark table, its plot and its page (bench.html), into out/bench
#   make wheel      dist/*.whl for this Python, or PYTHONS="python3.11 ...", for systems from glibc 2.28 on
#   make wheel-check  installs that wheel into clean environments without a compiler, and tries it; TORCHES="2.13.0 ..."
#   make wheel-check-arm64  cross-compiles the wheel for 64-bit Arm, and tries it under qemu
#   make lint       ruff, mypy, clang-format
#   make docs       the documentation as pages, into out/site (opens from a disk; its search needs a server, such as
#                   python3 -m http.server -d out/site)
#   make tables     write the number tables and the support matrix of README and docs anew
#   make gpu-check  on a GPU machine: everything worth running there, in one call of 480 seconds, with the python that is
#                   there; OUT=folder PARTS="verify times" WHEELS=folder; DRY=1 rehearses it here. make gpu-profile: one part
#   make clean      remove what make made
#   make help       this list

PYTHON ?= python3
TORCH ?= torch==2.13.0
OUT ?= out/gpu
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh') CMakeLists.txt setup.py

TORCHES ?= $(patsubst torch==%,%,$(TORCH))

.PHONY: demo check test test-cpu test-triton test-cuda-emulated test-sleep test-integrations test-mutation test-offline test-hardening test-thorough test-kernels test-sanitized test-properties test-errors test-oldest test-newest test-oldest-triton bench wheel wheel-check wheel-check-arm64 lint docs tables gpu-check gpu-profile gpu-wheels clean help
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

demo: $(VENV)/built
	$(BIN)/python -m sleepkern demo --out out/demo

PYTEST := $(BIN)/python -m pytest
USUAL := -m "not alone and not hardening" -n auto
QUICK := tests/repo tests/nn/test_modules.py tests/backends/test_reference.py $(addprefix tests/backends/cpu/test_,binding.py memory.py) \
  $(addprefix tests/ops/test_,arguments.py bad_input.py dispatch.py defaults.py fast_path.py)
check: lint $(VENV)/built
	$(PYTEST) $(QUICK) $(USUAL)

test: $(VENV)/built
	$(PYTEST) $(USUAL)
	$(PYTEST) -m alone
	$(MAKE) --no-print-directory test-cuda-emulated test-triton test-offline

test-cpu: $(VENV)/built
	$(PYTEST) tests/ops tests/autograd tests/backends/test_*.py tests/backends/cpu $(USUAL)

test-triton: $(VENV)/built
	TRITON_INTERPRET=1 $(PYTEST) tests/backends/triton_interpreted $(USUAL)
	$(PYTEST) tests/backends/launches

test-cuda-emulated: $(VENV)/built
	$(PYTEST) tests/backends/cuda_emulated $(USUAL)

test-sleep: $(VENV)/built
	$(PYTEST) tests/sleep tests/nn tests/ops/test_blocks*.py $(USUAL)

test-integrations: $(VENV)/built
	$(PYTEST) tests/integrations $(USUAL)

test-mutation: $(VENV)/built
	$(PYTEST) tests/backends/cpu -m mutation -n auto
	$(PYTEST) tests/backends/cuda_emulated -m mutation -n auto
	TRITON_INTERPRET=1 $(PYTEST) tests/backends/triton_interpreted -m mutation -n auto

test-offline: $(VENV)/built
	$(BIN)/python -m tests.offline.cuda.gate
	$(BIN)/python -m tests.offline.triton.gate --quick

# The versions of transformers beside the pinned one, each in a folder that PYTHONPATH puts before the other packages.
# The newest is fetched anew each time, so that a release is seen here, and does not turn `make test` red.
OLDEST := $(VENV)/transformers-oldest
NEWEST := $(VENV)/transformers-newest
PATCHED := $(addprefix tests/integrations/test_,transformers_versions.py transformers.py patching.py)

test-hardening: test-thorough test-kernels test-sanitized test-properties test-errors test-oldest test-newest test-oldest-triton

test-thorough: $(VENV)/built
	$(PYTEST) -m hardening -n auto

test-kernels: $(VENV)/built
	$(PYTEST) tests/backends/cuda_emulated -m hardening -n auto
	TRITON_INTERPRET=1 $(PYTEST) tests/backends/triton_interpreted -m hardening -n auto
	$(BIN)/python -m tests.offline.triton.gate

test-sanitized: $(VENV)/built
	$(BIN)/python -m tests.hardening.fuzz_calls --sanitize --calls 20000

test-properties: $(VENV)/built
	$(PYTEST) tests/ops/test_properties.py --hypothesis-profile=full -n auto

test-errors: $(VENV)/built
	$(BIN)/python -m tests.hardening.worst_errors --seconds 300 --out out/worst_errors.json

test-oldest: $(VENV)/built $(OLDEST)/installed
	PYTHONPATH=$(OLDEST) $(PYTEST) $(PATCHED) -n auto

test-newest: $(VENV)/built
	rm -rf $(NEWEST)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --target $(NEWEST) transformers
	PYTHONPATH=$(NEWEST) $(PYTEST) $(PATCHED) $(addprefix tests/integrations/test_,mamba2.py packing.py call_mapping.py mixers.py flash_attention.py) \
	  tests/measure/test_model_cases.py $(filter-out %/test_cuda_graph.py %/test_threads.py,$(wildcard tests/sleep/*.py)) -n auto

# The oldest Triton that is promised, which a GPU machine may have, in a folder of its own: 190 MB.
OLDEST_TRITON := $(VENV)/triton-oldest
test-oldest-triton: $(VENV)/built $(OLDEST_TRITON)/installed
	PYTHONPATH=$(OLDEST_TRITON) $(BIN)/python -m tests.offline.triton.gate --quick

$(OLDEST_TRITON)/installed: $(VENV)/installed
	rm -rf $(OLDEST_TRITON)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(OLDEST_TRITON) triton==3.6.0
	touch $@

$(OLDEST)/installed: requirements-oldest.txt $(VENV)/installed
	rm -rf $(OLDEST)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(OLDEST) -r requirements-oldest.txt
	touch $@

# Peers whose import names others look for are seen by this target alone.
bench: $(VENV)/built $(VENV)/peers/installed
	mkdir -p out/bench
	PYTHONPATH=$(CURDIR)/$(VENV)/peers $(BIN)/python -m sleepkern bench --json out/bench/bench.json \
	  --plot out/bench/bench.png --report out/bench
	$(PYTEST) benchmarks --benchmark-only --benchmark-json=out/bench/pytest-benchmark.json

$(VENV)/peers/installed: requirements-peers.txt $(VENV)/installed
	rm -rf $(VENV)/peers
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(VENV)/peers -r requirements-peers.txt
	mkdir -p $(VENV)/peers && touch $@

# Neither needs .venv. PYTHONS="python3.11 python3.12": a wheel for each; its own Python tries it.
PYTHONS ?= $(PYTHON)
wheel:
	$(firstword $(PYTHONS)) packaging/wheel.py $(PYTHONS:%=--python %)

wheel-check:
	ls dist/*.whl >/dev/null 2>&1 || $(MAKE) --no-print-directory wheel
	for python in $(PYTHONS); do $$python packaging/wheel_check.py dist $(TORCHES:%=--torch %) || exit 1; done

wheel-check-arm64:
	$(PYTHON) packaging/arm64_check.py

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(filter csrc/%,$(SOURCES)) $(wildcard tests/backends/cuda_emulated/*.h tests/backends/*/*.cpp packaging/*.cpp)

# The pages need the sources only: no torch, nothing compiled.
docs: $(VENV)/docs/installed
	NO_MKDOCS_2_WARNING=1 $(VENV)/docs/bin/python -m mkdocs build --strict
	$(VENV)/docs/bin/python docs/site/check.py out/site

$(VENV)/docs/installed: requirements-docs.txt
	$(VENV)/docs/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)/docs
	$(VENV)/docs/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-docs.txt
	touch $@

tables: $(VENV)/built
	$(BIN)/python -m benchmarks.tables

# Torch comes first and pinned: without it other packages would pull a build with gigabytes of CUDA.
$(VENV)/installed: requirements.txt requirements-fla.txt
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo "Installing the packages of requirements.txt into $(VENV): a few minutes, once"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	rm -rf $(VENV)/fla
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(VENV)/fla -r requirements-fla.txt
	touch $@

$(VENV)/built: $(VENV)/installed $(SOURCES) pyproject.toml
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python setup.py --quiet build_ext --inplace
	touch $@

# No network and no virtual environment: builds in place and runs with what the machine has. One red part does not hide
# the others, and results are written as they come. WHEELS has the peers as files, which `make gpu-wheels` packs.
DRY ?=
PARTS ?=
WHEELS ?=
GPU_CHECK = $(PYTHON) -m benchmarks.gpu_check $(OUT) $(if $(DRY),--dry) $(if $(WHEELS),--wheels $(WHEELS))
gpu-check:
	$(GPU_CHECK) $(if $(PARTS),--only $(PARTS))

gpu-profile:
	$(GPU_CHECK) --only profile

gpu-wheels:
	$(PYTHON) -m benchmarks.gpu_check.wheels $(or $(WHEELS),build/wheels)

clean:
	rm -rf $(VENV) build out dist *.egg-info sleepkern/*.so

help:
	@sed -n 's/^#   //p' $(firstword $(MAKEFILE_LIST))
