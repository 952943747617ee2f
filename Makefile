.PHONY: test test-all tables format reproduce mutants
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
mutants:  # make mutants SEED=1 JOBS=2
	python tools/mutate.py --seed $(or $(SEED),0) --jobs $(or $(JOBS),1)
