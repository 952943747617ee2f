PYTEST = python -m pytest -n auto --dist loadgroup

.PHONY: test test-all tables format
test:
	$(PYTEST) -m "not slow"
test-all:
	$(PYTEST)
tables:
	python tools/ledger.py
format:
	ruff check --fix
	ruff format
