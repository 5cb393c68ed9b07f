# Everything a newcomer needs: `make demo` and `make test`. Each makes .venv on first use.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Processes that run tests; many tests start up to four of their own.
TEST_WORKERS ?= 2
# Where torch comes from, for another CUDA build than the package index has: docs/gpu.md.
TORCH_INDEX ?=
# So that the launchers find this environment's deepspeed and ninja.
export PATH := $(abspath $(BIN)):$(PATH)

DEMO := demo
DEMO_FLAGS ?= --eval-interval 25 --log-interval 25

.PHONY: help install demo test test-all parity chaos bench gpu check docs clean

help:
	@echo "make demo      train the same small GPT with clm, eslm and random selection, compare, export"
	@echo "make test      run the tests (make test-all: the slow ones too)"
	@echo "make parity    train one model in every layout and print how the runs differ"
	@echo "make chaos     kill runs and damage files, and print what became of each"
	@echo "make bench     measure speed and memory against plain training and a peer"
	@echo "make gpu       say whether the system works on this machine's GPU, and how fast (GPUS=2: on two)"
	@echo "make check     formatter, linter, types, spelling, direction of imports, links of the documentation"
	@echo "make docs      build the documentation into site/"
	@echo "make clean     remove $(VENV), $(DEMO) and site/"

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; ok = (3, 10) <= sys.version_info[:2] <= (3, 12); sys.exit(None if ok else "error: Python 3.10, 3.11 or 3.12 is needed and " + sys.executable + " is " + sys.version.split()[0] + ". Name another one: make PYTHON=python3.11 ...")'
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "error: $(PYTHON) cannot make virtual environments; install its venv package (python3-venv on Debian and Ubuntu)."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: install
	rm -rf $(DEMO)/clm* $(DEMO)/eslm* $(DEMO)/random* $(DEMO)/hf $(DEMO)/report.*
	deepspeed pretrain_gpt.py --selection clm --save $(DEMO)/clm --metrics-file $(DEMO)/clm.jsonl $(DEMO_FLAGS)
	deepspeed pretrain_gpt.py --eslm-alpha 0.1 --eslm-proxy-layers 1 --save $(DEMO)/eslm --metrics-file $(DEMO)/eslm.jsonl $(DEMO_FLAGS)
	deepspeed pretrain_gpt.py --selection random --save $(DEMO)/random --metrics-file $(DEMO)/random.jsonl $(DEMO_FLAGS)
	$(BIN)/python tools/compare_runs.py $(DEMO)/clm.jsonl $(DEMO)/eslm.jsonl $(DEMO)/random.jsonl --labels clm eslm random --output-prefix $(DEMO)/report
	$(BIN)/python tools/convert_to_hf.py --load $(DEMO)/eslm --output $(DEMO)/hf
	$(BIN)/python tools/generate.py --load $(DEMO)/hf --prompt "def " --max-new-tokens 80 --temperature 0.8
	@echo
	@echo "table and curves: $(DEMO)/report.md, $(DEMO)/report.png   Hugging Face model: $(DEMO)/hf"

test: install
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist worksteal

test-all: install
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist worksteal -m ''

# CORPUS: jsonl.zst files, or a folder of them, for the measurement of preprocessing; it comes first, so that what is
# wrong with them is said at once.
bench: install
ifdef CORPUS
	@[ -n "$(VOCAB_FILE)" ] && [ -n "$(MERGE_FILE)" ] || { echo "error: CORPUS needs GPT-2's VOCAB_FILE=vocab.json and MERGE_FILE=merges.txt"; exit 1; }
	$(BIN)/python -m benchmarks.preprocessing --input "$(CORPUS)" --vocab-file "$(VOCAB_FILE)" --merge-file "$(MERGE_FILE)"
else
	@echo "preprocessing is not measured: make bench CORPUS=folder VOCAB_FILE=file MERGE_FILE=file"
endif
	$(BIN)/python -m benchmarks.selection_step
	$(BIN)/python -m benchmarks.selection_step --dtype bf16
	$(BIN)/python -m benchmarks.selection_step --shape 1.5B-8 --rows 10 --seq-length 256
	$(BIN)/python -m benchmarks.selection_step --shape llama-1B-4 --rows 10 --seq-length 256 --only ESLM
	$(BIN)/python -m benchmarks.peer_step
	$(BIN)/python -m benchmarks.peer_step --dtype bf16
	$(BIN)/python -m benchmarks.peer_step --peer plain --rows 4
	$(BIN)/python -m benchmarks.peer_step --peer plain --rows 4 --dtype bf16
	$(BIN)/python -m benchmarks.peer_step --peer plain --rows 5 --seq-length 256
	$(BIN)/python -m benchmarks.peer_step --peer plain --rows 5 --seq-length 256 --dtype bf16
	$(BIN)/python -m benchmarks.peer_step --peer plain --rows 4 --compile
	$(BIN)/python -m benchmarks.peer_step --peer plain --rows 4 --dtype bf16 --compile
	$(BIN)/python -m benchmarks.peer_step --peer plain --rows 4 --dtype bf16 --masters none
	$(BIN)/python -m benchmarks.peer_memory
	$(BIN)/python -m benchmarks.engine_overhead
	$(BIN)/python -m benchmarks.head_kernel
	$(BIN)/python -m benchmarks.compile_step
	$(BIN)/python -m benchmarks.saving
	$(BIN)/python -m benchmarks.startup
	$(BIN)/python -m benchmarks.plan_check
	OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node 4 -m benchmarks.thresholds --rows 2
	OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node 2 -m benchmarks.step_scope --rows 4 --seq-length 64
	OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node 2 -m benchmarks.step_scope --rows 4 --seq-length 64 --pipeline 2

GPUS ?= 1
gpu: install
	$(BIN)/python -m benchmarks.gpu --gpus $(GPUS) --json gpu-$(GPUS).json

parity: install
	$(BIN)/python -m tests.training.parity

chaos: install
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.chaos

check: install docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell .
	$(BIN)/lint-imports
	$(BIN)/shellcheck examples/*.sh examples/*.sbatch examples/data/*.sbatch examples/reproduce/scales/*.sh

docs: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

$(VENV)/installed-docs: $(VENV)/installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[docs]'
	@touch $@

clean:
	rm -rf $(VENV) $(DEMO) site
