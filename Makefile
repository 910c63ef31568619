# `make serve` and `make test` are all most people need; each sets up what it lacks.
#
#   make serve [MODEL_ID=...] [NUM_SHARD=N] [PORT=3000] [ARGS="more flags of headgate serve"]
#   make test [WORKERS=2] [PYTEST_ARGS="..."]   all tests, by so many processes side by side
#   make test-api [SECONDS=900]     requests made up from the server's own OpenAPI document
#   make test-kernels               all tests of the kernels, those that `make test` leaves out too
#   make test-neon                  the C++ kernels on 64-bit Arm by an emulator, against those here
#   make test-avx512                the kernels for AVX-512 on a machine with AVX2, emulated by SIMDe
#   make kernels-report             compiles the GPU kernels; docs/kernels.md and docs/roofline.md
#   make test-gpu                   the kernels on this machine's GPU against the reference; graphs, streams, NCCL
#   make bench-gpu                  their times beside PyTorch's, decode steps beside their floor: docs/gpu.json, docs/gpu.md
#   make tune-gpu                   the fastest tiles on this machine's GPU: kernels/triton/tuning.json
#   make setup [TORCH_INDEX=URL]    the virtual environment, in steps (deploy/setup.sh)
#   make proto                      gRPC stubs from proto/*.proto
#   make lint, make format          ruff and mypy; ruff's formatter
#   make wheel                      dist/*.whl and the source archive
#   make bench-quality              what quantising the weights costs in quality
#   make bench [RUNS=3] [BENCH_ARGS=--short]   docs/benchmarks.md: rates, latencies, share of the roofline
#   make bench-peers                the same with other servers in turn, those whose place is given:
#                                   OPENVINO_PYTHON and OPENVINO_MODELS, LLAMA_SERVER and LLAMA_MODELS,
#                                   VLLM_PYTHON, TRANSFORMERS_PYTHON and TRANSFORMERS_MODEL
#   make bench-host                 what gateway and router cost per token, without a model
#   make bench-steps [BENCH_ARGS="--kinds bf16,int8,int4 --num-shard 2"]   a CPU step, call by call (docs/performance.md)
#   make bench-bounds [BENCH_ARGS="--of docs/benchmarks.jsonl"]   what the benchmark's workloads take at least on a machine
#   make test-fresh                 the image's steps and the README's commands on a bare Debian (root)
#   make clean                      removes the environments and everything generated

VENV ?= .venv
GPU_PYTHON ?= $(or $(wildcard $(VENV)/bin/python),python3)
export VENV TORCH_INDEX PYTHON

.PHONY: help serve test test-api test-kernels test-neon test-avx512 kernels-report test-gpu bench-gpu tune-gpu setup setup-dev proto lint format wheel \
	bench bench-peers bench-host bench-steps bench-bounds bench-quality test-fresh clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^#   //p' Makefile

setup:
	@deploy/setup.sh
	@echo "set up: 'make serve' starts a server"

setup-dev:
	@deploy/setup.sh --dev

# The launcher takes make's place in the shell, so that Ctrl-C and SIGTERM reach it.
serve:
	@deploy/setup.sh
	@exec $(VENV)/bin/headgate serve $(if $(MODEL_ID),--model-id '$(MODEL_ID)') \
		$(if $(NUM_SHARD),--num-shard $(NUM_SHARD)) $(if $(PORT),--port $(PORT)) $(ARGS)

# A file goes to one worker, the longest ones first (testpaths). Fixtures of the session are each worker's own.
SIDE_BY_SIDE = --numprocesses=$(or $(WORKERS),2) --dist=loadfile --no-loadscope-reorder

test: setup-dev
	@start=$$(date +%s); $(VENV)/bin/python -m pytest $(SIDE_BY_SIDE) $(PYTEST_ARGS) && \
		echo "make test: passed in $$(($$(date +%s) - start)) s"

