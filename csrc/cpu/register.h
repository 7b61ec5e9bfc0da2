// One register of floats of the instruction set, in the compiler's own vector types, and the few
// operations for which intrinsic functions beat what compilers make of these types.
#pragma once

#include <math.h>
#include <string.h>

#include <utility>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "../math/common.h"

namespace tim::cpu::TIM_ISA {
namespace {

using math::BFloat16;

#if defined(__AVX512F__)
constexpr int kRegister = 16;
#elif defined(__AVX2__)
constexpr int kRegister = 8;
#else
constexpr int kRegister = 4;
#endif

template <class Number>
using Lanes __attribute__((vector_size(kRegister * sizeof(Number)))) = Number;
using Register = Lanes<float>;
using Bits = Lanes<uint32_t>;

inline Register broadcast(float x) { return x - Register{}; }  // x - 0 is x, -0 included

inline Register load_register(const float* p) {
    Register x;
    memcpy(&x, p, sizeof(x));
    return x;
}
inline void store_register(float* p, Register x) { memcpy(p, &x, sizeof(x)); }

// As math::to_exponent.
inline Register to_exponent(Register x) { return Register(Bits(x) << 23); }

// Bits hold two bfloat16 each, the one with the even index in the lower half.
inline Register even_halves(Register words) { return Register(Bits(words) << 16); }
inline Register odd_halves(Register words) { return Register(Bits(words) & 0xffff0000u); }

// The lanes `Order::at(0), Order::at(1), ...` of two registers in a row.
template <class Order, int... lane>
Register pick(Register a, Register b, std::integer_sequence<int, lane...>) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, Order::at(lane)...);
#else
    return __builtin_shuffle(a, b, Lanes<int32_t>{Order::at(lane)...});
#endif
}

template <class Order>
Register pick(Register a, Register b) {
    return pick<Order>(a, b, std::make_integer_sequence<int, kRegister>{});
}

struct Even {
    static constexpr int at(int lane) { return 2 * lane; }
};
struct Odd {
    static constexpr int at(int lane) { return 2 * lane + 1; }
};
// The first and the second half of the lanes of a and b in turns.
struct LowTurns {
    static constexpr int at(int lane) { return lane / 2 + lane % 2 * kRegister; }
};
struct HighTurns {
    static constexpr int at(int lane) { return LowTurns::at(lane) + kRegister / 2; }
};

#if defined(__AVX512F__)

inline __mmask16 first(int count) { return __mmask16((1u << count) - 1); }
inline __mmask32 first_halves(int count) { return __mmask32((uint64_t(1) << count) - 1); }

inline Register load_first(const float* p, int count) {
    return Register(_mm512_maskz_loadu_ps(first(count), p));
}
inline void store_first(float* p, Register x, int count) {
    _mm512_mask_storeu_ps(p, first(count), __m512(x));
}
inline Register keep_first(Register x, int count) {
    return Register(_mm512_maskz_mov_ps(first(count), __m512(x)));
}
inline Register load_halves(const BFloat16* p, int count) {
    return Register(_mm512_maskz_loadu_epi16(first_halves(count), p));
}
inline void store_halves(BFloat16* p, Register x, int count) {
    _mm512_mask_storeu_epi16(p, first_halves(count), __m512i(x));
}

// Rounds to nearest, ties to even: one is carried from the lower half of a float into the upper one
// where it is beyond the middle. This must not make a NaN infinite or zero. The NaN of arithmetic
// are quiet, which is a bit of the upper half, and upper halves with all ones are left alone.
inline Register rounded_by_integers(Register even, Register odd) {
    const __m512i e = __m512i(even), o = __m512i(odd);
    const __m512i odd_words = _mm512_set1_epi32(int(0xffff0000u));
    // a ? b : c in every bit.
    constexpr int kSelect = 0xca;
    const __m512i upper =
        _mm512_ternarylogic_epi32(odd_words, o, _mm512_srli_epi32(e, 16), kSelect);
    const __m512i lower =
        _mm512_ternarylogic_epi32(odd_words, _mm512_slli_epi32(o, 16), e, kSelect);
    const __m512i middle =
        _mm512_sub_epi16(_mm512_set1_epi16(-0x8000), _mm512_and_si512(upper, _mm512_set1_epi16(1)));
    const __m512i magnitude = _mm512_or_si512(upper, _mm512_set1_epi16(-0x8000));
    const __mmask32 carry = _mm512_mask_cmpneq_epu16_mask(_mm512_cmpgt_epu16_mask(lower, middle),
                                                          magnitude, _mm512_set1_epi16(-1));
    return Register(_mm512_mask_add_epi16(upper, carry, upper, _mm512_set1_epi16(1)));
}

