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

# Two processes with one thread each are faster on small models than one process with two. Files keep their order: the
# few that hold one test of a minute would come last otherwise, when the other process has nothing left. Kernels,
# models and balancing run on the oldest triton and transformers that are supported too; that triton's interpreter wants
# an older numpy.
test: $(INSTALLED) $(VENV)/oldest lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=15
	OMP_NUM_THREADS=1 PYTHONPATH=$(VENV)/oldest $(BIN)/python -m pytest -n 2 --dist loadfile \
		tests/ops tests/models tests/training/test_balancing.py -k "triton or kernels or compiled or models or balancing"

$(VENV)/oldest: $(INSTALLED) Makefile
	@rm -rf $@
	@grep -vE '^(triton|numpy|transformers|huggingface.hub)=' constraints.txt >$(VENV)/oldest-constraints.txt
	@$(BIN)/pip install --quiet --disable-pip-version-check -c $(VENV)/oldest-constraints.txt --target $@ \
		triton==3.6.0 numpy==2.3.5 transformers==5.17.0 huggingface_hub==1.33.0
	@touch $@

lint: $(INSTALLED)
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy

wheel: $(INSTALLED)
	@$(BIN)/pip wheel --quiet --disable-pip-version-check --no-deps -w dist .

clean:
	rm -rf $(VENV) build dist runs .pytest_cache .ruff_cache .mypy_cache .hypothesis
