PYTEST = python -m pytest -n auto --dist loadgroup

.PHONY: test test-all tables format reproduce
test:
	$(PYTEST) -m "not slow"
test-all:
	$(PYTEST)
tables:
	python tools/ledger.py
format:
	ruff check --fix
	ruff format
reproduce:  # make reproduce R=cifar/results/command.json
	python tools/reproduce.py $(R)
