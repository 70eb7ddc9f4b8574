# make quickstart   from nothing to a small ALiBi GPT, trained, evaluated past its training length, and its report
# make test         every test that needs no GPU, on the CPU wherever it runs; JOBS=4 for four at a time in place of two
# make test-fast    for the inner loop: of each test function the cases that cost 0.75 s of a processor together or less
# make test-costs   every test, and tests/costs.json is written anew: what each costs, from which test-fast is chosen
# make test-gpu     what makes sense on one GPU, on that GPU
# make test-gguf    llama.cpp on exported files; builds llama-cpp-python first, 6 minutes on 2 cores
# make test-cluster several hosts and a SLURM on this machine, as root; in a container it installs what it lacks of Debian
# make check        what must pass before a commit: format, lint, types, import law, tests

PYTHON ?= python3
# For its interpreter, where PyTorch brought none. Not in constraints.txt: PyTorch for CUDA insists on its own version.
TRITON := triton==3.6.0
VENV := .venv
BIN := $(VENV)/bin
SAMPLE := sample
RUN := runs/quickstart
# A file's tests stay together, for they share what is dear to make; tests/support/costs.py says which file comes first.
JOBS := 2
PYTEST = pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder
STEPS := $(shell sed -n 's/^  steps: //p' configs/quickstart.yaml)
FINAL := $(RUN)/checkpoints/step_$(shell printf %08d $(STEPS))/manifest.json
# Of the quickstart. DS_ACCELERATOR=cpu is how one computes on the CPU of a machine with GPUs.
GPUS = $(shell $(BIN)/python -c 'import os, torch; \
	print(0 if os.environ.get("DS_ACCELERATOR") == "cpu" else torch.cuda.device_count())')
RANKS = $(if $(filter 1,$(GPUS)),1,2)
export PATH := $(abspath $(BIN)):$(PATH)

.PRECIOUS: $(FINAL)
.PHONY: quickstart install test test-fast test-costs test-gpu llama-cpp test-gguf test-cluster check lint clean

quickstart: $(RUN)/report.html
	@echo "report: $(RUN)/report.html"

install: $(VENV)/.installed

# torch first and by its exact version: a range would admit a newer release. Whether pip gets the build for CPUs or for
# CUDA, which is gigabytes, is a matter of the index it is set up with.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	pip install -q --disable-pip-version-check $$(grep '^torch==' constraints.txt)
	pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	python -c 'import triton' 2>/dev/null || pip install -q --disable-pip-version-check $(TRITON)
	touch $@

# For the tests: the Python package of flash-attn without its CUDA kernels, which take hours to build. Its Triton kernels
# stand in, in Triton's interpreter. A build that can be imported stays. The wheel is not kept in pip's cache: there it
# would pass for the real one.
$(VENV)/.flash-attn: $(VENV)/.installed
	pip install -q --disable-pip-version-check -c constraints.txt wheel
	python -c 'import flash_attn' 2>/dev/null || \
		FLASH_ATTENTION_FORCE_BUILD=TRUE FLASH_ATTENTION_SKIP_CUDA_BUILD=TRUE FLASH_ATTENTION_TRITON_AMD_ENABLE=TRUE \
		pip install -q --disable-pip-version-check --no-cache-dir --no-build-isolation -c constraints.txt flash-attn
	touch $@

$(SAMPLE)/train.jsonl: $(VENV)/.installed tools/build_sample_corpus.py
	python tools/build_sample_corpus.py --output $(SAMPLE)

$(SAMPLE)/tokenizer.model: $(SAMPLE)/train.jsonl
	python tools/train_tokenizer.py --input $(SAMPLE)/train.jsonl --vocab-size 4096 --output $@ --overwrite

$(SAMPLE)/%.idx: $(SAMPLE)/tokenizer.model
	python tools/preprocess_data.py --input $(SAMPLE)/$*.jsonl --tokenizer $< --output $(SAMPLE)/$* --workers 2 --overwrite

# The last step's checkpoint: an interrupted training has none, and resumes.
$(FINAL): configs/quickstart.yaml $(SAMPLE)/train.idx $(SAMPLE)/valid.idx
	@ranks=$(RANKS); echo "ranks: $$ranks (1 where there is one GPU, else 2)"; \
	deepspeed --quiet --num_accelerators $$ranks launch/pretrain.py --config configs/quickstart.yaml \
		parallel.tensor_parallel_size=$$ranks
	touch $@

$(RUN)/evaluation.json: $(FINAL)
	python tools/evaluate.py --checkpoint $(RUN) --data $(SAMPLE)/valid --lengths 256,512,1024,2048 \
		--protocol nonoverlapping --output $@

$(RUN)/report.html: $(RUN)/evaluation.json
	python tools/report.py $(RUN)

test: install $(VENV)/.flash-attn
	$(PYTEST)

test-fast: install $(VENV)/.flash-attn
	$(PYTEST) --fast

test-costs: install $(VENV)/.flash-attn
	$(PYTEST) --write-costs

test-gpu: install
	TEST_DEVICE=cuda python -m pytest -m gpu

# Built from its source for this CPU. Not a dependency: only `to-gguf` compares with it, where it is there.
$(VENV)/.llama-cpp: $(VENV)/.installed
	python -c 'import llama_cpp' 2>/dev/null || CMAKE_BUILD_PARALLEL_LEVEL=$(JOBS) \
		pip install -q --disable-pip-version-check -c constraints.txt llama-cpp-python
	touch $@

llama-cpp: $(VENV)/.llama-cpp

test-gguf: llama-cpp
	python -c 'import llama_cpp'
	python -m pytest tests/export/gguf

# Where this machine cannot be several hosts, it says why and leaves the tests out.
test-cluster: install
	@obstacle=$$(python tests/cluster/machines/debian.py); if [ -n "$$obstacle" ]; then \
		echo "make test-cluster is left out: $$obstacle"; else $(PYTEST) -m cluster tests/cluster; fi

lint: install
	ruff check .
	ruff format --check .
	mypy
	lint-imports

check: lint test

clean:
	rm -rf $(SAMPLE) runs
