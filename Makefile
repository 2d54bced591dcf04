# Everything runs inside .venv, which `make setup` creates; a second run reuses what is there.
PY := .venv/bin/python
RUN ?= runs/demo
export OMP_NUM_THREADS ?= 1
# Ranks wait for each other half of the time, so two test processes keep two cores busy; tests/conftest.py says what
# must share a process.
PYTEST := $(PY) -m pytest --numprocesses 2 --dist loadscope

.PHONY: help setup demo check test test-slow lint docs lock clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1@\2/p' Makefile | column -t -s @

setup: ## .venv with the locked dependencies
	@./bootstrap.sh dev

demo: setup ## raw files to shards, training, resume and pictures, all in RUN
	@$(PY) pretrain/demo.py --output $(RUN)

check: lint ## unit tests and the shard builder, for daily work
	@$(PYTEST) -m "not slow" tests/unit tests/corpus

test: lint ## all tests but the slow ones
	@$(PYTEST) -m "not slow"

test-slow: setup ## long runs: random kills, fuzzing, two trainings on a node
	@$(PY) -m pytest -m slow

lint: setup ## style
	@$(PY) -m ruff check .

docs: setup ## the documentation as a site, with the reference of all modules: build/site/index.html
	@NO_MKDOCS_2_WARNING=1 DISABLE_MKDOCS_2_WARNING=true $(PY) -m mkdocs build --quiet --strict
	@echo build/site/index.html

LOCK := $(PY) -m uv pip compile --quiet --python $(PY) --universal --python-version 3.12 --generate-hashes \
	--no-annotate --no-header --no-build-isolation setup.py

lock: setup ## requirements*.lock anew, with hashes, from what setup.py allows
	@$(PY) -m pip install --quiet uv
	@$(LOCK) --upgrade --extra dev --output-file requirements.lock
	@$(LOCK) --upgrade --extra fp8 --constraint requirements.lock --output-file requirements-fp8.lock

clean: ## all that the targets made
	rm -rf .venv build *.egg-info runs/demo
