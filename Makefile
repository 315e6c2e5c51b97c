# make demo    generate LR images for the sample photos with the shipped weights
# make test    run the tests in up to 4 processes (ARGS="-m slow" and the like are passed to pytest)
# make lint    check format, style and types
# make venv    only make .venv and install requirements.txt
# make clean   remove .venv and the tools' caches; keeps data/, runs/ and out/
# Another interpreter: make demo PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/requirements.installed

.PHONY: demo test lint venv clean

demo: $(INSTALLED)
	$(BIN)/python generate.py --hr data/sample/hr --lr-ref data/sample/lr --out out/demo
	@echo "Look at out/demo/preview.png: HR | LR reference | generated LR | bicubic."

test: $(INSTALLED)
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

venv: $(INSTALLED)

# The stamp is written last, so an interrupted install is taken up again by the next make.
$(INSTALLED): requirements.txt
	@rm -f $@
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "$(PYTHON) is not a Python of 3.11 or newer: name one, as in make PYTHON=python3.12."; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo "$(PYTHON) has no venv module: install it (Debian and Ubuntu: apt install python3-venv)."; exit 1; }
	@$(BIN)/python -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.txt
	@touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis __pycache__ tests/__pycache__
