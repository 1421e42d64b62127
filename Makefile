PYTHON ?= python3
VENV := .venv/bin
PIP := $(VENV)/python -m pip --disable-pip-version-check install -c .venv/constraints.txt

.PHONY: demo test bench lint gpu gpu-check build

demo: build  ## the whole story on one page: ARGS="--model PATH_OR_ID --data FILE"
	$(VENV)/python -m demo $(ARGS)

test: export PYFASTPEFT_REQUIRE_NATIVE = 1
test: export PYFASTPEFT_SLOW = $(SLOW)
test: build  ## ARGS="-k lora -x", SLOW=1 for all
	$(VENV)/python -m pytest --numprocesses=logical --maxprocesses=4 --dist=loadfile --no-loadscope-reorder $(ARGS)

bench: build  ## FULL=1 for all shapes
	$(VENV)/python -m benchmarks $(if $(FULL),--full) $(ARGS)

lint: .venv/installed
	$(VENV)/ruff check .
	$(VENV)/ruff format --check .

# On a machine with a GPU, without network or pip: everything with the Python that it has, in at most nine minutes.
# Libraries that were built elsewhere from the same sources are used as they are.
gpu:
	$(PYTHON) -m benchmarks.gpu

# Every tensor is an allocation of its own, so that an access beside it shows; graphs cannot be captured then.
gpu-check: export PYTORCH_NO_CUDA_MEMORY_CACHING = 1
gpu-check:  ## minutes: compute-sanitizer looks at every access of our kernels, not of torch's
	test -e pyfastpeft/_ops.so || PYFASTPEFT_CUDA=0 $(PYTHON) csrc/libraries.py
	for tool in memcheck racecheck; do \
	  compute-sanitizer --tool $$tool --error-exitcode 1 --report-api-errors no --kernel-name kns=pyfastpeft \
	  $(PYTHON) -m pytest tests/test_gpu.py -k "cuda and not hundred and not graph and not one_launch" $(ARGS) || exit 1; \
	done

build: .venv/installed
	@$(VENV)/python setup.py -q build_ext --inplace

# torch first, since the libraries are built against it. Where it asks for a triton of its own, that one is right.
.venv/installed: constraints.txt pyproject.toml
	test -x $(VENV)/python || $(PYTHON) -m venv .venv
	grep -v '^triton' constraints.txt > .venv/constraints.txt
	$(PIP) torch setuptools pybind11 ninja
	$(VENV)/python -m pip show torch | grep -q '^Requires:.*triton' || cp constraints.txt .venv/constraints.txt
	PYFASTPEFT_CUDA=0 $(PIP) --no-build-isolation -e '.[hf,bench,quality,dev]'  # `build` builds the CUDA library
	$(PIP) --no-deps nvidia-cutlass  # its headers alone; before others, pip would tell of what it lacks
	touch $@
