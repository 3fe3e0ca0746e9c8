# Two commands do all the set-up they need: `make bench` and `make test`. The others are parts of CI.
# `make VENV=path ...` uses (or makes) a virtual environment of your own.

VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
SOURCES := $(shell find csrc pyops optim autotune bench -name '*.py' -o -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
PYTEST := $(BIN)/python -m pytest
PARALLEL := -n auto --maxprocesses 4 --dist loadgroup

.PHONY: bench test exhaustive setup lint types format-check sanitize oldest interpreter aot docs isa gpu clean

bench: $(VENV)/.installed
	$(BIN)/leanops bench --quick

# the tier of the tests: default, ci or exhaustive (docs/testing.md)
export LEANOPS_TIER ?= default

test: $(VENV)/.installed
	$(PYTEST) $(PARALLEL)

# everything that the other two tiers leave out: hours
exhaustive: export LEANOPS_TIER = exhaustive
exhaustive: $(VENV)/.installed
	$(PYTEST) $(PARALLEL)
	$(PYTEST) tests/ops/test_speed.py --benchmark-enable
	$(MAKE) isa
	$(BIN)/python tests/native/sanitize.py

setup: $(VENV)/.installed

# strict editable mode links single files, so a new file needs this again; an edited one does not
$(VENV)/.installed: constraints.txt pyproject.toml setup.py $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch triton numpy setuptools ninja
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation --editable '.[bench,dev]'
	touch $@

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format-check: $(VENV)/.installed
	$(BIN)/clang-format --dry-run --Werror $$(find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

types: $(VENV)/.installed
	$(BIN)/mypy -p leanops

# the generic suites with each lesser instruction set, and without the library; `make test` runs the machine's own
LESSER := from leanops import _native; sets = ["baseline", "avx2", "avx512"]; print(*sets[:sets.index(_native.cpu_isa())])
isa: $(VENV)/.installed
	sets=$$($(BIN)/python -c '$(LESSER)') || exit 1; for isa in $$sets; do LEANOPS_CPU_ISA=$$isa $(PYTEST) $(PARALLEL) tests/ops/test_numerics.py tests/ops/test_fuzz.py || exit 1; done
	LEANOPS_DISABLE=cpu $(PYTEST) $(PARALLEL) tests/ops/test_numerics.py -k agree

# memory errors and undefined behaviour; `make exhaustive` adds races between threads
sanitize: $(VENV)/.installed
	$(BIN)/python tests/native/sanitize.py address,undefined

# csrc against the headers of the oldest torch that the package supports
oldest: $(VENV)/.installed
	$(BIN)/python tests/native/oldest_torch.py

interpreter: $(VENV)/.installed
	$(PYTEST) $(PARALLEL) tests/interpreter tests/*/test_interpreted.py

aot: $(VENV)/.installed
	$(BIN)/python tests/aot/aot.py

docs: $(VENV)/.installed
	$(BIN)/mkdocs build --strict

# on a machine with a CUDA GPU, see tests/gpu/run.py; `make gpu STEPS="build generic"` runs only these
gpu:
	$(PYTHON) tests/gpu/run.py $(STEPS)

clean:
	rm -rf build dist site .venv *.egg-info
