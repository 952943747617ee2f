.PHONY: test test-all tables format reproduce
test:
	python -m pytest
test-all:
	python -m pytest -m ""
tables:
	python tools/ledger.py
format:
	ruff check --fix
	ruff format
reproduce:  # make reproduce R=cifar/results/command.json
	python tools/reproduce.py $(R)
