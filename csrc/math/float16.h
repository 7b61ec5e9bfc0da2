// Half precision storage, for the GPU kernels: the CPU kernels leave this type to PyTorch.
#pragma once

#include "common.h"

namespace tim::math {

struct Float16 {
    uint16_t bits;
};

TIM_HD float load(const Float16* p) {
#ifdef __CUDA_ARCH__
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(p->bits));
    return value;
#else
    // 2^112 moves the exponent from one bias to the other, subnormal numbers included.
    const uint32_t magnitude = uint32_t(p->bits & 0x7fffu) << 13;
    const uint32_t sign = uint32_t(p->bits & 0x8000u) << 16;
    const bool finite = (p->bits & 0x7c00u) != 0x7c00u;
    const uint32_t bits =
        finite ? to_bits(from_bits(magnitude) * 0x1p112f) : magnitude | 0x7f800000u;
    return from_bits(bits | sign);
#endif
}

// Round to nearest, ties to even; infinity from 65520 on.
TIM_HD void store(Float16* p, float value) {
#ifdef __CUDA_ARCH__
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(p->bits) : "f"(value));
#else
    const uint32_t sign = to_bits(value) >> 16 & 0x8000u;
    const uint32_t bits = to_bits(value) & 0x7fffffffu;
    const float magnitude = from_bits(bits);
    uint32_t half;
    if (magnitude != magnitude) {
        half = 0x7e00u;
    } else if (magnitude >= 65520.0f) {
        half = 0x7c00u;
    } else if (magnitude < 0x1p-14f) {
        // In 0.5 + x the last bit has the weight 2^-24 of the smallest subnormal number.
        half = to_bits(magnitude + 0.5f) - to_bits(0.5f);
    } else {
        half = (bits + 0xfffu + (bits >> 13 & 1u) - (112u << 23)) >> 13;
    }
    p->bits = uint16_t(half | sign);
#endif
}

}  // namespace tim::math
