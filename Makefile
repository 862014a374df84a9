# Everything from a fresh checkout: `make demo`, `make test`. Needs python3 (3.10 or newer, with venv), g++, cmake, make.
#
# The environment is brought up to date before each target; that takes part of a second when nothing changed.
# llama-cpp-python is compiled once per machine and kept in $GGML_MIRROR_CACHE (~/.cache/ggml-mirror), as is the model.

PYTHON ?= python3
VENV ?= .venv
MODEL =
DRAFT =
MARKERS = not gpu and not soak
PYTEST_ARGS =
WORKERS = auto
ARGS =

py := $(VENV)/bin/python
demo_draft := models/smollm2-135m-instruct-dflash-q8_0.gguf
demo_target = $$($(py) scripts/setup/demo_target.py)
# A worker has a part of the tests in their order, and takes of the others' when it is done: few fixtures are made in each of them.
# numpy computes in one thread, llama.cpp in as many as a test says; those that wait for each other leave the core to others.
pytest = OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(py) -m pytest $(if $(filter-out 0 1,$(WORKERS)),-n $(WORKERS) --dist worksteal)

MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help
.PHONY: help env demo serve test soak lint sanitize clean

help: ## List the targets and their variables
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):[^#]*## /  make \1\t/' | expand -t 18
	@echo
	@echo 'Variables: PYTHON=python3  VENV=.venv  MODEL=FILE.gguf DRAFT=FILE.gguf (demo)  PYTEST_ARGS="-k ring -x" (test, sanitize)  ARGS="--port 9000" (serve)'
	@echo '           WORKERS=auto (test, soak, sanitize: processes that run tests, one per core; 1: no others than pytest)'

env: ## Create or update the virtual environment, with the package installed in place
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: pass PYTHON=")'
	@$(PYTHON) scripts/setup/environment.py '$(VENV)'

demo: env ## Probe a real model (bytes, noise and speed of every dtype), then draft with it: what dtypes cost (build/demo/)
	@mkdir -p build/demo
	@set -e; model='$(MODEL)'; draft='$(DRAFT)'; [ -n "$$model" ] || { model="$(demo_target)"; draft='$(demo_draft)'; }; \
	$(VENV)/bin/ggml-mirror probe -m "$$model" --json build/demo/probe.json --plot build/demo/probe.png; \
	[ -z "$$draft" ] || $(py) scripts/ab_humaneval.py -m "$$model" -md "$$draft" --prompts 3 --style raw -n 64 --plain \
		--max-acceptance-drop 10 \
		--json build/demo/ab.json --plot build/demo/ab.png

serve: env ## Serve OpenAI's API on http://127.0.0.1:8000, drafting with the demo pair (ARGS="--port 9000 --feature-dtype bf16")
	@set -e; model='$(MODEL)'; draft='$(DRAFT)'; [ -n "$$model" ] || { model="$(demo_target)"; draft='$(demo_draft)'; }; \
	exec $(VENV)/bin/ggml-mirror serve -m "$$model" $${draft:+-md "$$draft"} --feature-dtype q8_0 $(ARGS)

test: env ## Run all tests that need no GPU (but for `make soak`, long repetitions of some)
	@set -e; GGML_MIRROR_DEMO_TARGET="$(demo_target)"; export GGML_MIRROR_DEMO_TARGET; \
	$(pytest) -m '$(MARKERS)' $(PYTEST_ARGS)

soak: ## Run the long repetitions: leaks over 100 cycles of every target, long random walks, 50 prompts in every dtype
	@$(MAKE) test MARKERS='soak and not gpu'

lint: env ## Check style (ruff) and types (mypy)
	$(py) -m ruff check .
	$(py) -m ruff format --check .
	$(py) -m mypy ggml_mirror

# The interpreter is not built with the sanitizers, so their runtimes are loaded before it. So is the C++ runtime: ASan
# looks up __cxa_throw once, at start. PYTHONMALLOC gives every small buffer its own red zones.
# pytest must leave file descriptor 2 and SIGSEGV alone, or the reports are lost.
SANITIZED = tests/mirror tests/dflash/test_fused.py tests/dflash/test_fused_machine.py tests/test_draft_graph.py
SANITIZE_PRELOAD = $(foreach lib,libasan.so libubsan.so libstdc++.so,$(shell $(CXX) -print-file-name=$(lib)))
sanitize: env ## Run tests of mirror, fuser and draft with the native library under ASan and UBSan
	cmake -S . -B build/sanitize -DGM_SANITIZE=ON -DCMAKE_CXX_COMPILER=$(CXX) \
		-DPython_EXECUTABLE="$$($(py) -c 'import sys; print(sys.executable)')"
	cmake --build build/sanitize --parallel
	@set -e; GGML_MIRROR_DEMO_TARGET="$(demo_target)"; export GGML_MIRROR_DEMO_TARGET; \
	GGML_MIRROR_LIB='$(CURDIR)/build/sanitize/libggml_mirror.so' \
	LD_PRELOAD="$(SANITIZE_PRELOAD)" PYTHONMALLOC=malloc \
	ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	$(pytest) $(SANITIZED) -m 'not gpu and not slow and not soak' -p no:faulthandler --capture=sys $(PYTEST_ARGS)

clean: ## Remove build products; environments and the cache stay
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find ggml_mirror scripts tests -name __pycache__ -type d -prune -exec rm -rf {} +
