# Every target works in a fresh clone: what it needs is installed into .venv first, in the versions that constraints.txt
# pins. A failed or interrupted installation leaves no stamp and is taken up again by the next call.

PYTHON ?= python3
VENV ?= .venv
RUN ?= runs/digits
ARGS ?=

INSTALLED := $(VENV)/.installed

.PHONY: help demo test style check

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' Makefile | expand -t 16

demo: $(INSTALLED)  ## train on digits (some minutes), draw 500, judge them
	$(VENV)/bin/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
		--num_cpu_threads_per_process 2 training/train_edm2.py --preset digits --output_dir $(RUN) \
		--status_every 16Ki --sample_every 64Ki --checkpoint_every 32Ki
	$(VENV)/bin/python examples/judge_digits.py $(RUN)

test: $(INSTALLED)  ## all tests, the slow ones last; ARGS="-k ema" goes to pytest
	$(VENV)/bin/python -m pytest $(ARGS)

style: $(INSTALLED)  ## format the code and repair what ruff can repair
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

check: $(INSTALLED)  ## formatting, lint and types, without changing anything
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

$(INSTALLED): pyproject.toml constraints.txt
	@command -v $(PYTHON) > /dev/null || { echo "No $(PYTHON) here. Install Python 3.10 or newer, or name one: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import sys; v = "%d.%d" % sys.version_info[:2]; sys.version_info >= (3, 10) or sys.exit("$(PYTHON) is Python " + v + "; 3.10 or newer is needed. Name one: make PYTHON=/path/to/python3")'
	@$(VENV)/bin/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) || { echo "$(PYTHON) cannot make a virtual environment; on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	$(VENV)/bin/python -m pip install --constraint constraints.txt --editable ".[dev]"
	@touch $@
