.PHONY: format lint type test test-all
format:
	ruff format . && ruff check --fix .
lint:
	ruff format --check . && ruff check .
type:
	mypy
test:
	pytest
test-all:
	pytest -m "slow or not slow"