#if defined(__AVX512BF16__)
// The same but for subnormal numbers, which become zero.
inline Register rounded_normal_halves(Register even, Register odd) {
    // Lane i of `even` and lane i of `odd`, which the conversion leaves 16 numbers apart.
    const __m512i turns =
        _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                         21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512bh both = _mm512_cvtne2ps_pbh(__m512(odd), __m512(even));
    return Register(_mm512_permutexvar_epi16(turns, __m512i(both)));
}
inline Register rounded_halves(Register even, Register odd) {
    constexpr int kSubnormal = 0x20;
    const bool subnormal = _mm512_fpclass_ps_mask(__m512(even), kSubnormal) |
                           _mm512_fpclass_ps_mask(__m512(odd), kSubnormal);
    if (__builtin_expect(subnormal, 0)) return rounded_by_integers(even, odd);
    return rounded_normal_halves(even, odd);
}
#else
inline Register rounded_halves(Register even, Register odd) {
    return rounded_by_integers(even, odd);
}
#endif

// The second operand where one is NaN, as in math::not_below.
inline Register at_least(Register x, float low) {
    return Register(_mm512_max_ps(__m512(broadcast(low)), __m512(x)));
}
inline Register at_most(Register x, float high) {
    return Register(_mm512_min_ps(__m512(broadcast(high)), __m512(x)));
}
// a where it is larger, b elsewhere: also where a is NaN.
inline Register larger(Register a, Register b) {
    return Register(_mm512_max_ps(__m512(a), __m512(b)));
}
inline Register root(Register x) { return Register(_mm512_sqrt_ps(__m512(x))); }
inline float total(Register x) { return _mm512_reduce_add_ps(__m512(x)); }
inline Register fused(Register a, Register b, Register c) {
    return Register(_mm512_fmadd_ps(__m512(a), __m512(b), __m512(c)));
}

#else

inline Register load_first(const float* p, int count) {
    Register x{};
    memcpy(&x, p, size_t(count) * sizeof(float));
    return x;
}
inline void store_first(float* p, Register x, int count) {
    memcpy(p, &x, size_t(count) * sizeof(float));
}
inline Register keep_first(Register x, int count) {
    for (int i = count; i < kRegister; ++i) x[i] = 0.0f;
    return x;
}
inline Register load_halves(const BFloat16* p, int count) {
    Register x{};
    memcpy(&x, p, size_t(count) * sizeof(BFloat16));
    return x;
}
inline void store_halves(BFloat16* p, Register x, int count) {
    memcpy(p, &x, size_t(count) * sizeof(BFloat16));
}

// As math::store rounds; the result is in the upper halves.
inline Bits rounded(Register x) {
    const Bits bits = Bits(x), ordered = Bits(x == x);
    return ((bits + 0x7fffu + ((bits >> 16) & 1u)) & ordered) | (~ordered & 0x7fc00000u);
}
inline Register rounded_halves(Register even, Register odd) {
    return Register((rounded(even) >> 16) | (rounded(odd) & 0xffff0000u));
}

inline Register at_least(Register x, float low) { return x < low ? broadcast(low) : x; }
inline Register at_most(Register x, float high) { return x > high ? broadcast(high) : x; }
inline Register larger(Register a, Register b) { return a > b ? a : b; }
inline Register root(Register x) {
#pragma omp simd
    for (int i = 0; i < kRegister; ++i) x[i] = sqrtf(x[i]);
    return x;
}
inline float total(Register x) {
    for (int width = kRegister / 2; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) x[i] += x[i + width];
    return x[0];
}
inline Register fused(Register a, Register b, Register c) {
#if defined(__FMA__)
    return a * b + c;
#else
    for (int i = 0; i < kRegister; ++i) a[i] = fmaf(a[i], b[i], c[i]);
    return a;
#endif
}

#endif

}  // namespace
}  // namespace tim::cpu::TIM_ISA
