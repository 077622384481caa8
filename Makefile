# make demo · make test · make lint · make bench · make compile-gate · make conformance
#
# The first run makes a virtual environment in .venv; later ones find it. ARGS passes options on:
#   make test ARGS="-k native -x"
# With PYTHON=/path/to/python that interpreter is used as it is, and nothing is installed.

TORCH := torch==2.13.0
VENV  := .venv
ARGS  :=

# Whether the caller named an interpreter; `make` itself has no PYTHON.
ifeq ($(origin PYTHON),undefined)
  PYTHON := $(VENV)/bin/python
  SETUP  := $(VENV)/.installed
else
  SETUP  :=
  # The interpreter may hold an installed flash_attn_plus, with native kernels: then that is what is wanted.
  PROBE := import importlib.util as u; print(u.find_spec('flash_attn_plus') is not None)
  ifneq ($(shell "$(PYTHON)" -c "$(PROBE)" 2>&1),True)
    export PYTHONPATH := $(CURDIR)/src$(if $(PYTHONPATH),:$(PYTHONPATH))
  endif
endif

WORKERS := 2

# The oldest Triton that is supported, beside the one in the environment: the compile gate compiles with both.
OLD_TRITON := build/triton-3.6.0

.PHONY: demo test lint bench compile-gate conformance
.DELETE_ON_ERROR:

demo: $(SETUP)
	"$(PYTHON)" examples/train_gpt.py $(ARGS)

# Every operator on one device, held to the oracle (docs/vendors.md):
#   make conformance PYTHON=python3 ARGS="--import torch_npu --register PrivateUse1 --device npu"
conformance: $(SETUP)
	"$(PYTHON)" -m flash_attn_plus.conformance $(ARGS)

# Every plan for every target, with no GPU, by the newest and the oldest Triton; `make test` compiles some of them.
compile-gate: $(SETUP) $(OLD_TRITON)
	COMPILE_GATE=all "$(PYTHON)" -m pytest -n $(WORKERS) test/test_compile_gate.py $(ARGS)

$(OLD_TRITON):
	rm -rf "$@.part"
	"$(PYTHON)" -m pip install -q --no-deps --target "$@.part" "triton==$(patsubst build/triton-%,%,$@)"
	mv "$@.part" "$@"

# Two workers; each takes its part of the cores (test/conftest.py). NumPy's own threads would only be in their way.
test: $(SETUP) $(if $(filter Linux,$(shell uname -s)),$(if $(SETUP),$(OLD_TRITON)))
	OPENBLAS_NUM_THREADS=1 "$(PYTHON)" -m pytest -n $(WORKERS) $(ARGS)

lint: $(SETUP)
	"$(PYTHON)" -m ruff format --check .
	"$(PYTHON)" -m ruff check .
	"$(PYTHON)" -m mypy

bench: $(SETUP)
	"$(PYTHON)" benchmark/cpu_attention.py $(ARGS)

$(VENV)/.installed: pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/* cmake/*)
	@python3 -c "import sys; sys.exit(sys.version_info < (3, 10))" || \
	  { echo "python3 is missing or older than 3.10: install one, or pass PYTHON=/path/to/python."; exit 1; }
	@python3 -c "import ensurepip, venv" 2>/dev/null || \
	  { echo "python3 lacks venv: apt install python3-venv (Debian), or pass PYTHON=/path/to/python."; exit 1; }
	test -x $(VENV)/bin/python || python3 -m venv $(VENV)
	# torch by itself and by exact version: where a CPU build lies at hand it is taken, instead of gigabytes of CUDA.
	$(VENV)/bin/python -m pip install -q "$(TORCH)"
	$(VENV)/bin/python -m pip install -q -c constraints.txt scikit-build-core ninja
	$(VENV)/bin/python -m pip install -q -c constraints.txt --no-build-isolation -e ".[test,demo,lint]"
	$(VENV)/bin/python -c "from flash_attn_plus import native; print('native CPU library:', native.status())"
	touch $@
