# Two commands set everything up by themselves: `make demo` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
PY     := $(VENV)/bin/python
# An index with a CPU build of torch saves gigabytes where PyPI's own would be the CUDA build; only
# torch itself is looked up there.
TORCH_INDEX ?=

# Everything that a run leaves behind stays in this folder.
export XDG_CACHE_HOME := $(CURDIR)/.cache
export TORCHINDUCTOR_CACHE_DIR := $(CURDIR)/.cache/inductor
export TRITON_CACHE_DIR := $(CURDIR)/.cache/triton
export MPLCONFIGDIR := $(CURDIR)/.cache/matplotlib
export PIP_CACHE_DIR := $(CURDIR)/.cache/pip
export PRE_COMMIT_HOME := $(CURDIR)/.cache/pre-commit
export TMPDIR := $(CURDIR)/.cache/tmp
# Python falls back to /tmp, without a word, where TMPDIR is missing.
$(shell mkdir -p "$(TMPDIR)")

READY   := $(VENV)/.ready
LIBRARY := gpl_fast/libgpl_fast.so
CSRC    := $(foreach folder,csrc csrc/* csrc/*/*,$(wildcard $(addprefix $(folder)/*.,cpp h cu cuh)))
BUILD   := $(CSRC) $(wildcard csrc/*.py) setup.py gpl_fast/environment.py gpl_fast/sources.py

.PHONY: help venv build demo check check-cpu check-interpreter
.PHONY: test test-cpu test-edges test-stages test-interpreter test-compile test-compile-all test-cuda
.PHONY: test-peers test-frameworks test-experiments extras docs
.PHONY: sanitize lint matrix test-versions
.PHONY: bench bench-gpu gpu-report toy wheel clean
.DELETE_ON_ERROR:

help:
	@echo "make demo   train with and without the loss; pictures and a report in demo_out/"
	@echo "make check  lint, types and a cross-section of the tests, within two minutes"
	@echo "make test   all tests that need no GPU; -j2 runs two parts at a time:"
	@echo "  test-cpu          the package on the CPU"
	@echo "  test-edges        ordinary use that goes wrong silently or crashes"
	@echo "  test-stages       every stage, whoever computes it: CPU, Triton, CUDA run on the CPU"
	@echo "  test-interpreter  the whole loss by Triton's kernels, interpreted"
	@echo "  test-compile      what Triton and nvcc made of the kernels, for every GPU"
	@echo "  test-cuda         backward walks by CUDA's kernels on the CPU; faults put into these"
	@echo "make test-peers  against the packages whose losses ours replace, which it installs"
	@echo "make test-frameworks  the recipes in examples/ by the real frameworks, which it installs"
	@echo "make docs   the documentation site, into build/site"
	@echo "make test-experiments  each of the sources' experiments, in seconds"
	@echo "make test-compile-all  what every Triton from 3.6 on made of them: minutes each, the network"
	@echo "make test-versions  a cross-section with every Python that is supported; the network"
	@echo "make sanitize  the CPU kernels under AddressSanitizer and UBSan"
	@echo "make matrix which option is tested by whom, in which dtype, against which target"
	@echo "make lint   ruff, mypy, clang-format"
	@echo "make bench  time and memory on this machine, ten minutes on two cores (twenty with lpips)"
	@echo "make bench-gpu  the same of a GPU's workloads, with PYTHON and its torch"
	@echo "make gpu-report  is a GPU right, how fast, and as predicted, with PYTHON and its torch"
	@echo "make toy    the toy experiment of the paper's supplement, into toy_out/"
	@echo "make wheel  a wheel in dist/"
	@echo "make venv   the virtual environment only; make clean removes what was built"

venv: $(READY)

# torch comes first and alone, so that no other index than PyPI is asked for anything else.
$(READY): pyproject.toml constraints.txt setup.py
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=..." if sys.version_info < (3, 11) else 0)'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --no-deps -c constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch
	$(PY) -m pip install -c constraints.txt torch numpy setuptools wheel ninja pybind11
	$(PY) -m pip install -c constraints.txt --no-build-isolation -e '.[demo,test,dev]'
	touch $@

build: $(LIBRARY)

$(LIBRARY): $(BUILD) | $(READY)
	@# On the first run pip has just built it.
	if ! test -s $@ || test -n "$$(find $(BUILD) -type f -newer $@)"; then \
	  $(PY) setup.py -q build_ext --inplace && touch $@; fi

demo: $(LIBRARY)
	$(PY) -m gpl_fast demo --out demo_out

# Triton either interprets or compiles in a process.
INTERPRETING := test-stages test-interpreter test-cuda check-interpreter
$(INTERPRETING): export TRITON_INTERPRET = 1
# One thread plays a kernel; those of the reference beside it would take the other core in vain.
$(INTERPRETING): export OMP_NUM_THREADS = 1
OF_CUDA := $(wildcard tests/gpuless/test_cuda_*.py)

# Two at a time, what each says at its end.
check: $(LIBRARY)
	@$(MAKE) --no-print-directory -j2 -Otarget check-interpreter check-cpu lint

check-cpu: $(LIBRARY)
	$(PY) -m pytest -m check tests/cpu tests/edges tests/compile tests/gpuless

check-interpreter: $(LIBRARY)
	$(PY) -m pytest -m check tests/stages tests/interpreter tests/cuda_on_cpu tests/gpuless

test: test-cpu test-edges test-stages test-interpreter test-compile test-cuda

test-cpu: $(LIBRARY)
	$(PY) -m pytest

test-edges: $(LIBRARY)
	$(PY) -m pytest tests/edges

test-stages: $(LIBRARY)
	$(PY) -m pytest tests/stages

test-interpreter: $(LIBRARY)
	$(PY) -m pytest tests/interpreter tests/gpuless $(OF_CUDA:%=--ignore=%)

test-compile: $(LIBRARY)
	$(PY) -m pytest tests/compile tests/gpuless $(OF_CUDA:%=--ignore=%)

# What our losses replace. Of the last two nothing but files is used: they come without the packages
# that they need, into a folder of their own.
PEERS := $(VENV)/.peers
PEER_FILES := basicsr mmsegmentation
EXTRA := import sys, tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
  print(*project["optional-dependencies"][sys.argv[1]])

test-peers: $(LIBRARY) $(PEERS)
	$(PY) -m pytest tests/peers

$(PEERS): pyproject.toml constraints.txt | $(READY)
	$(PY) -m pip install -c constraints.txt $$($(PY) -c '$(EXTRA)' peers)
	rm -rf $(VENV)/peers
	$(PY) -m pip install -c constraints.txt --no-deps --no-build-isolation --target $(VENV)/peers $(PEER_FILES)
	touch $@

FRAMEWORKS := $(VENV)/.frameworks

test-frameworks: $(LIBRARY) $(FRAMEWORKS)
	$(PY) -m pytest tests/frameworks

EXPERIMENTS := $(VENV)/.experiments

test-experiments: $(LIBRARY) $(EXPERIMENTS)
	$(PY) -m pytest tests/experiments

$(EXPERIMENTS): pyproject.toml constraints.txt | $(READY)
	$(PY) -m pip install -c constraints.txt $$($(PY) -c '$(EXTRA)' experiments)
	touch $@

$(FRAMEWORKS): pyproject.toml constraints.txt | $(READY)
	$(PY) -m pip install -c constraints.txt $$($(PY) -c '$(EXTRA)' frameworks)
	touch $@

# Each in an environment of its own, of a Python that is there: VERSIONS="python3.12-2.13.0".
VERSIONS ?= python3.11-2.13.0 python3.12-2.13.0 python3.13-2.13.0
OF_A_VERSION := numpy safetensors pytest pytest-timeout pytest-benchmark hypothesis "setuptools>=77" ninja \
  pyyaml pillow matplotlib rich scikit-learn triton

test-versions: $(VERSIONS:%=test-version-%)

test-version-%: $(LIBRARY)
	rm -rf .cache/versions/$*
	$(word 1,$(subst -, ,$*)) -m venv .cache/versions/$*
	.cache/versions/$*/bin/python -m pip install -q torch==$(word 2,$(subst -, ,$*)) $(OF_A_VERSION)
	.cache/versions/$*/bin/python -m gpl_fast info --check
	.cache/versions/$*/bin/python -m pytest -m check tests/cpu tests/edges
DOCS := $(VENV)/.docs

# What the tests of peers and frameworks and the site need, where they run side by side.
extras: $(PEERS) $(FRAMEWORKS) $(EXPERIMENTS) $(DOCS)

docs: $(LIBRARY) $(DOCS)
	$(PY) -m sphinx -q -W --keep-going -b html docs build/site

$(DOCS): pyproject.toml constraints.txt | $(READY)
	$(PY) -m pip install -c constraints.txt $$($(PY) -c '$(EXTRA)' docs)
	touch $@

# Each in a folder that goes before the environment's own; `make -k` goes on where one cannot be had.
TRITONS ?= 3.6.0 3.7.1 3.8.0 3.9.0
TRITON_FOLDER := .cache/tritons

test-compile-all: $(TRITONS:%=test-compile-%)

test-compile-%: $(LIBRARY) $(TRITON_FOLDER)/%/.ready
	PYTHONPATH="$(CURDIR)/$(TRITON_FOLDER)/$*" $(PY) -m pytest tests/compile tests/gpuless \
	  $(OF_CUDA:%=--ignore=%) --ignore=tests/compile/test_nvcc.py $(TESTS)

.PRECIOUS: $(TRITON_FOLDER)/%/.ready
$(TRITON_FOLDER)/%/.ready: | $(READY)
	rm -rf $(@D)
	$(PY) -m pip install -q --no-cache-dir --no-deps --target $(@D) triton==$* || { \
	  echo "test-compile-all: Triton $* cannot be had here; nothing was tested with it"; exit 1; }
	touch $@

test-cuda: $(LIBRARY)
	$(PY) -m pytest tests/cuda_on_cpu $(OF_CUDA)

# A build of its own, anew each time: the library that the package has would take its place.
sanitize: export PYTHONSAFEPATH = 1
sanitize: export PYTHONPATH = $(CURDIR)/build/sanitized
sanitize: export ASAN_OPTIONS = detect_leaks=0
sanitize: export UBSAN_OPTIONS = halt_on_error=1:print_stacktrace=1
sanitize: | $(READY)
	rm -rf build/sanitized build/sanitized.temp
	CXXFLAGS="-fsanitize=address,undefined -g1 -O1" LDFLAGS="-fsanitize=address,undefined" \
	GPL_FAST_FORCE_CUDA=0 $(PY) setup.py -q build --build-lib build/sanitized --build-temp build/sanitized.temp
	grep -q __asan_init build/sanitized/gpl_fast/$(notdir $(LIBRARY))
	LD_PRELOAD="$(foreach l,asan ubsan stdc++,$(shell $(CXX) -print-file-name=lib$(l).so))" \
	$(PY) -m pytest -s tests/stages tests/cpu/test_fast.py tests/cpu/test_invariants.py \
	  --implementation cpu -k "stages or float64 or (test_invariants and fast)"

matrix: $(LIBRARY)
	$(PY) tests/matrix.py

lint: | $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(if $(CSRC),$(VENV)/bin/clang-format --dry-run --Werror $(CSRC))

bench: $(LIBRARY)
	$(PY) benchmarks/run.py --plot docs/images/benchmark.png

# No environment is made: a machine with a GPU has its own torch, and may have no network.
bench-gpu gpu-report: export GPL_FAST_FORCE_CUDA = 1
bench-gpu:
	PYTHONPATH="$(CURDIR):$$PYTHONPATH" $(PYTHON) benchmarks/gpu_report.py --steps library times baselines $(REPORT)

gpu-report:
	PYTHONPATH="$(CURDIR):$$PYTHONPATH" $(PYTHON) benchmarks/gpu_report.py $(REPORT)

toy: $(LIBRARY) $(EXPERIMENTS)
	$(PY) -m gpl_fast experiment toy --out toy_out

wheel: | $(READY)
	$(PY) -m pip wheel --no-build-isolation --no-deps -w dist .

clean:
	rm -rf build dist demo_out toy_out *.egg-info $(LIBRARY)
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks .cache/tmp
	find gpl_fast tests benchmarks examples docs -name __pycache__ -prune -exec rm -rf {} +
