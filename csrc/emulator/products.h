// Host versions of what csrc/cuda/wgmma.cuh wraps, and who reads shared memory that way.
//
// A product is computed when it is waited for, from what its registers held when it was issued and
// from what shared memory holds then.
#pragma once

#include <stdint.h>

#include <array>
#include <vector>

#include "instructions.h"

namespace tim::emulator {

struct Thread;

// d += a b, or d = a b, for the 16 rows of this warp: A [16, 16] and D [16, columns] in registers,
// B [16, columns] where the descriptor says.
void wgmma(Half type, int columns, bool transposed, bool adds, float* d, const uint32_t* a,
           uint64_t b);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(int groups_left);

struct Product {
    Half type;
    int columns;
    bool transposed;
    std::array<bool, 32> adds;
    std::array<float*, 32> d;
    std::array<std::array<uint32_t, 4>, 32> a;
    uint64_t b;
    const void* code;
};

// Of one warp; its first lane has it.
struct Products {
    bool fenced = false;                              // since products were last waited for
    uint32_t issued = 0;                              // in all
    std::vector<std::vector<Product>> groups = {{}};  // committed, oldest first; one that grows
};

// Which warps read the 16-byte units of shared memory by products, and when they have.
class ProductReads {
  public:
    void begin_block() { ++block_; }
    void begin(uint32_t address, const Thread& thread);
    void end(uint32_t address, const Thread& thread);
    // Whether a write by `thread` now comes too early; `who` is then a thread of the warp.
    bool race(uint32_t address, const Thread& thread, int* who) const;

  private:
    struct Unit {
        uint32_t block = 0;
        int under_way = 0, last = 0;           // products, and the thread of the last one
        std::array<uint32_t, 32> clocks = {};  // of each warp's first lane
    };
    std::vector<Unit> units_;
    uint32_t block_ = 0;
};

}  // namespace tim::emulator
