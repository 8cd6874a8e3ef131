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

# Two processes with one thread each are faster on small models than one process with two. The kernels run on the
# oldest Triton too, whose interpreter wants an older numpy. Files keep their order: the few that hold one test of a
# minute would come last otherwise, when the other process has nothing left.
test: $(INSTALLED) $(VENV)/triton-3.6 lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=15
	OMP_NUM_THREADS=1 PYTHONPATH=$(VENV)/triton-3.6 $(BIN)/python -m pytest -n 2 --dist loadfile tests/ops -k "triton or kernels or compiled"

$(VENV)/triton-3.6: $(INSTALLED)
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $@ triton==3.6.0 numpy==2.3.5
	@touch $@

lint: $(INSTALLED)
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy

wheel: $(INSTALLED)
	@$(BIN)/pip wheel --quiet --disable-pip-version-check --no-deps -w dist .

clean:
	rm -rf $(VENV) build dist runs .pytest_cache .ruff_cache .mypy_cache .hypothesis
