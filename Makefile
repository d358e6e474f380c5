# Two commands do everything, set-up included: `make demo` and `make test`.
#   make PYTHON=/path/to/python TARGET   runs TARGET with an interpreter that has everything already; no .venv is made.

BOOTSTRAP ?= python3
PYTHON ?= .venv/bin/python
WORKERS ?= 8
SETUP := $(if $(filter .venv/bin/python,$(PYTHON)),.venv/ready)
# Trainers whose own code the tests run; without them, as with another PYTHON, these tests are skipped and say so.
FRAMEWORKS ?= .venv/frameworks
FRAMEWORKS_SETUP := $(if $(SETUP),$(FRAMEWORKS)/ready)
export PYTHONPATH := $(CURDIR)

.PHONY: demo test test-quick soak setup frameworks docs lint bench bench-compare bench-report kernels gpu-test gpu-bench gpu-day clean

demo: $(SETUP)
	$(PYTHON) -m yojo.cli demo $(ARGS)

# One thread per worker: the models are tiny, and threads that wait for each other are slower than none.
test: $(SETUP) $(FRAMEWORKS_SETUP)
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest tests --ignore=tests/gpu --ignore=tests/interpreted --ignore=tests/pretended -n auto --dist worksteal $(ARGS)
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(PYTHON) -m pytest tests/interpreted -n auto --dist worksteal $(ARGS)
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest tests/pretended -n auto --dist worksteal $(ARGS)

# The inner loop: whatever takes seconds.
QUICK := tests/test_rooms.py tests/kernels/test_layout.py tests/kernels/test_kernels.py tests/kernels/test_segments.py \
  tests/kernels/test_query_rows.py tests/kernels/test_dispatch.py tests/inputs/test_packing.py tests/inputs/test_messages.py \
  tests/inputs/test_images.py tests/data tests/evaluation tests/patching/test_patch.py tests/patching/test_pooling.py \
  tests/patching/test_media.py tests/training/test_batches.py tests/test_stored_scores.py
test-quick: $(SETUP)
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest $(QUICK) -n auto --dist worksteal $(ARGS)

# What takes longer than it is worth in every run: whole benchmarks, true compilers, many more random rows.
soak: $(SETUP)
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest tests --ignore=tests/gpu --ignore=tests/interpreted --ignore=tests/pretended -m soak -n auto --dist worksteal $(ARGS)
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 STOCK_INTERPRETER=1 $(PYTHON) -m pytest tests/interpreted -m soak -n auto --dist worksteal $(ARGS)

setup: .venv/ready

# The site, in build/docs. Whatever Sphinx warns of is an error; it is installed on first use, and no test needs it.
docs: $(if $(SETUP),.venv/docs)
	$(PYTHON) docs/arguments.py
	$(PYTHON) docs/pages.py --check
	$(PYTHON) -m sphinx -W --keep-going -n -q docs build/docs
	@echo build/docs/index.html

.venv/docs: .venv/ready
	.venv/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

.venv/ready: pyproject.toml constraints.txt
	$(BOOTSTRAP) -m venv .venv
	.venv/bin/python -m pip install --quiet $$(grep -E '^(torch|torchvision)==' constraints.txt)
	.venv/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# Each trainer lies in a folder of its own, without what it depends on: their ranges exclude each other's and ours. tests/frameworks
# has the lists; what they leave out comes from .venv. A folder is put in front of the path of a test's own process.
frameworks: $(FRAMEWORKS)/ready

LISTS := $(wildcard tests/frameworks/*.txt)
$(FRAMEWORKS)/ready: .venv/ready $(LISTS)
	rm -rf $(LISTS:tests/frameworks/%.txt=$(FRAMEWORKS)/%)
	all=1; for list in $(LISTS); do .venv/bin/python -m pip install --quiet --no-deps --no-compile --requirement $$list \
	  --target $(FRAMEWORKS)/$$(basename $$list .txt) || { all=0; echo "$$list: not installed, its tests are skipped" >&2; }; \
	done; [ $$all = 0 ] || touch $@

lint: $(SETUP)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

bench: $(SETUP)
	$(PYTHON) -m pytest bench --benchmark-only $(ARGS)

# Measures anew, or takes the lines in NEW, and sets them beside the committed ones of the same GPU or CPU.
NEW ?= .benchmarks/new
bench-compare: $(SETUP)
ifeq ($(origin NEW),file)
	rm -rf $(NEW)
	$(PYTHON) -m pytest bench --benchmark-only --results $(NEW) $(ARGS)
endif
	$(PYTHON) -m bench.compare $(NEW)

# docs/benchmarks.md, its pictures and the README's table, from bench/results.
bench-report: $(SETUP)
	$(PYTHON) -m bench.report $(ARGS)

# Compiles the kernels for every chip, without a GPU: registers, spills, shared memory, tensor-core instructions.
kernels: $(SETUP)
	$(PYTHON) -m yojo_kernels.aot $(ARGS)

# Most of the time goes into compiling kernels: workers share the GPU and one cache of kernels, and a second run compiles
# nothing. `make PYTHON=python3 gpu-test` needs torch, transformers, peft and pytest, and no network. The portions can be
# run one by one (some tests of one: `make gpu-test-models ARGS='-k graphs'`); `make -k gpu-test` goes on after one that
# failed. Without pytest-xdist there is one worker.
GPU_PORTIONS := gpu-test-attention gpu-test-head gpu-test-models
.PHONY: $(GPU_PORTIONS)

$(GPU_PORTIONS) gpu-bench: export TRITON_CACHE_DIR ?= $(CURDIR)/.kernels

gpu-test: $(GPU_PORTIONS)

gpu-test-attention: GPU_FILES := tests/gpu/test_attention.py
gpu-test-head: GPU_FILES := tests/gpu/test_head_loss.py
gpu-test-models: GPU_FILES := $(filter-out tests/gpu/test_attention.py tests/gpu/test_head_loss.py,$(wildcard tests/gpu/test_*.py))

$(GPU_PORTIONS): $(SETUP)
	$(PYTHON) -m pytest $(GPU_FILES) $(shell $(PYTHON) -c 'import xdist' 2>/dev/null && echo --numprocesses $(WORKERS) --dist worksteal) $(ARGS)

gpu-bench: $(SETUP)
	$(PYTHON) -m pytest bench --benchmark-only --device cuda --results bench/results $(ARGS)

# Smoke, suites, tuning and benchmarks on a borrowed GPU, 9 minutes a call, each going on where the last one ended.
gpu-day: $(SETUP)
	$(PYTHON) -m bench.gpu_day $(ARGS)

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .benchmarks .kernels
