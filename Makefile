# Two commands on a fresh machine with Python 3.11 and pip: `make serve`, `make test`.

PORT ?= 8000
PYTHON ?= python3
VENV := .venv
VLLM := .venv-vllm
BIN := $(VENV)/bin
TORCH := torch==2.13.0
# PyTorch's CPU wheels are a tenth of the size of the default ones; TORCH_INDEX= (empty) skips them.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: help env vllm serve serve-vllm test test-full check format tiny schema clean

# An empty environment in folder $(1), with torch in it.
define new_environment
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(1)
	@if $(1)/bin/python -c 'import importlib.metadata as m, sys; sys.exit(m.version("torch").split("+")[0] != "2.13.0")' 2>/dev/null; then \
	  echo "torch: already installed"; \
	elif [ -n "$(TORCH_INDEX)" ] && $(1)/bin/python -c 'import urllib.request as u; u.urlopen("$(TORCH_INDEX)/torch/", timeout=5)' 2>/dev/null; then \
	  echo "torch: from $(TORCH_INDEX)"; $(1)/bin/pip install -q $(TORCH) --index-url $(TORCH_INDEX); \
	else \
	  echo "torch: from pip's own index ($(TORCH_INDEX) is not reachable)"; $(1)/bin/pip install -q $(TORCH); \
	fi
endef

help:            ## what can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

env: $(VENV)/.ready  ## the environment, from pinned constraints

$(VENV)/.ready: pyproject.toml constraints.txt
	$(call new_environment,$(VENV))
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]' --config-settings editable_mode=compat
	@touch $@

vllm: $(VLLM)/.ready  ## the environment of the real vLLM (its CPU build), beside ours

# Read constraints-vllm.txt on why without dependencies.
$(VLLM)/.ready: constraints-vllm.txt pyproject.toml
	$(call new_environment,$(VLLM))
	$(VLLM)/bin/pip install -q --no-deps -r constraints-vllm.txt
	$(VLLM)/bin/pip install -q --no-deps -e . --config-settings editable_mode=compat
	@$(VLLM)/bin/python -c 'import vllm.engine.arg_utils' \
	  || { echo "vLLM does not import; try: make clean vllm"; exit 1; }
	@touch $@

serve: env       ## the service on PORT (8000)
	$(BIN)/composer serve --port $(PORT)

serve-vllm: env vllm  ## the same experts on real vLLM servers, which it starts
	COMPOSER_ADAPTER_ROOTS='["examples/tiny/experts"]' \
	  $(BIN)/composer serve examples/vllm/experts.yaml --port $(PORT)

test: env        ## the quick tests; those on real vLLM servers too, once `make vllm` has been run
	$(BIN)/python -m pytest -q

test-full: env   ## every test, the slow ones too
	$(BIN)/python -m pytest -q -m "slow or not slow"

check: env       ## ruff, mypy strict, import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: env      ## what `check` would ask for, done
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

tiny: env        ## train the tiny experts anew (at most 40 minutes)
	$(BIN)/python -m examples.tiny.train
	$(BIN)/python -m examples.tiny.instructing
	$(BIN)/python -m examples.tiny.mixing

schema: env      ## the JSON schema editors use for experts.yaml
	$(BIN)/composer schema > examples/experts.schema.json

clean:           ## the environment and what was made beside it
	rm -rf $(VENV) $(VLLM) .cache build *.egg-info
