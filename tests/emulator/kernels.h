// The kernels of this folder, for the module that hands them to Python.
#pragma once

#include <stddef.h>

#include <vector>

#include "cuda/tma.cuh"

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

// The same for copies of boxes and products of warpgroups.
struct RingKernel {
    const char* name;
    void (*kernel)(TensorMap map, float* out, int entries);
};
const std::vector<RingKernel>& ring_faults();
void launch_ring(const RingKernel& test, const float* in, float* out);

// Of the right operand of a product; `adds` belongs to the product.
struct Descriptor {
    int start, leading, stride, swizzle;
    bool adds;
};
// d [128, columns / 2] += a b, with the registers a [128, 4], and b where the descriptor says in
// shared memory that holds the image, rows of 16 bytes.
void warpgroup_product(const void* image, int rows, const void* a, float* d, Descriptor b,
                       int columns, bool transposed, int dtype);
// A box of a tensor of halves as it lies in shared memory; false where there is no map for it.
bool copied_box(const void* in, void* out, const int64_t (&sizes)[4], const int64_t (&strides)[3],
                const int (&extent)[4], const int (&at)[4], int swizzle);

}  // namespace tim::cuda
