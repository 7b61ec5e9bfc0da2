#!/usr/bin/env bash
# Builds the extension, runs the GPU tests and all benchmarks in under ten minutes, without network.
#
#   benchmarks/gpu_check.sh [--dry-run] [--device cpu] [--only PART,...] [--seconds N] [RESULTS]
#
# Needs Python with torch, numpy and pytest, CMake, and nvcc; takes ninja and pytest-xdist where they
# are. Test files that need more packages are skipped by name. pybind11 is the folder named by
# PYBIND11_DIR or pybind11_DIR, else what `python -m pybind11` says, else pip fetches it. PYTHON names
# the interpreter. Nothing is installed: the package is put together in build/gpu_check and found
# through PYTHONPATH. `--device cpu` rehearses all of it, with short measurements, without a GPU;
# `--dry-run` prints what would run.
#
# What decides the goals runs first, and gets its share of the time (590 s, or --seconds) whatever
# happens before; the rest has what is left. The script ends with the parts that were lost and the
# command that runs them: `--only PART,...` takes the build and the results that are there already.
#
# Writes RESULTS/<gpu>-<date>.json (default benchmarks/results) and prints a short table last. A part
# that fails does not stop the others, apart from the build, but the exit code is then 1.

set -uo pipefail

device=cuda
dry=
only=
total=590
while [[ "${1:-}" == --* ]]; do
    case $1 in
    --dry-run) dry=1 ;;
    --device | --only | --seconds)
        value=${2:?$1 needs a value}
        case $1 in
        --device) device=$value ;;
        --only) only=$value ;;
        --seconds) total=$value ;;
        esac
        shift
        ;;
    *)
        echo "unknown option $1" >&2
        exit 2
        ;;
    esac
    shift
done
if [[ $device != cuda && $device != cpu ]]; then
    echo "--device must be cuda or cpu, got '$device'" >&2
    exit 2
fi
if ! [[ $total =~ ^[1-9][0-9]*$ ]]; then
    echo "--seconds must be a positive whole number, got '$total'" >&2
    exit 2
fi
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
results=${1:-$root/benchmarks/results}
python=${PYTHON:-python3}
work=$root/build/gpu_check
site=$work/site
parts=$work/parts
summary=25 # seconds of the total for the last table
deadline=$((total - summary - 10)) # and those in which a part that was told to stop is killed
failed=()
lost=()
export device root python work site parts results
export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1

# goal NAME SECONDS COMMAND... and part NAME SECONDS COMMAND...: what there is to run, in order.
# SECONDS are kept free for a goal; any part may take twice as many where nobody else needs them.
names=() shares=() kinds=() commands=()
goal() { declare_part goal "$@"; }
part() { declare_part part "$@"; }
declare_part() {
    kinds+=("$1") names+=("$2") shares+=("$3")
    shift 3
    commands+=("$(printf '%q ' "$@")")
}

chosen() { [[ -z $only || ,$only, == *,$1,* ]]; }

# Sets `limit`: seconds for part number $1, `left` seconds before the deadline.
limit_of() {
    local i reserved=0
    for ((i = $1 + 1; i < ${#names[@]}; i++)); do
        if [[ ${kinds[i]} == goal ]] && chosen "${names[i]}"; then
            reserved=$((reserved + shares[i]))
        fi
    done
    limit=$((left - reserved))
    # Without a build there is nothing to keep time for.
    ((limit <= 2 * shares[$1])) && [ "${names[$1]}" != build ] || limit=$((2 * shares[$1]))
    ((limit >= shares[$1])) || limit=${shares[$1]}
    ((limit <= left)) || limit=$left
}

run_part() {
    local name=${names[$1]} left=$((deadline - SECONDS)) limit status
    limit_of "$1"
    if [ -n "$dry" ]; then
        printf '%s %s: %s s, at most %s: %s\n' \
            "${kinds[$1]}" "$name" "${shares[$1]}" "$limit" "${commands[$1]}"
        return
    fi
    printf '\n== %s (after %d s, at most %d) ==\n' "$name" "$SECONDS" "$limit"
    if ((limit < 15)); then # no Python program of these gets anywhere
        failed+=("$name: no time left")
        lost+=("$name")
        return
    fi
    # timeout starts programs only, so a shell has to call our functions.
    timeout --kill-after=10 "$limit" bash -c "${commands[$1]}"
    status=$?
    case $status in
    0) ;;
    124 | 137)
        failed+=("$name: stopped at its time limit")
        lost+=("$name")
        ;;
    *) failed+=("$name: exit code $status") ;;
    esac
    return "$status"
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
        cmake --install "$tree" --prefix "$site" &&
        check_build
}

