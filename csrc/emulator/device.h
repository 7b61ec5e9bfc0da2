// The emulated device: what tests can set.
#pragma once

#include <stdint.h>

namespace tim::emulator {

struct Device {
    int multiprocessors = 2;        // few, so that blocks take several turns
    uint64_t last_blocks = UINT64_MAX;  // so many blocks of a launch run, the last ones
    int shared_bytes = 163 * 1024;  // per block, after opting in: that of compute capability 8.0
    // 0: blocks and threads in their natural order; else the seed that shuffles both.
    uint32_t order = 0;
};

Device& device();

}  // namespace tim::emulator
