PYTHON ?= python3
BIN := .venv/bin

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/'

# Editable, so that tests run the code of this tree.
.venv/.ready: settings.ini setup.py pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

# Notebooks and tests compare arithmetic: they run on the CPU, GPUs are hidden (for pytest in tests/conftest.py). What only a GPU shows comes last, skipped without one.
test: .venv/.ready  ## the gate: notebooks clean, exports in sync, the site made, notebooks run, pytest
	$(BIN)/python tools/check_sync.py
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore tools/site/build.py
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/nbdev-test --n-workers 2
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist loadfile --durations 15 tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -rs tests/test_cuda.py

demo: .venv/.ready  ## pretrain on scikit-learn's digits, compare kNN accuracies, draw pictures
	$(BIN)/ressl_pretrain digits --out demo

sync: .venv/.ready  ## clean the notebooks, export the modules, write README.md
	$(BIN)/nbdev-clean
	$(BIN)/nbdev-export
	$(BIN)/python tools/readme.py

outputs: .venv/.ready  ## run every notebook and keep what it shows, then sync
	PYTHONWARNINGS=ignore OMP_NUM_THREADS=1 $(BIN)/jupyter-nbconvert --log-level WARN --to notebook --execute --inplace nbs/*.ipynb nbs/*/*.ipynb
	$(MAKE) sync

docs: .venv/.ready  ## the site in _docs: made, and looked at for dead links, pictures without text and symbols without entry
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore tools/site/build.py

docs-serve: docs  ## show it
	$(BIN)/python -m http.server --directory _docs 8000

release-check: .venv/.ready  ## sdist, the wheel from it, both checked, installed into an empty environment, README's lines run
	rm -rf dist build
	$(BIN)/pip install --quiet --disable-pip-version-check build twine
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*
	$(BIN)/python tools/release_check.py dist

clean:  ## remove what can be made again, the environment too
	rm -rf .venv build dist *.egg-info _docs _proc .pytest_cache

.PHONY: help test demo sync outputs docs docs-serve release-check clean
