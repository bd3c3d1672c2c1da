# chromarpc: everything a newcomer needs. `make help` lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-web serve test test-fast coverage test-faults test-history test-planted test-ray test-cuts soak test-gpu test-clients test-browser test-foreign \
	check check-protos check-clients protos sync-client baseline page format verify bench bench-scale bench-simulate bench-watchers bench-mismatch performance \
	fuzz clean

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 16

setup: $(STAMP)  ## Make .venv with the server, the client and the developer tools

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo 'Python 3.11 or newer is needed: make PYTHON=python3.12 …'; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 -c constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[server,web,otel,dev]' -c constraints.txt
	@touch $(STAMP)

demo: setup  ## Start a server with the bundled checkpoint, stream one generation, leave a picture
	$(BIN)/python tools/demo.py

demo-web: setup  ## Open a page on the bundled checkpoint: prints its address
	$(BIN)/chromarpc-server web --port 0 --store memory --preload chroma-mini --alias chroma=chroma-mini --lora-root server/chromarpc_server/assets/loras

serve: setup  ## Serve the bundled checkpoint on 127.0.0.1:50051
	$(BIN)/chromarpc-server --preload chroma-mini --alias chroma=chroma-mini --lora-root server/chromarpc_server/assets/loras

test: setup  ## Run the tests (CPU only)
	$(BIN)/python -m pytest

# The rooms' own folders: no test in them starts a server of the whole, and `slow` marks what takes more than 0.3 s.
FAST := $(addprefix tests/,domain transport jobs runtime adapters pipeline client)
test-fast: setup  ## Run the tests that are quick, in less than a minute: for the inner loop
	$(BIN)/python -m pytest $(FAST) -m 'not gpu and not slow'

coverage: setup  ## Run the tests with coverage.py (twice as long), and list what they do not run
	$(BIN)/python -m coverage erase
	$(BIN)/python -m coverage run -m pytest
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m tools.uncovered

test-faults: setup  ## Crashes, hangs, full disks, lost devices, kill -9 (100 times: python -m tests.faults.kill_nine)
	$(BIN)/python -m pytest tests/faults tests/security/test_hostile_connections.py tests/integration/test_lifecycle.py tests/integration/test_device_errors.py

RAY_STAMP := $(VENV)/.ray-installed
$(RAY_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[ray]' -c constraints.txt
	@touch $(RAY_STAMP)

test-ray: $(RAY_STAMP)  ## Kill actors, hosts and heads of real Ray clusters on this machine (installs Ray into .venv)
	$(BIN)/python -m pytest -m ray tests/ray

SECONDS ?= 60
test-history: setup  ## Random histories of a real server, judged from what clients were told (SECONDS=60, SEED=, FAULTS=all)
	$(BIN)/python -m tests.faults.history --seconds $(SECONDS) $(if $(SEED),--seed $(SEED)) $(if $(FAULTS),--faults $(FAULTS))

test-planted: setup  ## Break a server in seven ways, and see that the history checker finds each
	$(BIN)/python -m pytest -m planted tests/faults/history

test-cuts: setup  ## Cut process and power at every write of the store, with more chance than the tests have time for
	$(BIN)/python -m tests.faults.cuts --variants 10 --starts 40

JOBS := 20000
soak: setup  ## Make many small jobs (JOBS=20000), and see that a server holds no more than before
	$(BIN)/python -m tests.faults.soak --jobs $(JOBS)

test-gpu: setup  ## Run the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu

node: client/node_modules/.installed  ## Install what the TypeScript package, the page and their tests need

client/node_modules/.installed: client/package-lock.json
	@command -v node >/dev/null || { echo 'Node 20.19 or newer is needed'; exit 1; }
	cd client && npm ci
	@touch $@

test-clients: setup node  ## Run the TypeScript package's tests against a real server
	cd client/typescript && npm test

test-browser: setup node  ## Drive the page in Chromium (CHROMIUM=/usr/bin/chromium)
	cd client/web && npm test

test-foreign: setup  ## Call the server from languages that nobody here wrote a client for
	tests/foreign/run

check-clients: setup node  ## Types and lint of the TypeScript, and that its stubs and the built page are current
	cd client/typescript && npx --no-install tsc -p tsconfig.json --noEmit
	cd client/web && npx --no-install tsc --noEmit
	cd client && npx --no-install biome check --error-on-warnings .
	tools/check_page.sh

page: setup node  ## Generate the TypeScript stubs and build the page into the server's package
	BUF=$(CURDIR)/$(BIN)/buf tools/generate_typescript.sh client/typescript/src/gen
	cd client/web && npx --no-install vite build
	$(BIN)/python -c 'from chromarpc_server.gateway import openapi as o; o.FILE.write_text(o.text(), encoding="utf-8")'
	$(BIN)/python -c 'from chromarpc_server.gateway.configuration import deployed_yaml as d; print(d(), end="")' > deploy/envoy.yaml

check: setup check-protos  ## Lint, types, import layers, dependencies, the blocking client, protos
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m tools.check_dependencies
	$(BIN)/python -m tools.unasync --check

check-protos: setup  ## buf lint, buf breaking against the last release, and that the stubs are current
	$(BIN)/buf lint
	$(BIN)/buf breaking protos --against protos/chromarpc.v1.binpb
	PYTHON=$(BIN)/python tools/check_stubs.sh

protos: setup  ## Generate the enums of errors and warnings, their tables in docs/, and the Python stubs of protos/
	$(BIN)/python -m tools.code_tables
	PYTHON=$(BIN)/python tools/generate_stubs.sh

sync-client: setup  ## Generate the blocking client from the asyncio one
	$(BIN)/python -m tools.unasync

baseline: setup  ## At a release, and only then: make its contract what `buf breaking` compares with
	$(BIN)/buf build protos -o protos/chromarpc.v1.binpb

format: setup  ## Format and fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

verify: setup  ## Check this install against recorded outputs of the reference
	$(BIN)/chromarpc-server verify tests/goldens

bench: setup  ## Speed, error, the service around it, responsiveness, adapter switching: on a GPU at full size
	PYTHONPATH=. $(BIN)/python -m bench.speed
	PYTHONPATH=. $(BIN)/python -m bench.error
	PYTHONPATH=. $(BIN)/python -m bench.service
	PYTHONPATH=. $(BIN)/python bench/responsiveness.py
	PYTHONPATH=. $(BIN)/python -m bench.switching
	PYTHONPATH=. $(BIN)/python -m bench.cfg_parallel
	PYTHONPATH=. $(BIN)/python bench/gateway.py

performance: setup  ## Write docs/performance.md and its plot from bench/results
	PYTHONPATH=. $(BIN)/python -m bench.report

bench-mismatch: setup  ## What each way of drawing otherwise than the trainer costs, on a recorded run
	PYTHONPATH=. $(BIN)/python -m bench.mismatch

bench-scale: setup  ## What the front costs beside 1 to 8 devices that only take time (Linux)
	PYTHONPATH=. $(BIN)/python -m bench.scale

bench-simulate: setup  ## How the queue chooses on 8 to 512 devices, in virtual time
	PYTHONPATH=. $(BIN)/python -m bench.simulate

bench-watchers: setup  ## Many watchers of running jobs, many new jobs, cuts, idleness (Linux)
	PYTHONPATH=. $(BIN)/python -m bench.watchers

fuzz: setup  ## Feed damaged adapters, text encoders and autoencoders to their readers, ten minutes each
	$(BIN)/python -m tools.fuzz_adapters --minutes 10
	$(BIN)/python -m tools.fuzz_parts --minutes 10

clean:  ## Remove the virtual environment and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache build dist out
