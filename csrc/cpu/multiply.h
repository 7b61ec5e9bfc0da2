// The one matrix product that the attention kernels are made of: registers of 32-bit words.
#pragma once

#include <type_traits>

#include "kernel.h"
#include "register.h"

namespace tim::cpu::TIM_ISA {
namespace {

// kRegisterRows x kRegisterVectors accumulators, as many registers of the other operand and one
// broadcast number fill the register file.
#if defined(__AVX512F__)
constexpr int kRegisterRows = 8, kRegisterVectors = 3;
#elif defined(__AVX2__)
constexpr int kRegisterRows = 4, kRegisterVectors = 3;
#else
constexpr int kRegisterRows = 4, kRegisterVectors = 2;
#endif

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
Register multiply_add(Register sum, Register broadcast, Register row) {
#ifdef __AVX512BF16__
    if constexpr (pairs) {
        return Register(_mm512_dpbf16_ps(__m512(sum), __m512bh(broadcast), __m512bh(row)));
    }
#endif
    static_assert(!pairs || kRegister == 16, "pairs need AVX512-BF16");
    return sum + broadcast * row;
}

// out = alpha * sum, out += alpha * sum, out = keep * out + sum.
enum class Into { kSet, kAdd, kKeep };

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

// sum_k left(row, k) right[k][:] over `count` numbers k.
struct Product {
    Left left;
    Right right;
    int64_t count;
};

// Puts or adds the sum of the products into kRegisterRows rows of `out` and `vectors` vectors of
// each; `keep` are as many vectors. The sums stay in registers, so that two products cost one pass
// through `out`.
template <bool pairs, int vectors, Into into, int terms>
void multiply_rows(const Product (&products)[terms], int64_t first, float alpha, float* out,
                   int64_t out_stride, const float* keep) {
    Register sums[kRegisterRows][vectors];
#pragma GCC unroll 8
    for (int row = 0; row < kRegisterRows; ++row)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) sums[row][v] = Register{};
    for (const Product& product : products) {
        const Left left = product.left;
        const Right right = product.right;
        const float* lefts = left.data + first * left.row_stride;
        for (int64_t k = 0; k < product.count; ++k) {
            Register rights[vectors];
#pragma GCC unroll 4
            for (int v = 0; v < vectors; ++v)
                rights[v] = load_register(right.data + k * right.stride + v * kRegister);
#pragma GCC unroll 8
            for (int row = 0; row < kRegisterRows; ++row) {
                // As an integer: a pair of bfloat16 must not be touched by float arithmetic.
                int32_t word;
                __builtin_memcpy(&word, lefts + row * left.row_stride + k * left.k_stride, 4);
                const Register broadcast = Register(Lanes<int32_t>{} + word);
#pragma GCC unroll 4
                for (int v = 0; v < vectors; ++v)
                    sums[row][v] = multiply_add<pairs>(sums[row][v], broadcast, rights[v]);
            }
        }
    }
#pragma GCC unroll 8
    for (int row = 0; row < kRegisterRows; ++row)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) {
            float* p = out + (first + row) * out_stride + v * kRegister;
            const Register sum = sums[row][v];
            if constexpr (into == Into::kKeep) {
                store_register(p, load_register(keep + v * kRegister) * load_register(p) + sum);
            } else if constexpr (into == Into::kAdd) {
                store_register(p, alpha * sum + load_register(p));
            } else {
                store_register(p, alpha * sum);
            }
        }
}

// The same for `rows` rows, a multiple of kRegisterRows.
template <bool pairs, int vectors, Into into, int terms>
void multiply(const Product (&products)[terms], int64_t rows, float alpha, float* out,
              int64_t out_stride, const float* keep = nullptr) {
    for (int64_t row = 0; row < rows; row += kRegisterRows)
        multiply_rows<pairs, vectors, into>(products, row, alpha, out, out_stride, keep);
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
Register interleave(Register a, Register b) {
    Lanes<int32_t> lanes;
    for (int i = 0; i < kRegister; ++i) {
        const int own = second ? i | step : i & ~step;
        lanes[i] = (i & step) ? kRegister + own : own;
    }
#ifdef __clang__
    Register out;
    for (int i = 0; i < kRegister; ++i)
        out[i] = lanes[i] < kRegister ? a[lanes[i]] : b[lanes[i] - kRegister];
    return out;
#else
    return __builtin_shuffle(a, b, lanes);
#endif
}

// One of the log2(kRegister) exchanges of a transposition: rows i and i + step swap their
// off-diagonal pieces of `step` lanes.
template <int step>
void exchange(Register* rows) {
#pragma GCC unroll 16
    for (int i = 0; i < kRegister; ++i) {
        if (i & step) continue;
        const Register a = rows[i], b = rows[i + step];
        rows[i] = interleave<step, false>(a, b);
        rows[i + step] = interleave<step, true>(a, b);
    }
    if constexpr (step > 1) exchange<step / 2>(rows);
}

// out [columns][rows] = in [rows][columns]; both sizes multiples of kRegister.
inline void transpose(const float* in, int64_t in_stride, int64_t rows, int64_t columns, float* out,
                      int64_t out_stride) {
    for (int64_t row = 0; row < rows; row += kRegister) {
        for (int64_t column = 0; column < columns; column += kRegister) {
            Register block[kRegister];
#pragma GCC unroll 16
            for (int i = 0; i < kRegister; ++i)
                block[i] = load_register(in + (row + i) * in_stride + column);
            exchange<kRegister / 2>(block);
#pragma GCC unroll 16
            for (int i = 0; i < kRegister; ++i)
                store_register(out + (column + i) * out_stride + row, block[i]);
        }
    }
}

}  // namespace
}  // namespace tim::cpu::TIM_ISA
