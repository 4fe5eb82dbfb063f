# Everything a newcomer needs: `make demo`, `make test`. Each target creates .venv and installs into
# it what it needs; a second run does not install again.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test lint bench bench-cil bench-cil-full broker node openvino clean help

help:
	@echo "make demo   the whole job on real input, about four minutes; results in demo-out/"
	@echo "make test   all tests"
	@echo "make lint   ruff and mypy"
	@echo "make node   ONNX Runtime for Node.js, for the test of examples/node"
	@echo "make openvino  an environment with ONNX Runtime's build for OpenVINO, for its tests"
	@echo "make bench  the benchmarks that need no extra data"
	@echo "make bench-cil       how the strategies learn and forget, one seed, up to 90 minutes"
	@echo "make bench-cil-full  the same with three seeds, hours; it can be stopped and started again"
	@echo "                     (both need DRIFTKEEL_DATA, see benchmarks/README.md)"

# The interpreter may be called python3 only; anything from 3.11 on will do.
$(VENV)/bin/python:
	@p=$$(command -v $(PYTHON) || command -v python3); \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Driftkeel needs Python 3.11 or newer; set PYTHON=/path/to/python3.11"; exit 1; }; \
	"$$p" -m venv $(VENV)

# torch first and by its exact version: a range may resolve to a build with gigabytes of CUDA.
$(INSTALLED): pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

# mosquitto where it may be installed; without it the embedded broker serves.
broker:
	@if ! PATH="$$PATH:/usr/sbin:/usr/local/sbin" command -v mosquitto >/dev/null 2>&1; then \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then \
	    echo "installing mosquitto"; \
	    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends mosquitto; } >/dev/null 2>&1 \
	      || echo "mosquitto could not be installed; the embedded broker is used"; \
	  else echo "no mosquitto here; the embedded broker is used (apt-get install mosquitto for the real one)"; fi; \
	fi

# The package holds what runs on a processor; its script would fetch more, which nothing here needs.
# A test that needs it asks for this target itself, and says so where there is no Node.js.
NODE := .cache/node

node:
	@if ! command -v node >/dev/null 2>&1 || ! command -v npm >/dev/null 2>&1; then \
	  echo "no Node.js here; the test of examples/node is left out"; \
	elif ! [ -f $(NODE)/node_modules/onnxruntime-node/package.json ]; then \
	  mkdir -p $(NODE) && cp examples/node/package.json $(NODE) && cd $(NODE) \
	    && ONNXRUNTIME_NODE_INSTALL=skip npm install --silent --no-audit --no-fund --no-package-lock \
	    || echo "onnxruntime-node could not be installed; the test of examples/node is left out"; \
	fi

# OpenVINO comes in a build of ONNX Runtime that cannot lie beside the plain one: an environment of
# its own, with what a device needs. Its tests say that they were left out where it is not there.
OPENVINO := .cache/openvino

openvino: $(INSTALLED)
	@$(BIN)/python tools/openvino_environment.py $(OPENVINO) \
	  || echo "OpenVINO could not be installed; its tests are left out"

demo: $(INSTALLED) broker
	$(BIN)/python -m examples.demo --out demo-out

# Two processes share the cores; threads of NumPy's library besides would only be in each other's way.
test: $(INSTALLED)
	OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks

# Results are kept run by run: what is there under the same settings is not run again.
BENCH_OUT ?= bench-out
BENCH_JOBS ?= 2

bench-cil: $(INSTALLED)
	$(BIN)/driftkeel bench suite --seeds 0 --out $(BENCH_OUT) --jobs $(BENCH_JOBS)
	$(BIN)/driftkeel bench report $(BENCH_OUT) --page $(BENCH_OUT)/learning.md

bench-cil-full: $(INSTALLED)
	$(BIN)/driftkeel bench suite --seeds 0,1,2 --out $(BENCH_OUT) --jobs $(BENCH_JOBS)
	$(BIN)/driftkeel bench report $(BENCH_OUT)

clean:
	rm -rf $(VENV) demo-out bench-out build *.egg-info .pytest_cache .ruff_cache .mypy_cache