# Says what was built; fails when it is not what the device needs, or not what is measured: an
# installation for development comes before PYTHONPATH.
check_build() {
    "$python" - <<'PYTHON'
import os
import sys
from pathlib import Path

import tim
from tim import _extension, ops

if not Path(tim.__file__).is_relative_to(os.environ["site"]):
    sys.exit(f"Python takes tim from {tim.__file__}: uninstall that, or name another PYTHON")
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
    local tests=(-m gpu "$root/tests/ops" "$root/tests/emulator") workers=()
    # Not all of the tests: only to find those that are marked would take each worker 20 s.
    mapfile -t -O "${#tests[@]}" tests < <(grep -l 'mark\.gpu' "$root"/tests/test_*.py)
    [ "$device" = cpu ] && tests=(-m "not gpu" -k cpu "$root/tests/ops")
    if ! has pytest; then
        echo "pytest is not installed: the tests did NOT run; the benchmarks still compare with float64"
        return 1
    fi
    has xdist && [ "$device" = cuda ] && workers=(-n 6)
    "$python" -m pytest -q -rs --bare -p no:cacheprovider "${workers[@]}" "${tests[@]}"
}

# bench RESULT SCRIPT OPTION...: bench_SCRIPT.py, with the peers.
bench() {
    "$python" "$root/benchmarks/bench_$2.py" --device "$device" --json "$parts/$1.json" "${@:3}"
}

# bench_operations RESULT NAME... OPTION...: several operations in one process.
bench_operations() {
    "$python" -c 'import sys; from tim.bench import main; sys.exit(main(sys.argv[1:]))' \
        "${@:2}" --device "$device" --json "$parts/$1.json"
}

