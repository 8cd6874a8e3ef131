# Two commands: `make demo` and `make test`. Each makes .venv first, once.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
INSTALLED = $(VENV)/.installed

.PHONY: demo test lint wheel clean
.DELETE_ON_ERROR:

$(INSTALLED): pyproject.toml constraints.txt
	@echo "making $(VENV) (a few minutes, once)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test,lint]"
	@touch $@

demo: $(INSTALLED)
	@$(BIN)/moe-mtl demo --output runs/demo

# Two processes with one thread each are faster on small models than one process with two.
test: $(INSTALLED) lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --durations=15

lint: $(INSTALLED)
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy

wheel: $(INSTALLED)
	@$(BIN)/pip wheel --quiet --disable-pip-version-check --no-deps -w dist .

clean:
	rm -rf $(VENV) build dist runs .pytest_cache .ruff_cache .mypy_cache .hypothesis
