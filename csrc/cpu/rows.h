// Rows of numbers, and sums of rows in scratch memory.
#pragma once

#include "kernel.h"

namespace tim::cpu::TIM_ISA {
namespace {

// Equally spaced rows; stride 0 repeats the same row.
template <class T>
struct Rows {
    const T* data;
    int64_t stride;
};

template <class T>
const T* row_of(Rows<T> rows, int64_t index) {
    return rows.data + index * rows.stride;
}

template <class T>
Rows<T> rows_from(Rows<T> rows, int64_t index) {
    return {row_of(rows, index), rows.stride};
}

template <class T>
Rows<T> make_rows(const void* data, int64_t stride) {
    return {static_cast<const T*>(data), stride};
}

// y += x
inline void add_row(float* y, const float* x, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) y[i] += x[i];
}

inline void fill_zero(float* y, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) y[i] = 0.0f;
}

// Adds `count` rows of n values into the first one, and uses up the others.
//
// Sums over tokens end here: each chunk of a fixed number of tokens has a row, so the result does
// not depend on the number of threads, and in pairs the error grows with the logarithm of the
// count.
inline void sum_rows(float* rows, int64_t count, int64_t n) {
    for (int64_t step = 1; step < count; step *= 2)
        for (int64_t i = 0; i + step < count; i += 2 * step)
            add_row(rows + i * n, rows + (i + step) * n, n);
}

}  // namespace
}  // namespace tim::cpu::TIM_ISA
