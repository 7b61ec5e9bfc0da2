// Numbers of 16 bits in the registers of tensor cores.
#pragma once

#include <stdint.h>

#include "../math/common.h"
#include "../math/float16.h"
#include "instructions.h"

namespace tim::emulator {

// The low (0) or the high (1) number of a register.
template <Half type>
float element(uint32_t word, int half) {
    const uint16_t bits = uint16_t(word >> 16 * half);
    if constexpr (type == Half::kBFloat16) {
        const math::BFloat16 value{bits};
        return math::load(&value);
    } else {
        const math::Float16 value{bits};
        return math::load(&value);
    }
}

}  // namespace tim::emulator
