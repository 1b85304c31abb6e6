# Two commands for a newcomer: `make quickstart` trains a small model on this machine, `make test` passes the tests.
# Everything is installed into .venv. PYTHON chooses the interpreter, INSTALLER=pip avoids uv, VENV moves the environment.

PYTHON ?= python3
VENV ?= .venv
INSTALLER ?= uv
EXTRAS ?= dev,peft,tensorboard
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# pytest-xdist workers; each imports torch and Composer once, so two fit two cores and 8 GiB.
WORKERS ?= 2

.PHONY: install quickstart finetune-demo finetune-quickstart test lint bench bench-gpu clean

install: $(STAMP)

$(STAMP): setup.py llmfoundry/_version.py
	@echo "== Installing into $(VENV) (about 6 GB; uv takes a minute or two, plain pip several)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
ifeq ($(INSTALLER),uv)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --python $(BIN)/python -e '.[$(EXTRAS)]'
else
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[$(EXTRAS)]'
endif
	@touch $(STAMP)

quickstart: $(STAMP)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m llmfoundry.command_utils.quickstart

# Fetches a real chat model and chats (100 MB, once), LoRA-finetunes, merges, chats.
finetune-demo: $(STAMP)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m llmfoundry.command_utils.finetune_demo lora

# Trains all weights of what `make quickstart` left.
finetune-quickstart: quickstart
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m llmfoundry.command_utils.finetune_demo full

test: $(STAMP)
	PATH="$(abspath $(BIN)):$$PATH" HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal tests

lint: $(STAMP)
	$(BIN)/ruff check .

bench: $(STAMP)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python scripts/data_prep/benchmarking/benchmark.py
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python scripts/train/benchmarking/train_step.py

bench-gpu: $(STAMP)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python scripts/train/benchmarking/gpu.py

clean:
	rm -rf quickstart finetune-demo finetune-quickstart build dist .pytest_cache .ruff_cache .hypothesis
