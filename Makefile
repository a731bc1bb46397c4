# Two commands: `make demo` and `make test`. `make check` is what CI runs first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-arm test-crash test-faults test-fuzz test-kill test-operators test-outage check bench format clean help
help:
	@sed -n 's/^## //p' $(MAKEFILE_LIST)

# Re-made only when the dependencies change, so that everything works again without an index.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python >= 3.11 is needed, $(PYTHON) is older: make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

## make demo    the whole product on this machine, in under three minutes; KEEP=1 leaves the agent running
demo: $(STAMP)
	$(BIN)/python -m examples.demo $(if $(KEEP),--keep)

## make test    the test suite: real onnxruntime, sockets, mosquitto, Prometheus, git, an OCI registry
test: $(STAMP)
	$(BIN)/python -m pytest -q

## make check   ruff, format, mypy --strict, import-linter
check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

## make bench   the tables of docs/benchmarks.md, on this machine
bench: $(STAMP)
	$(BIN)/python -m benchmarks

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .demo .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info

## make test-kill   kill -9 of an agent at 500 random moments of updates under load (about half an hour)
test-kill: $(STAMP)
	EDGE_KILLS=500 $(BIN)/python -m pytest -q -s tests/system/test_kill.py

## make test-crash   power cuts, kills and refusing disks at every file-system call of whole updates (about half an hour)
test-crash: $(STAMP)
	EDGE_CRASH=all $(BIN)/python -m pytest -q -s tests/update/test_crash_points.py

## make test-faults   a model that raises, hangs, answers NaN or vanishes under 500 requests a second, 20 s each (about 4 minutes)
test-faults: $(STAMP)
	EDGE_FAULT_SECONDS=20 $(BIN)/python -m pytest -q -s tests/system/test_faults.py

## make test-fuzz   a million mutated HTTP and as many MQTT messages at one agent each (about 30 minutes)
test-fuzz: $(STAMP)
	EDGE_FUZZ_MESSAGES=1000000 $(BIN)/python -m pytest -q -s tests/system/test_http_fuzz.py tests/system/test_mqtt_fuzz.py

## make test-arm   golden vectors under emulated Cortex-A53, A76 and max (qemu-user-static and mmdebstrap; 230 MB the first time)
ARM_LANE ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/edge-inference/arm64
test-arm: $(STAMP)
	tests/arm/lane.sh $(ARM_LANE) $(BIN)/python
	EDGE_ARM_LANE=$(ARM_LANE) $(BIN)/python -m pytest -q tests/arm

## make test-operators   every operator's model of onnx's own tests through quantize-model (about 20 minutes)
test-operators: $(STAMP)
	EDGE_OPERATORS=all $(BIN)/python -m pytest -q tests/quantize/test_models_of_strangers.py

## make test-outage   a broker away for a minute under 100 messages a second, the agent killed meanwhile (about 2 minutes)
test-outage: $(STAMP)
	EDGE_STREAM_MESSAGES=9000 EDGE_STREAM_OUTAGE=60 $(BIN)/python -m pytest -q -s tests/transport/test_streams_over_mqtt.py -k though_broker_and_agent_die
