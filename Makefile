# Two commands do everything on a machine with python3 (>= 3.11) and make: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed

.PHONY: demo test test-slow test-faults bench lint clean

# Python keeps what it compiles, whatever the shell says: a study and its tests start many processes.
export PYTHONDONTWRITEBYTECODE =

demo: $(STAMP)
	$(BIN)/jaxsafety run experiments/quick.yaml

# Two runs side by side: most tests' programs are compiled without optimisation (tests/conftest.py), where that is the
# longest part. The small one's words come last.
test: $(STAMP)
	@XLA_FLAGS= $(BIN)/python -m pytest -q -m "optimized and not slow" tests/engine/test_sweep.py tests/linalg/test_power.py \
		> $(VENV)/optimized.log 2>&1 & small=$$!; \
	$(BIN)/python -m pytest -q -m "not slow and not faults and not optimized" -n 2 --dist loadfile --no-loadscope-reorder; large=$$?; \
	wait $$small; small=$$?; cat $(VENV)/optimized.log; exit $$((large > small ? large : small))

test-slow: $(STAMP)
	XLA_FLAGS= $(BIN)/python -m pytest -q -m slow -n 2 --dist loadfile

test-faults: $(STAMP)
	$(BIN)/python -m pytest -q -m "not slow" -n 2 tests/faults

bench: $(STAMP)
	$(BIN)/python -m benchmarks.run

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("jaxsafety needs Python >= 3.11, got " + sys.version.split()[0] + ": set PYTHON=" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --editable ".[report,llama,test,lint]" --constraint constraints.txt
	touch $(STAMP)

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache
