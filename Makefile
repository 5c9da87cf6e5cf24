# Every target sets up what it needs in .venv; nothing is done twice.
PYTHON ?= python3
TORCH ?= torch==2.13.0
TRITON ?= triton>=3.6
OUT ?= bench/results/local
VENV := .venv
PY := $(VENV)/bin/python
SOURCES := setup.py $(wildcard csrc/*)

.PHONY: build demo test bench gpu-check gpu-build gpu-test gpu-bench lint format cuda-objects wheel-check clean

build: $(VENV)/built

$(VENV)/ready: pyproject.toml
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q --upgrade pip
	$(PY) -m pip install -q "$(TORCH)" "$(TRITON)"
	$(PY) -c "import tomllib; e = tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']; \
	  print('\n'.join(r for k in ('dev', 'test', 'bench', 'demo') for r in e[k]))" > $(VENV)/requirements.txt
	$(PY) -m pip install -q -r $(VENV)/requirements.txt
	touch $@

$(VENV)/built: $(VENV)/ready $(SOURCES)
	$(PY) -m pip install -q --no-build-isolation --no-deps -e .
	touch $@

demo: build
	$(PY) -m examples.digits_mlp

test: build
	$(PY) -m pytest -n 2 --dist loadscope --max-worker-restart 0 tests

bench: build
	$(PY) -m bench --out $(OUT)

lint: build
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/clang-format --dry-run --Werror csrc/* tests/emulation/*.cpp tests/emulation/*.h tests/emulation/*.cu

format: build
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i csrc/* tests/emulation/*.cpp tests/emulation/*.h tests/emulation/*.cu

# A wheel, installed into an environment of its own, imported from elsewhere.
wheel-check: build
	$(PY) tests/wheel_check.py

# On a machine with a GPU and no network: `make gpu-check OUT=dir [GPU_PYTHON=python3]`, or its parts.
# What fails in one part does not keep the other from running.
GPU_PYTHON ?= $(PYTHON)
GPU_MINUTES ?= 8
GPU_TEST = $(GPU_PYTHON) -m tests.gpu --minutes $(GPU_MINUTES) --out $(OUT)
GPU_BENCH = $(GPU_PYTHON) -m bench --device cuda --minutes $(GPU_MINUTES) --out $(OUT)
gpu-build:
	PYDL_CUDA=1 $(GPU_PYTHON) -m pip install -q --disable-pip-version-check --no-index --no-build-isolation --no-deps -e .
	$(GPU_PYTHON) -m pydl info

gpu-test: gpu-build
	$(GPU_TEST)

gpu-bench: gpu-build
	$(GPU_BENCH)

gpu-check: gpu-build
	$(GPU_TEST); tested=$$?; $(GPU_BENCH) && exit $$tested

clean:
	rm -rf build dist *.egg-info pydl/_C*.so pydl/_built.py $(VENV)/built
