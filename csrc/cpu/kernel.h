// Included by every kernel file. Each is compiled once per instruction set, named by the macro
// TIM_ISA; the anonymous namespaces keep the copies apart (see math/common.h for why that matters).
#pragma once

#include <stdint.h>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "../kernels.h"
#include "../math/common.h"
#include "runtime.h"

namespace tim::cpu::TIM_ISA {
namespace {

using math::BFloat16;
using math::load;
using math::store;

// Starting the threads costs some microseconds; below this many elements one thread is faster.
constexpr int64_t kSerialElements = 16384;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int64_t round_up(int64_t n, int64_t unit) { return ceil_div(n, unit) * unit; }

// Calls body with a value of the storage type that `dtype` names. Every kernel passes through here.
template <class Body>
void with_dtype(int dtype, int64_t threads, const Body& body) {
    if (threads < 1) refuse("where must be a number of threads, at least 1");
    if (dtype == kFloat32) {
        body(float{});
    } else if (dtype == kBFloat16) {
        body(BFloat16{});
    } else {
        refuse_dtype(dtype);
    }
}

// Calls body(begin, end, thread) on contiguous parts of [0, count), one per thread; thread <
// threads. `elements` is the size of one item and decides whether threads are worth their start.
//
// A team is either one thread or all of them: OpenMP runtimes destroy surplus threads when the size
// of the team changes between calls.
template <class Body>
void parallel_for(int64_t count, int64_t elements, int64_t threads, const Body& body) {
    if (count <= 0) return;
#ifdef _OPENMP
    if (threads > 1 && count > 1 && count * elements > kSerialElements && !omp_in_parallel()) {
#pragma omp parallel num_threads(int(threads))
        {
            const int64_t thread = omp_get_thread_num();
            const int64_t team = omp_get_num_threads();
            const int64_t begin = count * thread / team;
            const int64_t end = count * (thread + 1) / team;
            if (begin < end) body(begin, end, thread);
        }
        return;
    }
#endif
    body(int64_t(0), count, int64_t(0));
}

// Splits rows x cols elements evenly over the threads and calls body(row, begin, end) for every
// row, or piece of a row, of a part.
template <class Body>
void parallel_pieces(int64_t rows, int64_t cols, int64_t threads, const Body& body) {
    // Parts start at multiples of a cache line, so that no two threads write to the same one.
    constexpr int64_t kUnit = 64;
    const int64_t size = rows * cols;
    parallel_for(ceil_div(size, kUnit), kUnit, threads, [&](int64_t first, int64_t last, int64_t) {
        const int64_t end = last * kUnit < size ? last * kUnit : size;
        for (int64_t i = first * kUnit; i < end;) {
            const int64_t row = i / cols;
            const int64_t start = i - row * cols;
            const int64_t stop = end - row * cols < cols ? end - row * cols : cols;
            body(row, start, stop);
            i = row * cols + stop;
        }
    });
}

}  // namespace
}  // namespace tim::cpu::TIM_ISA
