// As much of CUDA as the elementwise kernels need to run on a CPU: a launch is a loop over blocks
// and threads. Kernels with barriers or shuffles compile, but abort.
#pragma once

#include <stdint.h>
#include <stdlib.h>

#define __global__
#define __device__
#define __shared__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint2 {
    unsigned x, y;
};
struct uint4 {
    unsigned x, y, z, w;
};
struct float4 {
    float x, y, z, w;
};

inline dim3 gridDim, blockDim, blockIdx, threadIdx;

// A GPU traps on a misaligned access, which a CPU would allow.
template <class Word>
Word __ldg(const Word* p) {
    if (reinterpret_cast<uintptr_t>(p) % sizeof(Word) != 0) abort();
    return *p;
}
inline float __shfl_sync(unsigned, float, int) { abort(); }
inline float __shfl_xor_sync(unsigned, float, int) { abort(); }
inline void __syncthreads() { abort(); }

using cudaStream_t = void*;
using cudaError_t = int;
constexpr int cudaSuccess = 0, cudaDevAttrMultiProcessorCount = 0;
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
};
inline const char* cudaGetErrorString(cudaError_t) { return ""; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int*) { return cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, int, int) {
    *value = 1;  // a small grid, so that blocks take several turns
    return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
    gridDim = config->gridDim;
    blockDim = config->blockDim;
    for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x)
        for (threadIdx.x = 0; threadIdx.x < blockDim.x; ++threadIdx.x) kernel(arguments...);
    return cudaSuccess;
}
