// Host versions of the instructions that csrc/cuda/mma.cuh wraps.
//
// The products of mma are summed in double precision and rounded once; tensor cores keep fewer
// bits, so that results may differ from a GPU's in the last places.
#pragma once

#include <stdint.h>

namespace tim::emulator {

enum class Half { kBFloat16, kFloat16 };

// d += a b, with A [16, depth] and B [depth, 8]; depth is 16 or 8. Each lane passes its registers.
void mma_m16n8(Half type, int depth, float* d, const uint32_t* a, const uint32_t* b);

// Loads `count` (1, 2 or 4) matrices of 8 x 8 values of 16 bits from shared memory. Lane 8 j + i
// points at row i of matrix j.
void ldmatrix(int count, bool transposed, uint32_t* to, const void* row);

// The copy of 16 bytes, all but the first `bytes` of them zeros, into shared memory; it arrives
// when its group is waited for.
void cp_async(void* to, const void* from, int bytes);
void cp_async_commit();
void cp_async_wait(int groups_left);

}  // namespace tim::emulator
