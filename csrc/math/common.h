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

// Round to nearest, ties to even. A NaN keeps its sign and becomes quiet: rounding its mantissa up
// could carry into infinity or zero.
TIM_HD void store(BFloat16* p, float value) {
    const uint32_t bits = to_bits(value);
    const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
    const uint32_t quiet = bits | 0x400000u;
    p->bits = uint16_t((value == value ? rounded : quiet) >> 16);
}

// exp(x) within 2 ulp of the exact value, in plain arithmetic that a compiler can vectorise:
// x = n ln 2 + r with |r| <= ln(2)/2, a polynomial for exp(r) (coefficients of the Cephes library),
// and 2^n in two factors so that results below the normal range round only once.
TIM_HD float exp(float x) {
#ifdef __CUDA_ARCH__
    return ::expf(x);
#else
    constexpr float kLog2E = 1.44269504088896341f;
    constexpr float kLn2High = 0.693359375f;
    constexpr float kLn2Low = -2.12194440e-4f;
    // Adding 1.5 * 2^23 leaves the nearest integer in the low bits of the sum.
    constexpr float kRound = 12582912.0f;
    // Beyond these the result is 0 or infinity; a NaN passes both comparisons unchanged.
    x = x < -104.0f ? -104.0f : x;
    x = x > 89.0f ? 89.0f : x;
    const float shifted = x * kLog2E + kRound;
    const float n = shifted - kRound;
    const int32_t exponent = int32_t(to_bits(shifted) - to_bits(kRound));
    const float r = (x - n * kLn2High) - n * kLn2Low;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    const int32_t half = exponent >> 1;
    const float first = from_bits(uint32_t(half + 127) << 23);
    const float second = from_bits(uint32_t(exponent - half + 127) << 23);
    return p * first * second;
#endif
}

TIM_HD float sigmoid(float x) { return 1.0f / (1.0f + exp(-x)); }

}  // namespace tim::math
