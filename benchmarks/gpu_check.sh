#!/usr/bin/env bash
# Builds the extension, runs the GPU tests and all benchmarks in under ten minutes, without network.
#
#   benchmarks/gpu_check.sh [--dry-run] [--device cpu] [RESULTS_DIRECTORY]
#
# Needs Python with torch, numpy and pytest, CMake, and nvcc; takes ninja and pytest-xdist where they
# are. Test files that need more packages are skipped by name. pybind11 is the folder named by
# PYBIND11_DIR or pybind11_DIR, else what `python -m pybind11` says, else pip fetches it. PYTHON names
# the interpreter. Nothing is installed: the package is put together in build/gpu_check and found
# through PYTHONPATH. `--device cpu` rehearses all of it, with short measurements, without a GPU;
# `--dry-run` prints what would run.
#
# Writes RESULTS_DIRECTORY/<gpu>-<date>.json (default benchmarks/results) and prints a short table
# last. A part that fails does not stop the others, but the exit code is then 1.

set -uo pipefail

device=cuda
dry=
while [[ "${1:-}" == --* ]]; do
    case $1 in
    --dry-run) dry=1 ;;
    --device)
        device=${2:?--device needs cuda or cpu}
        shift
        ;;
    *)
        echo "unknown option $1" >&2
        exit 2
        ;;
    esac
    shift
done
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
results=${1:-$root/benchmarks/results}
python=${PYTHON:-python3}
work=$root/build/gpu_check
site=$work/site
parts=$work/parts
deadline=580
failed=()
export device root python work site parts
export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1

# part SECONDS NAME COMMAND...: runs the command for at most so long, and notes when it fails.
part() {
    local limit=$1 name=$2 left=$((deadline - SECONDS)) status
    shift 2
    if [ -n "$dry" ]; then
        printf 'at most %s s, %s: %s\n' "$limit" "$name" "$*"
        return
    fi
    printf '\n== %s (after %d s) ==\n' "$name" "$SECONDS"
    if [ "$left" -lt 5 ]; then
        failed+=("$name: no time left")
        return
    fi
    # timeout starts programs only, so a shell has to call our functions.
    timeout --kill-after=10 "$((limit < left ? limit : left))" bash -c '"$@"' part "$@"
    status=$?
    case $status in
    0) ;;
    124 | 137) failed+=("$name: stopped at its time limit") ;;
    *) failed+=("$name: exit code $status") ;;
    esac
}

# Prints the folder that holds pybind11Config.cmake.
find_pybind11() {
    local given=${PYBIND11_DIR:-${pybind11_DIR:-}} inner
    if [ -n "$given" ]; then
        for inner in . share/cmake/pybind11 pybind11/share/cmake/pybind11; do
            if [ -f "$given/$inner/pybind11Config.cmake" ]; then
                echo "$given/$inner"
                return
            fi
        done
        echo "no pybind11Config.cmake under $given" >&2
        return 1
    fi
    "$python" -m pybind11 --cmakedir 2>/dev/null && return
    "$python" -m pip install --quiet --target "$work/pybind11" pybind11 >&2 &&
        echo "$work/pybind11/pybind11/share/cmake/pybind11"
}

# That of this GPU alone: the kernels take longest to compile.
architecture() {
    "$python" - <<'PYTHON'
import torch

if torch.cuda.is_available():
    major, minor = torch.cuda.get_device_capability()
    print(f"{major}{minor}{'a' * (major >= 9)}-real")
PYTHON
}

build() {
    local cuda=ON tree=$work/cmake-$device pybind11
    [ "$device" = cpu ] && cuda=OFF
    pybind11=$(find_pybind11) || return
    command -v ninja >/dev/null && export CMAKE_GENERATOR=Ninja
    rm -rf "$site" && mkdir -p "$site" && cp -r "$root/python/tim" "$site/tim" || return
    rm -f "$site"/tim/_C*.so "$site/tim/_build_info.json"
    cmake -S "$root" -B "$tree" -DCMAKE_BUILD_TYPE=Release -DTIM_CUDA=$cuda \
        -DTIM_CUDA_ARCHITECTURES="$(architecture)" -Dpybind11_DIR="$pybind11" \
        -DPython_EXECUTABLE="$("$python" -c 'import sys; print(sys.executable)')" &&
        cmake --build "$tree" --parallel "$(nproc)" &&
        cmake --install "$tree" --prefix "$site"
}

