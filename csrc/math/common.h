// Storage types and the elementary functions the formulas in this folder are made of.
//
// Everything here is `static` and free of the standard library: the CPU kernels compile these files
// several times for different instruction sets, and a shared inline function would be merged by the
// linker into one copy that some machines cannot execute.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#define TIM_HD static __host__ __device__ __forceinline__
#else
#define TIM_HD static inline __attribute__((always_inline))
#endif

namespace tim::math {

struct BFloat16 {
    uint16_t bits;
};

TIM_HD float from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof(value));
    return value;
}

TIM_HD uint32_t to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof(bits));
    return bits;
}

TIM_HD float load(const float* p) { return *p; }
TIM_HD float load(const BFloat16* p) { return from_bits(uint32_t(p->bits) << 16); }

TIM_HD void store(float* p, float value) { *p = value; }

// Round to nearest, ties to even. A NaN is replaced by the quiet one, as rounding its mantissa up
// could carry into infinity or zero.
TIM_HD void store(BFloat16* p, float value) {
    const uint32_t bits = to_bits(value);
    const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
    p->bits = uint16_t((value == value ? rounded : 0x7fc00000u) >> 16);
}

// The formulas of this folder are templates: the CPU kernels instantiate them with vectors of
// floats too, which bring their own overloads of the functions below.

// low where x is less, x elsewhere: a NaN stays one.
TIM_HD float not_below(float x, float low) { return x < low ? low : x; }
TIM_HD float not_above(float x, float high) { return x > high ? high : x; }

// Puts the low bits of x in the place of its exponent.
TIM_HD float to_exponent(float x) { return from_bits(to_bits(x) << 23); }

TIM_HD float square_root(float x) { return sqrtf(x); }

// a b + c, rounded once.
TIM_HD float fused_multiply_add(float a, float b, float c) { return fmaf(a, b, c); }

// 1 + exp(x) within 2 ulp, infinite from x = 88.38 on, in plain arithmetic for vectors: x = n ln 2
// + r with |r| <= ln(2)/2, the polynomial of degree 6 with the smallest relative error for exp(r),
// and 2^n put together from its bits.
template <class V>
TIM_HD V one_plus_exp(V x) {
#ifdef __CUDA_ARCH__
    return 1.0f + ::expf(x);
#else
    constexpr float kLog2E = 1.44269504088896341f;
    constexpr float kLn2High = 0.693359375f;
    constexpr float kLn2Low = -2.12194440e-4f;
    // Adding 1.5 * 2^23 leaves the nearest integer in the low bits of the sum; 127 is the bias of
    // an exponent. Within the bounds n goes from -126 to 128, where 2^n has the bits of infinity.
    constexpr float kRound = 12582912.0f + 127.0f;
    x = not_above(not_below(x, -87.0f), 89.0f);
    const V shifted = x * kLog2E + kRound;
    const V n = shifted - kRound;
    const V r = (x - n * kLn2High) - n * kLn2Low;
    V p = 1.384360716e-3f * r + 8.374195546e-3f;
    p = p * r + 4.166800529e-2f;
    p = p * r + 1.666643023e-1f;
    p = p * r + 4.999999404e-1f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return p * to_exponent(shifted) + 1.0f;
#endif
}

// a / b. On a GPU within 2 ulp, and zero from |b| = 2^126 on: the exact division is a slow branch.
template <class V>
TIM_HD V divide(V a, V b) {
#ifdef __CUDA_ARCH__
    return __fdividef(a, b);
#else
    return a / b;
#endif
}

template <class V>
TIM_HD V sigmoid(V x) {
    return divide(V(1.0f), one_plus_exp(-x));
}

}  // namespace tim::math