summarise() {
    local name file files=()
    name=$("$python" -c '
import re, sys, torch
from tim.bench.machine import describe
name = describe(torch.device(sys.argv[1]))["name"]
print(re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"))' "$device") || return
    name=$name-$(date -u +%Y-%m-%d)
    for file in "$parts"/*.json; do
        # Counts of launches are no rows of times: they stay a file of their own.
        if [ "$file" = "$parts/launches.json" ]; then
            cp "$file" "$results/$name-launches.json"
        elif [ -f "$file" ]; then
            files+=("$file")
        fi
    done
    [ "${#files[@]}" -eq 0 ] || "$python" -m tim.bench.summary "$results/$name.json" "${files[@]}"
}
export -f find_pybind11 architecture build check_build has run_tests bench bench_operations
export -f summarise

block=(qk_norm_rope adaln swiglu)
objective=(interpolate transition_loss)
if [ "$device" = cuda ]; then
    attention=
    for tokens in 16384 4096 1024 256 64; do
        for width in 128 72 64; do
            attention+=${attention:+,}n$tokens-d$width
        done
    done
    block+=(--sizes xl2-256,xl1-1024 --seconds 0.1)
    objective+=(--sizes "xl2-256,xl1-1024,xl2-256 x 16,xl1-1024 x 16" --seconds 0.1)
    first=(--compile --dtypes bfloat16)
    second=(--compile --dtypes float32)
    attention=(--sizes "$attention" --dtypes bfloat16 --seconds 0.1)
    derivative=(--seconds 0.5)
    step=(--seconds 1 --sizes xl2-256)
    small_step=(--seconds 1 --sizes b4-256)
    latency=(--seconds 0.5 --sizes "xl2-256 x 1")
    one=(--steps 1)
    many=(--steps 1,4,16 --compile)
    batches=(--seconds 0.5 --sizes "b4-256 x 256,xl2-256 x 32" --steps 1)
    launches=()
    training=(--seconds 0.3 --ranks 1)
    half=(--seconds 0.1 --sizes xl2-256 --dtypes float16)
    other=(--seconds 0.1 --sizes b4-256,xl1-512x1024,xl2-512 --dtypes bfloat16)
else
    quick=(--seconds 0.01 --sizes small)
    block+=("${quick[@]}")
    objective+=("${quick[@]}")
    first=(--dtypes float32)
    second=(--compile --directions forward --dtypes float32)
    attention=("${quick[@]}" --dtypes float32)
    derivative=(--seconds 0.02 --sizes digits)
    step=(--seconds 0.1 --sizes digits)
    small_step=("${step[@]}")
    latency=(--seconds 0.02 --sizes "digits x 1")
    one=(--steps 1)
    many=(--steps 4)
    batches=(--seconds 0.02 --sizes "digits x 128" --steps 1)
    launches=(--size digits)
    training=(--seconds 0.02 --ranks 1)
    half=(swiglu "${quick[@]}" --dtypes float16)
    other=(swiglu --seconds 0.01 --sizes b4-256 --dtypes float32)
fi

goal build 120 build
goal tests 100 run_tests
goal objective 40 bench_operations objective "${objective[@]}" "${first[@]}"
goal block 85 bench_operations block "${block[@]}" "${first[@]}"
goal attention-tangent 70 bench attention-tangent attention --directions tangent "${attention[@]}"
goal attention-forward 30 bench attention-forward attention --directions forward "${attention[@]}"
goal derivative 40 bench derivative derivative "${derivative[@]}"
goal step 45 bench step step "${step[@]}"
goal sampling 25 bench sampling sampling "${latency[@]}" "${one[@]}"
part objective-float32 45 bench_operations objective-float32 "${objective[@]}" "${second[@]}"
part block-float32 95 bench_operations block-float32 "${block[@]}" "${second[@]}"
part attention-backward 50 bench attention-backward attention --directions backward "${attention[@]}"
part launches 50 bench launches launches "${launches[@]}"
part training 50 bench training training "${training[@]}"
part float16 50 bench_operations float16 "${half[@]}"
part other-sizes 60 bench_operations other-sizes "${other[@]}"
part step-b4 40 bench step-b4 step "${small_step[@]}"
part sampling-batches 40 bench sampling-batches sampling "${batches[@]}"
part sampling-steps 100 bench sampling-steps sampling "${latency[@]}" "${many[@]}"
part step-compiled 150 bench step-compiled step "${step[@]}" --compile

for name in ${only//,/ }; do
    if [[ " ${names[*]} " != *" $name "* ]]; then
        echo "--only must be among ${names[*]}, got '$name'" >&2
        exit 2
    fi
done
if [ -n "$dry" ]; then
    echo "$deadline s for all parts, $summary s for the summary"
else
    if ! chosen build && [ ! -f "$site/tim/_build_info.json" ]; then
        echo "--only without build needs an earlier build in $site" >&2
        exit 2
    fi
    [ -n "$only" ] || rm -rf "$parts"
    mkdir -p "$parts" "$results" || exit
    [ "$device" = cpu ] || nvidia-smi --format=csv \
        --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.max.sm
fi

for ((number = 0; number < ${#names[@]}; number++)); do
    chosen "${names[number]}" || continue
    if ! run_part "$number" && [ "${names[number]}" = build ]; then
        echo "the build failed: nothing else has a meaning" >&2
        exit 1
    fi
done
[ -z "$dry" ] || exit 0

printf '\n== summary (after %d s) ==\n' "$SECONDS"
timeout --kill-after=5 "$summary" bash -c summarise || failed+=("summary: exit code $?")
printf '\n'
if [ "${#failed[@]}" -eq 0 ]; then
    echo "all parts passed in $SECONDS s"
    exit
fi
echo "FAILED ($SECONDS s):"
printf '  %s\n' "${failed[@]}"
if [ "${#lost[@]}" -gt 0 ]; then
    again=$(IFS=,; echo "${lost[*]}")
    echo "lost for time: ${lost[*]}"
    echo "    benchmarks/gpu_check.sh --only $again --device $device --seconds 590 $results"
fi
exit 1
