// The kernels of this folder, for the module that hands them to Python.
#pragma once

#include <stddef.h>

#include <vector>

#include "cuda/mma.cuh"

namespace tim::cuda {

struct TestKernel {
    const char* name;
    void (*kernel)(const float* in, float* out);
    unsigned blocks, threads;
    size_t shared_bytes;
};

// Healthy and with planted faults.
const std::vector<TestKernel>& faults();
// Of one of them, pass_on.
void limit_shared_memory(int bytes);

// The product of A [16, depth steps] and B [depth steps, 8]; with no steps that of registers.
void multiply(const void* a, const void* b, float* out, int steps, int depth, int dtype,
              bool transposed);
// The registers of a load of tiles.
void load(const void* in, void* out, int tiles, bool transposed);

}  // namespace tim::cuda
