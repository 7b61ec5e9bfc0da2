# make demo: train on scanned digits and look at samples.   make test: all tests but
# some of several processes, which make test-slow runs.
# Both set up all they need in .venv; no GPU, no network beyond pip.

PYTHON ?= python3
VENV ?= .venv
RUN ?= runs/demo
# CUDA kernels take longest to compile and need a GPU to run, so they are left out where there is none.
# TIM_CUDA=ON builds them anyway.
TIM_CUDA ?= $(if $(shell command -v nvidia-smi),AUTO,OFF)

BIN := $(VENV)/bin
DEMO := $(VENV)/.installed-logging-$(TIM_CUDA)
DEV := $(VENV)/.installed-dev-$(TIM_CUDA)
BUILD_INPUTS := pyproject.toml constraints.txt CMakeLists.txt $(shell find csrc cmake -type f -not -path 'csrc/emulator/*')

.PHONY: demo test test-slow sanitize lint format clean
.DELETE_ON_ERROR:

# The stem is the extra to install.
$(VENV)/.installed-%-$(TIM_CUDA): $(BUILD_INPUTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	SKBUILD_CMAKE_DEFINE=TIM_CUDA=$(TIM_CUDA) \
	  $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$*]"
	touch $@

demo: $(DEMO)
	rm -rf $(RUN)
	$(BIN)/tim train digits --run $(RUN)
	$(BIN)/tim sample $(RUN) --steps 1,2,4,8,16,32 --out $(RUN)/samples.png
	$(BIN)/tim evaluate $(RUN)

test: $(DEV)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m "not slow"

test-slow: $(DEV)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m slow tests/distributed

# The emulated CUDA kernels under AddressSanitizer and UBSan of the compiler, which is GCC here. The
# leaks of Python itself are none of ours.
sanitize: $(DEV)
	TIM_EMULATOR_SANITIZE=ON OMP_NUM_THREADS=1 ASAN_OPTIONS=detect_leaks=0 \
	  LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	  $(BIN)/python -m pytest -q -n 2 tests/emulator

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' \
	  | xargs $(BIN)/clang-format --dry-run --Werror

format: $(DEV)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' \
	  | xargs $(BIN)/clang-format -i

clean:
	rm -rf $(VENV) build dist