# Says what was built; fails when it is not what the device needs.
check_build() {
    "$python" - <<'PYTHON'
import os
import sys

from tim import _extension, ops

if _extension.C is None:
    sys.exit(_extension.REASON)
print(_extension.C.__file__)
available = ops.available()
for name, backends in available.items():
    print(f"{name}: {', '.join(backends) or 'PyTorch'}")
if not any(os.environ["device"] in backends for backends in available.values()):
    sys.exit(f"the extension holds no kernels for {os.environ['device']}")
PYTHON
}

has() {
    "$python" -c "import importlib.util as u, sys; sys.exit(u.find_spec('$1') is None)"
}

# On a GPU every test that is marked for it: all operations against float64, CUDA graphs, streams.
run_tests() {
    local tests=(-m gpu "$root/tests") workers=()
    [ "$device" = cpu ] && tests=(-m "not gpu" -k cpu "$root/tests/ops")
    if ! has pytest; then
        echo "pytest is not installed: the tests did NOT run; the benchmarks still compare with float64"
        return 1
    fi
    has xdist && [ "$device" = cuda ] && workers=(-n 4)
    "$python" -m pytest -q -rs --bare -p no:cacheprovider "${workers[@]}" "${tests[@]}"
}

# bench SCRIPT RESULT OPTION...
bench() {
    "$python" "$root/benchmarks/bench_$1.py" --device "$device" --json "$parts/$2.json" "${@:3}"
}

# All operations through torch.compile too, at the size and dtype of the paper's training.
bench_compiled() {
    "$python" -c 'import sys; from tim.bench import main; sys.exit(main(sys.argv[1:]))' \
        --device "$device" --json "$parts/compiled.json" --compile "$@"
}

summarise() {
    local name
    name=$("$python" -c '
import re, sys, torch
from tim.bench.machine import describe
name = describe(torch.device(sys.argv[1]))["name"]
print(re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"))' "$device") || return
    # Counts of launches are no rows of times: they stay a file of their own.
    mv "$parts/launches.json" "$results/$name-$(date -u +%Y-%m-%d)-launches.json" 2>/dev/null
    "$python" -m tim.bench.summary "$results/$name-$(date -u +%Y-%m-%d).json" "$parts"/*.json
}
export results
export -f find_pybind11 architecture build check_build has run_tests bench bench_compiled
export -f summarise

[ -n "$dry" ] || { rm -rf "$parts" && mkdir -p "$parts" "$results"; }
if [ "$device" = cuda ]; then
    [ -n "$dry" ] || nvidia-smi --format=csv \
        --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.max.sm
    every=(--seconds 0.1 --dtypes float32,bfloat16)
    step=(--seconds 2)
    derivative=(--seconds 1)
    sampling=(--seconds 0.5 --steps 1)
    latency=(--seconds 0.5 --sizes "xl2-256 x 1" --steps 1,4,16 --compile)
    launches=()
    training=(--seconds 0.3 --ranks 1)
    compiled=(--seconds 0.1 --sizes xl2-256 --dtypes bfloat16)
else
    every=(--seconds 0.01 --dtypes float32 --sizes small)
    step=(--seconds 0.1 --sizes digits)
    derivative=(--seconds 0.02 --sizes digits)
    sampling=(--seconds 0.02 --sizes "digits x 1" --steps 1)
    latency=(--seconds 0.02 --sizes "digits x 1" --steps 4)
    launches=(--size digits)
    training=(--seconds 0.02 --ranks 1)
    compiled=(interpolate swiglu --seconds 0.01 --sizes small --dtypes float32)
fi

part 180 build build
part 30 "check of the build" check_build
part 200 tests run_tests
for operation in interpolate transition_loss qk_norm_rope adaln swiglu attention; do
    limit=60
    [ "$operation" = attention ] && limit=120 # many sizes and peers
    part "$limit" "bench_$operation" bench "$operation" "$operation" "${every[@]}"
done
part 120 bench_step bench step step "${step[@]}"
part 90 bench_derivative bench derivative derivative "${derivative[@]}"
part 60 bench_sampling bench sampling sampling "${sampling[@]}"
part 120 "bench_sampling by steps" bench sampling latency "${latency[@]}"
part 60 bench_launches bench launches launches "${launches[@]}"
part 60 bench_training bench training training "${training[@]}"
part 150 "torch.compile" bench_compiled "${compiled[@]}"
deadline=$((SECONDS + 20))
part 20 summary summarise

[ -z "$dry" ] || exit 0
printf '\n'
if [ "${#failed[@]}" -eq 0 ]; then
    echo "all parts passed in $SECONDS s"
else
    echo "FAILED ($SECONDS s):"
    printf '  %s\n' "${failed[@]}"
    exit 1
fi
