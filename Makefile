# Everything runs inside .venv, which `make setup` creates; a second run reuses what is there.
PY := .venv/bin/python
RUN ?= runs/demo
export OMP_NUM_THREADS ?= 1

.PHONY: setup demo test test-slow lint clean

setup:
	@./bootstrap.sh dev

demo: setup
	@$(PY) pretrain/demo.py --output $(RUN)

test: setup
	@$(PY) -m ruff check .
	@$(PY) -m pytest -m "not slow"

test-slow: setup
	@$(PY) -m pytest -m slow

lint: setup
	@$(PY) -m ruff check .

clean:
	rm -rf .venv build *.egg-info runs/demo
