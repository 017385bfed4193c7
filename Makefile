# Both targets do all the set-up, once, in .venv; they need only python3 (>= 3.11) and make.
PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo test

demo: .venv/ready
	$(BIN)/python -m teachers.ddpm
	$(BIN)/python -m distill.progressive
	$(BIN)/python -m distill.consistency
	$(BIN)/python -m eval.compare runs/digits --steps 1,2,4,8 --solvers ddim unipc
	$(BIN)/python -m eval.report runs/digits/compare

test: .venv/ready-test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/ty check --python .venv
	$(BIN)/python -m pytest -n 2 --dist loadfile

.venv/ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("python 3.11 or newer is needed, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -e .
	touch $@

.venv/ready-test: .venv/ready
	$(BIN)/python -m pip install -q -e '.[test]'
	touch $@
