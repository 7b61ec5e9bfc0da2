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

// 1 + exp(x) within 2 ulp, infinite where it overflows, in plain arithmetic that a compiler can
// vectorise: x = n ln 2 + r with |r| <= ln(2)/2, the polynomial of degree 6 with the smallest
// relative error for exp(r), and 2^n put together from its bits.
TIM_HD float one_plus_exp(float x) {
#ifdef __CUDA_ARCH__
    return 1.0f + ::expf(x);
#else
    constexpr float kLog2E = 1.44269504088896341f;
    constexpr float kLn2High = 0.693359375f;
    constexpr float kLn2Low = -2.12194440e-4f;
    // Adding 1.5 * 2^23 leaves the nearest integer in the low bits of the sum; the 126 is the bias
    // of the exponent of 2^(n-1), whose n, unlike that of 2^n, stays in range up to the overflow.
    constexpr float kRound = 12582912.0f + 126.0f;
    constexpr int32_t kOverflow = 0x4b4000ff;
    // Below -87 the result is 1. From n = 129 on 2^(n-1) has the bits of infinity; that end is cut
    // off as an integer because compilers turn two float comparisons into slow branches. A NaN
    // fails the comparison and stays one.
    x = x < -87.0f ? -87.0f : x;
    int32_t bits = int32_t(to_bits(x * kLog2E + kRound));
    bits = bits < kOverflow ? bits : kOverflow;
    const float n = from_bits(uint32_t(bits)) - kRound;
    const float r = (x - n * kLn2High) - n * kLn2Low;
    float p = 1.384360716e-3f * r + 8.374195546e-3f;
    p = p * r + 4.166800529e-2f;
    p = p * r + 1.666643023e-1f;
    p = p * r + 4.999999404e-1f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return 2.0f * (p * from_bits(uint32_t(bits) << 23)) + 1.0f;
#endif
}

// a / b. On a GPU within 2 ulp, and zero from |b| = 2^126 on: the exact division is a slow branch.
TIM_HD float divide(float a, float b) {
#ifdef __CUDA_ARCH__
    return __fdividef(a, b);
#else
    return a / b;
#endif
}

TIM_HD float sigmoid(float x) { return divide(1.0f, one_plus_exp(-x)); }

}  // namespace tim::math
