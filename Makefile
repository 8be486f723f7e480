# Two commands on a fresh clone: `make demo` and `make test`. Both make their own virtual environment in .venv.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
# byte code is written when a module is first imported, whatever the shell says; pip would compile all 13,000 files of
# what it installs, one after the other
export PYTHONDONTWRITEBYTECODE :=
PIP_FLAGS := --quiet --disable-pip-version-check --no-compile --constraint constraints.txt
DEMO := runs/demo
DEMO_MINUTES ?= 5

# tests run side by side: threads that fight for the cores only wait for each other
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal -q

.PHONY: demo test exhaustive check static peers interpreter format clean

demo: $(STAMP)
	rm -rf $(DEMO)
	$(BIN)/turnout train tiny --minutes $(DEMO_MINUTES) --out $(DEMO)
	$(BIN)/turnout generate $(DEMO) --prompt "def read_lines(path):" --max-new-tokens 120 --temperature 0.9
	$(BIN)/turnout report $(DEMO) -o $(DEMO)/report.html
	@echo "Look at $(DEMO)/report.html; talk with: $(BIN)/turnout chat $(DEMO)"

test: $(STAMP)
	$(PYTEST)

# the random cases that `make test` leaves out
exhaustive: $(STAMP)
	$(PYTEST) -m exhaustive

check: static
	$(PYTEST) -m "not slow and not exhaustive"

static: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright --project . --level error
	$(BIN)/lint-imports

# tests against other systems, which `make test` does not install
peers: $(STAMP)
	$(BIN)/pip install $(PIP_FLAGS) --editable ".[peers]"
	$(BIN)/pytest -q tests/contracts/test_deepspeed_gates.py tests/contracts/test_verify_peers.py tests/distributed/test_bench_ranks.py tests/paths/test_bench_layer_peers.py

# the Triton kernels on a machine without a GPU: 190 MB to fetch, 640 MB on disk, which `make test` does not install
interpreter: $(STAMP)
	$(BIN)/pip install $(PIP_FLAGS) --editable ".[gpu]"
	$(BIN)/pytest -q tests/gpu

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# the stamp is written last: an interrupted installation starts again
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install $(PIP_FLAGS) --editable ".[dev,hf,plot]"
	touch $(STAMP)

clean:
	rm -rf $(VENV) runs