test-api: setup-dev
	@TEST_API_SECONDS=$(or $(SECONDS),900) $(VENV)/bin/python -m pytest -s tests/server/test_properties.py

test-kernels: setup-dev
	@$(VENV)/bin/python -m pytest $(SIDE_BY_SIDE) -m 'exhaustive or not exhaustive' tests/kernels $(PYTEST_ARGS)

test-neon: setup-dev
	@HEADGATE_TEST_NEON=1 $(VENV)/bin/python -m pytest -m exhaustive tests/kernels/test_cpu_neon.py $(PYTEST_ARGS)

test-avx512: setup-dev
	@directory=$$(mktemp -d) && trap 'rm -rf "$$directory"' EXIT && \
		HEADGATE_EMULATED_AVX512=$$directory $(VENV)/bin/python -m pytest tests/kernels -k avx512 $(PYTEST_ARGS)

kernels-report: setup-dev
	@TRITON_INTERPRET=0 $(VENV)/bin/python -m headgate.kernels.triton.report

# On a machine with a GPU, from a bare checkout: python3 with torch and triton is enough.
test-gpu:
	@TRITON_INTERPRET=0 $(GPU_PYTHON) -m headgate.kernels.triton.on_gpu check
	@TRITON_INTERPRET=0 $(GPU_PYTHON) -m headgate.bench.gpu_steps check

bench-gpu:
	@TRITON_INTERPRET=0 $(GPU_PYTHON) -m headgate.kernels.triton.on_gpu time --seconds 360
	@TRITON_INTERPRET=0 $(GPU_PYTHON) -m headgate.bench.gpu_steps time

tune-gpu:
	@TRITON_INTERPRET=0 $(GPU_PYTHON) -m headgate.kernels.triton.tune

proto: setup
	@$(VENV)/bin/python setup.py --quiet build_stubs && echo "stubs written to proto/"

lint: setup-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: setup-dev
	$(VENV)/bin/ruff format .

wheel: setup-dev
	@rm -rf build dist
	@$(VENV)/bin/python setup.py --quiet sdist
	@$(VENV)/bin/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	@ls -l dist

bench-quality: setup
	@$(VENV)/bin/python -m headgate.bench.quality $(BENCH_ARGS)

BENCH = $(VENV)/bin/python -m headgate.bench --output docs/benchmarks --runs $(or $(RUNS),3) \
	$(if $(MODEL_ID),--model-id '$(MODEL_ID)') $(BENCH_ARGS)

bench: setup
	@BENCH_COMMAND="make bench" $(BENCH)

bench-peers: setup
	@BENCH_COMMAND="make bench-peers" $(BENCH) \
		$(if $(OPENVINO_PYTHON),--openvino-python '$(OPENVINO_PYTHON)') \
		$(if $(OPENVINO_MODELS),--openvino-models '$(OPENVINO_MODELS)') \
		$(if $(LLAMA_SERVER),--llama-server '$(LLAMA_SERVER)') \
		$(if $(LLAMA_MODELS),--llama-models '$(LLAMA_MODELS)') \
		$(if $(VLLM_PYTHON),--vllm-python '$(VLLM_PYTHON)') \
		$(if $(TRANSFORMERS_PYTHON),--transformers-python '$(TRANSFORMERS_PYTHON)') \
		$(if $(TRANSFORMERS_MODEL),--transformers-model '$(TRANSFORMERS_MODEL)')

bench-host: setup
	@$(VENV)/bin/python -m headgate.bench.host $(BENCH_ARGS)

bench-steps: setup
	@$(VENV)/bin/python -m headgate.bench.step_profile $(BENCH_ARGS)

bench-bounds: setup
	@$(VENV)/bin/python -m headgate.bench.bounds $(BENCH_ARGS)

test-fresh:
	deploy/test_fresh.sh

clean:
	rm -rf $(VENV) $(VENV)-clients build dist headgate.egg-info proto/*_pb2.py proto/*_pb2.pyi \
		proto/*_pb2_grpc.py .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
