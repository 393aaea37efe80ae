# Everything a contributor runs. Each target does its own set-up; `make help` lists them.

PYTHON ?= python3
# Extra words for the installation of torch, such as an index of CPU-only wheels.
TORCH_ARGS ?=
TORCH := torch==2.13.0
DEMO_ARGS ?=
TEST_ARGS ?=
BENCH_ARGS ?=

VENV := .venv
BENCH_VENV := .venv-bench
DOCS_VENV := .venv-docs
# Run once, with shapes checked, and left out of the rest.
CHECKED := $(filter-out tests/ops/test_triton_% tests/ops/test_memory.py,$(wildcard tests/ops/test_*.py))
BUILD_INPUTS := pyproject.toml setup.py build_cuda.py $(wildcard csrc/*.* csrc/*/*.*)
# Most of 19000 modules are never imported: bytecode is made of those that are.
PIP := -m pip --disable-pip-version-check install --no-compile
# Of what pip says: large downloads, and that it goes on.
SHOW := | sed -un -e 's/^ *\(Downloading [^ ]* ([0-9.]* [MG]B)\).*/  \1/p' \
	-e 's/^ *\(Building [a-z]* for [^ ]*\).*/  \1/p' -e 's/^\(Installing\) collected.*/  \1/p'
# Neighbours stay in one process, which makes what they share once.
PYTEST := $(VENV)/bin/python -m pytest -n 2 --dist worksteal
# The claim on the width of minima, with seeds enough to decide it.
DEMO := -m examples run f1 --preset quick --seeds 0-7

# PyTorch's threads sleep instead of spinning when another program wants the core.
export OMP_WAIT_POLICY ?= PASSIVE
# And what one process has compiled to bytecode, the next need not.
unexport PYTHONDONTWRITEBYTECODE
SHELL := bash
.SHELLFLAGS := -o pipefail -c

.DEFAULT_GOAL := help
.PHONY: help setup demo test bench lint docs clean

help:  ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

# $(call environment,FOLDER,EXTRA): the kernels are compiled while packages arrive, torch
# before the others, so that no other one is pulled in.
define environment
	@echo "set-up 1/2: Python environment in $(1)"
	@test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
	@$(1)/bin/python tools/requirements.py $(2) > $(1)/requirements.txt
	@echo "set-up 2/2: fastminima with its native kernels, and $(TORCH) (a minute or two)"
	@$(1)/bin/python $(PIP) --no-deps -e . $(SHOW) & built=$$!; \
	$(1)/bin/python $(PIP) $(TORCH) $(TORCH_ARGS) $(SHOW) && \
	$(1)/bin/python $(PIP) -r $(1)/requirements.txt $(SHOW); installed=$$?; \
	wait $$built && exit $$installed
	@$(1)/bin/python -m fastminima | grep -E '^native'
endef

# timm wants torchvision, which its models do not need.
$(VENV)/.installed: $(BUILD_INPUTS)
	$(call environment,$(VENV),test)
	@$(VENV)/bin/python $(PIP) -q --no-deps timm==1.0.31
	@touch $@

$(BENCH_VENV)/.installed: $(BUILD_INPUTS) $(wildcard benchmarks/install_peers.sh benchmarks/requirements*.txt)
	$(call environment,$(BENCH_VENV),test)
	@echo "the libraries to compare with"
	@bash benchmarks/install_peers.sh $(abspath $(BENCH_VENV)/bin/python)
	@touch $@

$(VENV)/.linters: $(VENV)/.installed
	@echo "set-up: linters"
	@$(VENV)/bin/python tools/requirements.py lint --alone > $(VENV)/linters.txt
	@$(VENV)/bin/python $(PIP) -r $(VENV)/linters.txt $(SHOW)
	@touch $@

# Docstrings are read, not imported: neither torch nor the package is needed.
$(DOCS_VENV)/.installed: pyproject.toml
	@echo "set-up: what builds the documentation, in $(DOCS_VENV)"
	@test -x $(DOCS_VENV)/bin/python || $(PYTHON) -m venv $(DOCS_VENV)
	@$(DOCS_VENV)/bin/python tools/requirements.py docs --alone > $(DOCS_VENV)/docs.txt
	@$(DOCS_VENV)/bin/python $(PIP) -r $(DOCS_VENV)/docs.txt $(SHOW)
	@touch $@

setup: $(VENV)/.installed  ## the environment that demo and test use

demo: $(VENV)/.installed  ## rerun the experiment on width and learning rate / batch size
	@$(VENV)/bin/python $(DEMO) $(DEMO_ARGS)

test: $(VENV)/.installed  ## op tests with shapes checked, models on a device, the suite
	@OMP_NUM_THREADS=1 $(PYTEST) -q -p no:cacheprovider --jaxtyping-packages=fastminima,beartype.beartype $(CHECKED)
	@OMP_NUM_THREADS=1 $(PYTEST) -q -p no:cacheprovider --device apart tests/capture/test_exact.py tests/capture/test_observe.py
	@OMP_NUM_THREADS=1 $(PYTEST) tests $(addprefix --ignore=,$(CHECKED)) $(TEST_ARGS)

bench: $(BENCH_VENV)/.installed  ## time the probes beside other libraries, print the tables
	@$(BENCH_VENV)/bin/python -m benchmarks.tables $(BENCH_ARGS)

lint: $(VENV)/.linters  ## ruff, pyright, clang-format
	@$(VENV)/bin/ruff check --quiet .
	@$(VENV)/bin/ruff format --check --quiet .
	@$(VENV)/bin/clang-format --dry-run -Werror $(filter csrc/%,$(BUILD_INPUTS)) \
		$(wildcard tools/kernels/emulator/*.h tools/kernels/emulator/*.cpp)
	@$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python
	@echo "lint: clean"

docs: $(DOCS_VENV)/.installed  ## the documentation as a site, site/index.html
	@NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict --quiet
	@$(DOCS_VENV)/bin/python -m tools.site.check site

clean:  ## remove what the other targets made (results/ stays)
	rm -rf $(VENV) $(BENCH_VENV) $(DOCS_VENV) site build dist *.egg-info
	rm -rf .pytest_cache .ruff_cache .hypothesis .benchmarks
	rm -f fastminima/_native_ext*.so fastminima/_native_missing.txt fastminima/_cuda_missing.txt
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
