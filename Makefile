# make demo   install, fetch text, train a small MoE, evaluate, generate, report
# make test   install what the tests need and run them
# See CONTRIBUTING.md for the rest.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := runs/nano
PROMPT := Good morrow, my lord.
ARGS :=
PYTEST := $(BIN)/python -m pytest -n auto --dist worksteal --durations=15

.PHONY: demo install install-dev test test-all test-gpu bench-gpu test-hosts bench-multi lint types clean

demo: install
	$(BIN)/expertmesh train examples/nano.toml --run.dir=$(RUN) $(ARGS)
	$(BIN)/expertmesh eval $(RUN)
	$(BIN)/expertmesh generate $(RUN) --prompt "$(PROMPT)" --max-new-tokens 220 --seed 0 \
	  --output $(RUN)/samples.txt
	$(BIN)/expertmesh report $(RUN)
	@echo "More: source $(BIN)/activate, then expertmesh --help"

install: $(VENV)/installed
install-dev: $(VENV)/installed-dev

# A new environment, or the one that is there.
define environment
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
  echo "expertmesh needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V);" \
       "set PYTHON, for example: make demo PYTHON=python3.11"; exit 2; }
$(PYTHON) -m venv $(VENV)
endef

$(VENV)/installed: pyproject.toml constraints.txt
	$(environment)
	$(BIN)/python -m pip install -c constraints.txt -e '.[hf,report]'
	@touch $@

# What the demo needs is among it, so one run of pip serves both.
$(VENV)/installed-dev: pyproject.toml constraints.txt
	$(environment)
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	@touch $(VENV)/installed $@

test: install-dev
	$(PYTEST) -m "not slow and not gpu and not hosts"

test-all: install-dev
	$(PYTEST) -m "not gpu and not hosts"

# Two hosts made of network namespaces, with sshd: needs root, Debian's iproute2, openssh-server.
test-hosts: install-dev
	$(BIN)/python tests/hosts/possible.py
	$(BIN)/python -m pytest -m hosts -n 0 tests/hosts

test-gpu:
	$(PYTHON) benchmarks/gpu_tests.py

# Beside other libraries, where they are installed: see benchmarks/peers.py.
bench-gpu:
	$(PYTHON) benchmarks/bench_gpu.py $(ARGS)

# Several GPUs of one host; GPUS=4, or ARGS=layer for one section. $(PYTHON) holds torch.
GPUS := 2
bench-multi:
	PYTHONPATH=. $(PYTHON) -m torch.distributed.run --standalone --nproc-per-node $(GPUS) \
	  benchmarks/multi_gpu.py $(ARGS)

lint: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install-dev
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info
