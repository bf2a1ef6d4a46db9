# The commands of a contributor; CONTRIBUTING.md says when to run which.
.PHONY: install test slow weekly lint ci

install:
	python3 -m venv .venv
	.venv/bin/pip install -e '.[test]'

test:
	.venv/bin/pytest

slow:
	.venv/bin/pytest -m slow

weekly:
	JAX_DISABLE_MOST_OPTIMIZATIONS=0 .venv/bin/pytest -m weekly  # its runs are long

lint:
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyrefly check --python-interpreter-path .venv/bin/python

ci:
	.ci/run
