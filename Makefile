# Two commands for a newcomer: `make demo` and `make test`. Both do their own set-up in .venv.
PYTHON ?= python3
VENV ?= .venv
# The versions every figure in the README was taken with; `make demo TORCH=torch` takes the newest.
TORCH ?= torch==2.13.0
TRITON ?= triton==3.8.0
DEMO ?= runs/demo
DEMO_ARGS ?=
# Of `make verify-gpu`: seconds for all of it, and its parts; none: 900 and all but the tests.
SECONDS ?=
PARTS ?=
# Of `make verify-deep`: releases of torch; none: the oldest that pyproject.toml allows, 2.11.0 and the newest.
VERSIONS ?=

# Of `make test`: processes that share the test files; each takes up to 5 GB.
WORKERS ?= 2

# Threads that wait asleep: spinning ones make every operation ten times slower as soon as another program runs.
export OMP_WAIT_POLICY ?= passive

BIN := $(VENV)/bin
SOURCES := $(shell find csrc tools tests/native -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
BUILT_FROM := pyproject.toml setup.py CMakeLists.txt $(SOURCES)

.PHONY: help setup demo test budgets faults verify-deep gpu-at-hand verify-gpu modelled docs lint format clean

help:
	@echo "make demo   footage -> clips -> training in two stages with fused kernels -> videos, in $(DEMO)/"
	@echo "make test   the test suite"
	@echo "make budgets      what each kernel needs, compiled and executed without a GPU: tests/budgets/; ONLY=NAME for one"
	@echo "make faults faults put into training and preparing on purpose, and what came of them"
	@echo "make lint   ruff, clang-format and pyright"
	@echo "make setup  only the virtual environment, in $(VENV)/"
	@echo "make verify-deep  long shapes, whole recounts, every pass of Triton's compiler, the tests of ops and blocks"
	@echo "                  under the oldest torch that is allowed and others; no GPU needed"
	@echo "make modelled     docs/: which card trains 72 frames, and what a step costs every other way; no GPU needed"
	@echo "make docs   the pages of docs/ as a site, in build/site/"
	@echo "make verify-gpu   on a GPU: the step, memory, ops, variants, benches, bits; SECONDS=900 for all of it,"
	@echo "                  PARTS=step,memory,... for some; VENV= PYTHON=python3 installs nothing and wants no network"

# One call of pip for each, since each call builds the native module anew. What is imported is compiled when it is.
PIP_INSTALL := $(BIN)/pip install --quiet --no-compile

$(VENV)/.installed: $(BUILT_FROM)
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) "$(TORCH)" --editable .
	@touch $@

# Of those who change the code: what tests and linters take, and with it all that is above.
$(VENV)/.installed-test: $(BUILT_FROM)
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) "$(TORCH)" --editable ".[test,lint]" --editable tools/ptxrun
	# Apart: torch's builds for CUDA name a Triton of their own, and ttsem, which runs Triton IR on the CPU, a later Python.
	$(PIP_INSTALL) --no-deps --ignore-requires-python "$(TRITON)" ttsem==0.1.0
	@touch $(VENV)/.installed $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(PIP_INSTALL) --editable ".[docs]"
	@touch $@

setup: $(VENV)/.installed
	$(BIN)/python -m mmkernels

demo: $(VENV)/.installed
	$(BIN)/python -m mmkernels
	$(BIN)/python bench/demo_videos.py --out $(DEMO)-videos --new $(DEMO)-new
	$(BIN)/python mimicmotion/prepare.py --preset demo --videos $(DEMO)-videos --poses holistic --report
	$(BIN)/torchrun --nproc-per-node 1 mimicmotion/train.py --kernels fused --settings presets/demo.yaml --run-dir $(DEMO) $(DEMO_ARGS)
	$(BIN)/python mimicmotion/sample.py --run-dir $(DEMO) --check-pose-order
	$(BIN)/python bench/train_step.py --measure --preset demo --out $(DEMO)
	# A picture and a dance of the camera that was not trained on: the video, and how near it is to what was filmed.
	$(BIN)/python mimicmotion/sample.py --run-dir $(DEMO) --image $(DEMO)-new/picture.png --video $(DEMO)-new/video/dance.mp4 --out $(DEMO)/new/dance.mp4
	$(BIN)/python mimicmotion/evaluate.py --generated $(DEMO)/new --truth $(DEMO)-new/video --size 128 128 --output $(DEMO)/unseen.json
	@echo "The demo's results:"
	@for file in index.html loss.png sample.mp4 sample.png sample.json step_cost.png step_cost.json new/dance.mp4 unseen.html unseen.json; do echo "  $(DEMO)/$$file"; done
	@echo "  $$(ls -d $(DEMO)/step-* | tail -n 1)/"
	@echo "  data/prepared/demo/report.html"

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

budgets: $(VENV)/.installed-test
	PYTHONPATH=tests:. $(BIN)/python tests/ptx/resources.py $(if $(ONLY),--only $(ONLY))
	PYTHONPATH=tests:. $(BIN)/python tests/ptx/ptx_counts.py $(if $(ONLY),--only $(ONLY))

faults: $(VENV)/.installed-test
	$(BIN)/python -m bench.faults --json bench/results/faults.json

verify-deep: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m deep --durations=0
	$(BIN)/python tests/benches/versions.py --folder build/versions $(VERSIONS)

# Exit status 2, and make's error with it, means that no GPU was found: nothing was installed or verified.
gpu-at-hand:
	$(PYTHON) bench/verify_gpu.py --look

verify-gpu: gpu-at-hand $(if $(VENV),$(VENV)/.installed-test)
	$(if $(VENV),$(BIN)/python,$(PYTHON)) bench/verify_gpu.py $(if $(SECONDS),--seconds $(SECONDS)) $(if $(PARTS),--parts $(PARTS))

# What the documents show of plans and of a step on a GPU; no GPU needed.
modelled: $(VENV)/.installed
	$(BIN)/python -m mmkernels.plan --card "RTX 4090" --optimizer adamw8bit --out runs/plan
	cp runs/plan/memory.png docs/plan_memory.png
	cp runs/plan/front.png docs/plan_front.png
	$(BIN)/python bench/train_step.py --json bench/results/train_step-modelled.json --picture docs/train_step.png
	$(BIN)/python bench/predicted_step.py --json bench/results/h200-predicted.json
	$(BIN)/python bench/parallel.py --workers 2 --json bench/results/parallel-modelled.json --picture docs/parallel.png

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: $(VENV)/.installed-test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run --Werror $(SOURCES)
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(SOURCES)

clean:
	rm -rf build mmkernels/_native*.so $(VENV)
