# Targets that need the environment first bring it up to date; requirements/install.sh decides whether anything changed.
# Variables: ARGS (passed to the command), JOBS (test files that run at once), VENV, and for the environment PYTHON,
# ENGINE=cpu|gpu, TORCH_INDEX (docs/install.md).
VENV ?= .venv
PYTHON ?=
ENGINE ?=
TORCH_INDEX ?=
ARGS ?=
JOBS ?= 2
export VENV PYTHON ENGINE TORCH_INDEX
PYTEST = OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
# Tests of the CPU set that use libraries whose versions differ in the CUDA set.
STACK := $(addprefix tests/upge/train/test_,engine.py packing.py term_gradients.py learner.py attention_kernel.py lora.py \
	elementwise.py::test_the_code_of_every_family_is_known)
# The problems of sweep=distillation.
TAUGHT := "data.levels=[3 numbers,4 numbers,5 numbers,3 mixed,4 mixed,5 mixed]"
.PHONY: help env run test test-slow test-gpu-stack lint bench peers docs docs-site notebooks results

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 24
	@echo 'Pass arguments with ARGS, as in: make run ARGS="algo=grpo steps=20"'

env:  ## create or update the environment in .venv
	@bash requirements/install.sh

run: env  ## train; default: the small model on arithmetic, about five minutes on two cores
	$(VENV)/bin/python -m experiments.run $(ARGS)

test: env  ## run the tests that are not slow, JOBS files at a time (2)
	$(PYTEST) -m 'not slow' $(ARGS)

test-slow: env  ## run the slow tests: whole runs, the compiler, real models, generated pages
	$(PYTEST) -m slow $(ARGS)

test-gpu-stack:  ## test the code that calls the CUDA packages, without a GPU: 11 GB in .venv-gpu, five minutes
	@ENGINE=gpu VENV=.venv-gpu bash requirements/install.sh
	OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu .venv-gpu/bin/python -m pytest -n $(JOBS) --dist loadfile tests/gpu_stack $(STACK) $(ARGS)

lint: env  ## check style, format, types and layers
	$(VENV)/bin/python -m ruff check
	$(VENV)/bin/python -m ruff format --check
	$(VENV)/bin/lint-imports
	$(VENV)/bin/python -m pyright --pythonpath $(VENV)/bin/python

bench: env  ## list the benchmarks; ARGS=NAME runs one
	$(VENV)/bin/python -m experiments.bench $(ARGS)

peers: env  ## install the benchmarks' peers (verl, Liger, cut-cross-entropy; TRL is in .venv) into .venv-peers
	@bash requirements/extra.sh peers

docs: env  ## regenerate the generated parts of README.md and docs/ and the list of keys, about two minutes
	$(VENV)/bin/python -m experiments.describe --readme
	$(VENV)/bin/python -m experiments.describe --docs
	$(VENV)/bin/python -m experiments.theory --docs
	$(VENV)/bin/python -m experiments.scaling --docs
	$(VENV)/bin/python -m experiments.table1 --docs
	$(VENV)/bin/python -m experiments.site --docs
	$(VENV)/bin/python -m experiments.completion --update

docs-site: env  ## build the documentation's site in site/, with the packages of .venv-docs
	@bash requirements/extra.sh docs
	$${DOCS:-.venv-docs}/bin/python -m experiments.site

notebooks: env  ## write the examples as notebooks; ARGS=--run renews their output, three minutes
	$(VENV)/bin/python examples/render.py $(ARGS)

results: env  ## regenerate docs/results.md: all sweeps of the small model and the diagnosis, hours on two cores
	$(VENV)/bin/python -m experiments.sweep sweep=main --docs
	$(VENV)/bin/python -m experiments.sweep sweep=rates --report --docs
	$(VENV)/bin/python -m experiments.sweep sweep=gate --docs
	$(VENV)/bin/python -m experiments.sweep sweep=failing --docs
	$(VENV)/bin/python -m experiments.sweep sweep=demonstrated --docs
	$(VENV)/bin/python -m experiments.run algo=sft $(TAUGHT) data.train_size=8000 data.evaluation_size=96 data.seed=100 seed=100 \
		steps=500 prompts_per_step=64 optimizer.lr=5e-4 optimizer.schedule=cosine optimizer.warmup_steps=10 eval.every=250 \
		eval.samples=4 checkpoint.every=0 output=runs/teacher
	$(VENV)/bin/python -m experiments.run algo=grpo model=runs/teacher/final $(TAUGHT) data.train_size=510 steps=40 \
		prompts_per_step=16 group_size=8 optimizer.lr=0 eval.every=-1 checkpoint.every=0 log_rollouts=1 output=runs/teacher-samples
	$(VENV)/bin/python -m experiments.sweep sweep=distillation --docs
	test -f runs/tiny-long/README.md || $(VENV)/bin/python -m experiments.pretrain --output runs/tiny-long --longest 8 --steps 3000 --threads 2
	$(VENV)/bin/python -m experiments.sweep sweep=corrected --docs
	$(VENV)/bin/python -m experiments.sweep sweep=corrected-rates --report --docs
	$(VENV)/bin/python -m experiments.sweep sweep=faults --docs
	$(VENV)/bin/python -m experiments.sweep sweep=staleness --docs
	$(VENV)/bin/python -m experiments.sweep sweep=mismatch --docs
	$(VENV)/bin/python -m experiments.faults --docs
	$(VENV)/bin/python -m experiments.diagnose algos=all output=diagnoses/atlas
	$(VENV)/bin/python -m experiments.diagnose output=diagnoses/main algos=[sft,dr_grpo,grpo,luffy,srft,hpt] data.train_size=510 \
		"policies=[before:experiments/models/tiny,after:sweeps/main/runs/HPT/seed-0/final]" \
		"data.levels=[3 numbers,4 numbers,5 numbers,3 mixed,4 mixed,5 mixed]"
	$(VENV)/bin/python -m experiments.run algo=hpt model=tiny $(TAUGHT) data.train_size=510 data_policy.demonstrated_prompts=60 \
		algo.terms.rl.coefficient=8 optimizer.lr=3e-4 optimizer.warmup_steps=5 prompts_per_step=16 group_size=8 steps=120 \
		output=runs/regret
	$(VENV)/bin/python -m experiments.regret output=regrets/main $(TAUGHT) data.train_size=510 data.evaluation_size=512 \
		adam_length=0.1 "policies=[before:experiments/models/tiny,after:runs/regret/final]" --docs
