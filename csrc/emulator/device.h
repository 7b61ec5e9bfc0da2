// The emulated device: what tests can set.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <string>
#include <vector>

namespace tim::emulator {

struct Device {
    int multiprocessors = 2;            // few, so that blocks take several turns
    int max_grid_y = 2;                 // for the same reason; 65535 on every GPU
    uint64_t last_blocks = UINT64_MAX;  // so many blocks of a launch run, the last ones
    int capability = 80;                // compute capability 8.0
    int shared_bytes = 163 * 1024;  // per block, after opting in: that of compute capability 8.0
    // 0: blocks and threads in their natural order; else the seed that shuffles both.
    uint32_t order = 0;
    bool runs = true;  // else launches are checked and recorded, and nothing happens
};

struct Launch {
    std::string kernel;
    uint64_t blocks;
    unsigned threads;  // of a block
    size_t shared_bytes;
};

// Launches that did not run, since the device was set.
std::vector<Launch>& launches();

Device& device();

}  // namespace tim::emulator
