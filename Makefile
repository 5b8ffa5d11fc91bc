# make train   set up and train the example on this machine's GPUs, or on its CPU
# make finetune   what make train has learnt, at another resolution with a new classifier; make finetune-scratch: the same from scratch
# make test    set up and run the tests
# make torture   every cell of the ZeRO, reshape and kill matrices, on every number of ranks (about an hour)
# make torture-cluster   hosts that are killed, frozen, cut off or slow, at several times of a run (Linux, root; about an hour)
# make lint    ruff and mypy
# make bench   the benchmarks a CPU can run (some minutes); benchmarks/gpu.sh: those of a GPU
PYTHON ?= python3
VENV   ?= .venv
RUN    ?= runs/digits
CONFIG ?= ds_configs/digits.json
FINETUNE ?= runs/finetune_digits
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

# On a machine without a GPU: two processes on the CPU. On GPUs: all of them.
HAS_GPU := $(shell nvidia-smi -L 2>/dev/null | grep -q GPU && echo yes)
ifneq ($(HAS_GPU),yes)
export DS_ACCELERATOR ?= cpu
export OMP_NUM_THREADS ?= 1
RANKS ?= --num_gpus 2
endif

.PHONY: setup train finetune finetune-scratch test torture torture-cluster lint bench docs
setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(v not in ((3, 11), (3, 12)) and f"vitds needs Python 3.11 or 3.12, this is {v[0]}.{v[1]}; set PYTHON=")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch setuptools wheel ninja numpy packaging
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation deepspeed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

train: $(READY)
	$(BIN)/deepspeed $(RANKS) launcher/train.py --config $(CONFIG) --output-dir $(RUN)

finetune: $(READY)
	@ls -d $(RUN)/checkpoints/step-* > /dev/null 2>&1 || { echo "there is no checkpoint in $(RUN) to start from: run 'make train' first, or say RUN=DIRECTORY"; exit 2; }
	$(BIN)/deepspeed $(RANKS) launcher/train.py --config ds_configs/finetune_digits.json --output-dir $(FINETUNE) --set vitds.init_from.path=$(RUN)
	@$(BIN)/python benchmarks/finetune.py $(FINETUNE) $(FINETUNE)_scratch

finetune-scratch: $(READY)
	$(BIN)/deepspeed $(RANKS) launcher/train.py --config ds_configs/finetune_digits.json --output-dir $(FINETUNE)_scratch --set vitds.init_from=null
	@$(BIN)/python benchmarks/finetune.py $(FINETUNE) $(FINETUNE)_scratch

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

torture: $(READY)
	VITDS_TORTURE=1 $(BIN)/python -m pytest -s tests/zero tests/torture tests/planning --ignore tests/torture/test_hosts_fail.py $(ARGS)

torture-cluster: $(READY)
	VITDS_TORTURE=1 $(BIN)/python -m pytest -s tests/cluster/test_two_hosts.py tests/torture/test_hosts_fail.py $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	-$(BIN)/python benchmarks/step.py --config ds_configs/digits.json --threads 1 --trainees ours torch torch-fp32 siglip-deepspeed
	-$(BIN)/python benchmarks/optimizer.py
	-$(BIN)/python benchmarks/startup.py --rounds 1
	-$(BIN)/python benchmarks/loader.py --workers 2 --rounds 3
	-$(BIN)/deepspeed $(RANKS) benchmarks/checkpoint.py --rounds 3

docs: $(READY)
	$(BIN)/python -m vitds.cli config-docs > docs/config.md
