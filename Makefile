# zaya-train: everything a checkout needs, in two commands: `make smoke` and `make test`.

.DEFAULT_GOAL := help
SHELL := bash
.DELETE_ON_ERROR:

BIN := .venv/bin
READY := .venv/.ready

.PHONY: help
help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo '  DATA=PATH TOKENIZER=NAME   train the smoke run on your own text'
	@echo '  PYTHON=python3.12          interpreter to build .venv from'
	@echo '  TORCH_INDEX=URL            take torch from this package index'

.PHONY: setup
setup: $(READY) ## create .venv and install everything, once

# The stamp lies in .venv, so removing .venv, or a change of a pin, runs the set-up again.
$(READY): pyproject.toml docker/pins.env .ci/setup
	@.ci/setup
	@touch $@

.PHONY: smoke
smoke: $(READY) ## the whole main job in miniature: data, training, kill, resume, export, answers
	@$(BIN)/zaya smoke $(if $(DATA),--data '$(DATA)') $(if $(TOKENIZER),--tokenizer '$(TOKENIZER)')

.PHONY: test
test: $(READY) ## lint, type check and all tests; the last line counts them
	@.ci/test

.PHONY: nightly
nightly: $(READY) ## the long forms: kills at random moments, corruptions; an hour or more
	@.ci/test -m nightly

.PHONY: docs
docs: $(READY) ## build the documentation into build/docs; a warning is an error
	@$(BIN)/python -m sphinx --fail-on-warning --keep-going --nitpicky --quiet docs build/docs
	@echo 'build/docs/index.html'

.PHONY: lint
lint: $(READY) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy zaya_train kernels/zaya_kernels tests

.PHONY: format
format: $(READY) ## rewrite the sources in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: clean
clean: ## remove what tools leave behind; keeps .venv and runs/
	rm -rf build dist outputs .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find zaya_train kernels tests -name __pycache__ -type d -prune -exec rm -rf {} +
