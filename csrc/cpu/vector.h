// Vectors of 32-bit words, and the one matrix product that the attention kernels are made of.
#pragma once

#include <type_traits>

#include "kernel.h"

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace tim::cpu::TIM_ISA {
namespace {

// kRegisterRows x kRegisterVectors accumulators, as many vectors of the other operand and one
// broadcast number fill the registers.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kRegisterRows = 8, kRegisterVectors = 3;
#elif defined(__AVX2__)
constexpr int kLanes = 8, kRegisterRows = 4, kRegisterVectors = 3;
#else
constexpr int kLanes = 4, kRegisterRows = 4, kRegisterVectors = 2;
#endif

typedef float Vector __attribute__((vector_size(kLanes * sizeof(float)), may_alias));
typedef int32_t Integers __attribute__((vector_size(kLanes * sizeof(float)), may_alias));

inline Vector load_vector(const float* p) {
    Vector v;
    __builtin_memcpy(&v, p, sizeof(v));
    return v;
}

inline void store_vector(float* p, Vector v) { __builtin_memcpy(p, &v, sizeof(v)); }

inline int64_t round_up(int64_t n, int64_t unit) { return ceil_div(n, unit) * unit; }

// How numbers become 32-bit words. A word is a float, or, where the processor multiplies and adds
// pairs of bfloat16, two numbers that are neighbours along the dimension that a product sums over:
// the first in the low half.
template <class T>
struct Words {
    static constexpr bool kPairs = false;
};

#ifdef __AVX512BF16__
template <>
struct Words<BFloat16> {
    static constexpr bool kPairs = true;
};
#endif

template <bool pairs>
Vector multiply_add(Vector sum, Vector broadcast, Vector row) {
#ifdef __AVX512BF16__
    if constexpr (pairs) {
        return Vector(_mm512_dpbf16_ps(__m512(sum), __m512bh(broadcast), __m512bh(row)));
    }
#endif
    static_assert(!pairs || kLanes == 16, "pairs need AVX512-BF16");
    return sum + broadcast * row;
}

enum class Into { kSet, kAdd };

// An operand whose element (row, k) is at row * row_stride + k * k_stride.
struct Left {
    const float* data;
    int64_t row_stride, k_stride;
};

// Rows of vectors.
struct Right {
    const float* data;
    int64_t stride;
};

// out[row][:] = or += alpha sum_k left(row, k) right[k][:] for kRegisterRows rows and `vectors`
// vectors of each; the sums over `count` numbers stay in registers.
template <bool pairs, int vectors, Into into>
void multiply_rows(Left left, Right right, int64_t count, float alpha, float* out,
                   int64_t out_stride) {
    Vector sums[kRegisterRows][vectors];
#pragma GCC unroll 8
    for (int row = 0; row < kRegisterRows; ++row)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) sums[row][v] = Vector{};
    for (int64_t k = 0; k < count; ++k) {
        Vector rights[vectors];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v)
            rights[v] = load_vector(right.data + k * right.stride + v * kLanes);
#pragma GCC unroll 8
        for (int row = 0; row < kRegisterRows; ++row) {
            // As an integer: a pair of bfloat16 must not be touched by float arithmetic.
            int32_t word;
            __builtin_memcpy(&word, left.data + row * left.row_stride + k * left.k_stride, 4);
            const Vector broadcast = Vector(Integers{} + word);
#pragma GCC unroll 4
            for (int v = 0; v < vectors; ++v)
                sums[row][v] = multiply_add<pairs>(sums[row][v], broadcast, rights[v]);
        }
    }
#pragma GCC unroll 8
    for (int row = 0; row < kRegisterRows; ++row)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) {
            float* p = out + row * out_stride + v * kLanes;
            const Vector product = alpha * sums[row][v];
            store_vector(p, into == Into::kAdd ? load_vector(p) + product : product);
        }
}

// The same for `rows` rows, a multiple of kRegisterRows.
template <bool pairs, int vectors, Into into>
void multiply(Left left, int64_t rows, Right right, int64_t count, float alpha, float* out,
              int64_t out_stride) {
    for (int64_t row = 0; row < rows; row += kRegisterRows) {
        const Left some = {left.data + row * left.row_stride, left.row_stride, left.k_stride};
        multiply_rows<pairs, vectors, into>(some, right, count, alpha, out + row * out_stride,
                                            out_stride);
    }
}

// Calls body with the number of vectors as a constant.
template <class Body>
void with_vectors(int64_t vectors, const Body& body) {
    static_assert(kRegisterVectors <= 3, "one case for each number of vectors");
    if (vectors == 1) {
        body(std::integral_constant<int, 1>{});
    } else if (vectors == 2) {
        body(std::integral_constant<int, 2>{});
    } else if constexpr (kRegisterVectors == 3) {
        body(std::integral_constant<int, 3>{});
    }
}

// Lane i of the result is lane `low` or, where (i & step) is set, `high`... of the two vectors.
template <int step, bool second>
Vector interleave(Vector a, Vector b) {
    Integers lanes;
    for (int i = 0; i < kLanes; ++i) {
        const int own = second ? i | step : i & ~step;
        lanes[i] = (i & step) ? kLanes + own : own;
    }
#ifdef __clang__
    Vector out;
    for (int i = 0; i < kLanes; ++i)
        out[i] = lanes[i] < kLanes ? a[lanes[i]] : b[lanes[i] - kLanes];
    return out;
#else
    return __builtin_shuffle(a, b, lanes);
#endif
}

// One of the log2(kLanes) exchanges of a transposition: rows i and i + step swap their off-diagonal
// pieces of `step` lanes.
template <int step>
void exchange(Vector* rows) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
        if (i & step) continue;
        const Vector a = rows[i], b = rows[i + step];
        rows[i] = interleave<step, false>(a, b);
        rows[i + step] = interleave<step, true>(a, b);
    }
    if constexpr (step > 1) exchange<step / 2>(rows);
}

// out [columns][rows] = in [rows][columns]; both sizes multiples of kLanes.
inline void transpose(const float* in, int64_t in_stride, int64_t rows, int64_t columns, float* out,
                      int64_t out_stride) {
    for (int64_t row = 0; row < rows; row += kLanes) {
        for (int64_t column = 0; column < columns; column += kLanes) {
            Vector block[kLanes];
#pragma GCC unroll 16
            for (int i = 0; i < kLanes; ++i)
                block[i] = load_vector(in + (row + i) * in_stride + column);
            exchange<kLanes / 2>(block);
#pragma GCC unroll 16
            for (int i = 0; i < kLanes; ++i)
                store_vector(out + (column + i) * out_stride + row, block[i]);
        }
    }
}

}  // namespace
}  // namespace tim::cpu::TIM_ISA
