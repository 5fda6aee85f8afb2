# `make demo` and `make test` do everything, set-up included; `make check` is the fast part of the tests.
PYTHON ?= python3
PIP = .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test check clean

.venv/base: requirements.txt constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) -r requirements.txt
	touch $@

.venv/dev: .venv/base pyproject.toml
	$(PIP) -e '.[dev]'
	touch $@

demo: .venv/base
	.venv/bin/python rlhf_demo.py

test: .venv/dev
	.venv/bin/python -m pytest -n auto --maxprocesses 4 -m "slow or not slow"

check: .venv/dev
	.venv/bin/python -m pytest -n auto --maxprocesses 4

clean:
	rm -rf .venv logs out
