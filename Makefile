# Two commands do everything on a fresh machine: `make demo` and `make test`. Both set up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One BLAS thread a process: several busy processes with two threads each are a hundred times slower on two cores.
export OMP_NUM_THREADS ?= 1
export OMP_WAIT_POLICY ?= passive
export RAY_DISABLE_IMPORT_WARNING ?= 1

.PHONY: setup demo test test-cluster test-page docs docs-check lint format clean
setup: $(VENV)/.done

$(VENV)/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: setup
	$(BIN)/raymerge search jobs/configs/demo.yaml
	$(BIN)/raymerge report runs/demo

# Two processes, a file's tests in one of them; each has one Ray for all its tests.
test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-cluster: setup
	$(BIN)/python -m pytest -m cluster

# Needs Chromium (Debian: apt-get install chromium), or its path in CHROMIUM.
test-page: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,page]'
	$(BIN)/python -m pytest -m page

docs: setup
	$(BIN)/raymerge config --markdown > docs/config.md
	$(BIN)/python -c 'from raymerge.reference import tables_reference as page; print(page(), end="")' > docs/tables.md

# Runs the commands of README and guide in a copy of the repository, and lists what ran and what was only parsed.
docs-check: setup
	$(BIN)/python -m pytest tests/test_docs.py
	$(BIN)/python tests/docs_blocks.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf runs build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
