# Each target sets up .venv by itself; only python3 and make are needed.
PYTHON ?= python3
BIN := .venv/bin
# uv and poetry do not read constraints.txt, so pip it is.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo demo-server test test-all test-isa check docs format acceptance real clients peers clean

.venv/run: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) torch
	$(PIP) -e .
	@# pip compiles what it copies; a tree that it only points at would else be compiled by each process anew,
	@# where PYTHONDONTWRITEBYTECODE is set.
	@$(BIN)/python -m compileall -q gemmakit
	@touch $@

.venv/test: .venv/run
	$(PIP) -e ".[test]"
	@# A CUDA torch brings the Triton it needs; beside a CPU torch any does, and the tests know 3.6 (there is none off Linux).
	$(BIN)/python -c "import triton" 2>/dev/null || $(PIP) triton==3.6.0 || true
	@touch $@

demo: .venv/run
	@echo 'gemmakit run --stats --seed 0 --temperature 0.7 --top-p 0.9 "Return the"'
	@$(BIN)/gemmakit run --stats --seed 0 --temperature 0.7 --top-p 0.9 "Return the"
	@echo 'gemmakit run --stats --chat "What is 34 + 58?"'
	@$(BIN)/gemmakit run --stats --chat "What is 34 + 58?"

.venv/serve: .venv/run
	$(PIP) -e ".[serve]" openai
	@touch $@

demo-server: .venv/serve
	@$(BIN)/python scripts/demo_server.py

# A process a core, each on a thread of its own; eight at most, for what they hold in memory. Who is through takes over
# half of what another has still before it.
test: .venv/test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal -m "not slow and not acceptance and not real"

test-all: .venv/test
	$(BIN)/python -m pytest -m "not acceptance and not real"

# The kernels' tests with each instruction set; what this processor lacks is emulated, for which it needs a compiler.
test-isa: .venv/test
	$(BIN)/python scripts/every_isa.py

check: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

.venv/docs: .venv/run
	$(PIP) -e ".[docs]"
	@touch $@

docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

format: .venv/test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# With GEMMAKIT_REAL_MODEL=google/gemma-2b (or a folder): token ids and continuations that were published.
acceptance: .venv/test
	$(BIN)/python -m pytest -m acceptance -rs

# Gemma 3 270M as Google trained it and the real vocabularies, into ~/.cache/gemmakit/real: run, and tested with.
real: .venv/test
	$(BIN)/python scripts/real.py

# Other people's tools on a gemmakit model, each in an environment of its own: all of tests/clients, or CLIENTS="trl peft".
clients: .venv/test
	$(BIN)/python scripts/clients.py $(CLIENTS)

# Programs to be measured beside gemmakit, each in an environment of its own: all, or PEERS="openvino onnxruntime llama.cpp transformers gemma keras-hub".
peers: .venv/run
	@$(BIN)/python benchmarks/peers.py $(PEERS)

clean:
	rm -rf .venv .peers build dist
