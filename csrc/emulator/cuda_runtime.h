// Stands in for CUDA's header of the same name: with this folder first in the include path the
// host's compiler compiles csrc/cuda, and the kernels run on a CPU, thread by thread, under checks.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <tuple>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__ __restrict
// Compilers do not show how a variable is used whose address they do not need.
#define __shared__                                                          \
    static_assert(sizeof(char) == 0,                                        \
                  "shared memory is seen only through shared_memory() and " \
                  "shared_array()");                                        \
    static

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
// With CUDA's alignments, which decide the accesses that are legal.
struct alignas(8) int2 {
    int x, y;
};
struct alignas(16) int4 {
    int x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};

inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

extern dim3 gridDim, blockDim;
extern uint3 blockIdx, threadIdx;
constexpr int warpSize = 32;

#define TIM_EMULATOR_INLINE static inline __attribute__((always_inline))

namespace tim::emulator {

enum class Shuffle { kIndex, kUp, kDown, kXor };
enum class Vote { kBallot, kAll, kAny };

void sync_block();
void sync_warp(unsigned mask);
uint64_t shuffle(Shuffle kind, unsigned mask, uint64_t value, int argument, int width);
unsigned vote(Vote kind, unsigned mask, bool predicate);
void read_constant(const void* p, size_t bytes);

template <class T>
TIM_EMULATOR_INLINE T shuffle_value(Shuffle kind, unsigned mask, T value, int argument, int width) {
    static_assert(sizeof(T) <= sizeof(uint64_t), "a shuffle moves at most 8 bytes");
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof(value));
    bits = shuffle(kind, mask, bits, argument, width);
    memcpy(&value, &bits, sizeof(value));
    return value;
}

// The block's dynamic shared memory, and its array that `key` stands for, aligned to 16 bytes.
void* dynamic_shared_memory();
void* static_shared_memory(const void* key, size_t bytes);
uint32_t shared_address(const void* p);

}  // namespace tim::emulator

TIM_EMULATOR_INLINE void __syncthreads() { tim::emulator::sync_block(); }
TIM_EMULATOR_INLINE void __syncwarp(unsigned mask = ~0u) { tim::emulator::sync_warp(mask); }

template <class T>
TIM_EMULATOR_INLINE T __shfl_sync(unsigned mask, T value, int source, int width = warpSize) {
    return tim::emulator::shuffle_value(tim::emulator::Shuffle::kIndex, mask, value, source, width);
}
template <class T>
TIM_EMULATOR_INLINE T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize) {
    return tim::emulator::shuffle_value(tim::emulator::Shuffle::kUp, mask, value, int(delta),
                                        width);
}
template <class T>
TIM_EMULATOR_INLINE T __shfl_down_sync(unsigned mask, T value, unsigned delta,
                                       int width = warpSize) {
    return tim::emulator::shuffle_value(tim::emulator::Shuffle::kDown, mask, value, int(delta),
                                        width);
}
template <class T>
TIM_EMULATOR_INLINE T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = warpSize) {
    return tim::emulator::shuffle_value(tim::emulator::Shuffle::kXor, mask, value, lanes, width);
}

TIM_EMULATOR_INLINE unsigned __ballot_sync(unsigned mask, int predicate) {
    return tim::emulator::vote(tim::emulator::Vote::kBallot, mask, predicate != 0);
}
TIM_EMULATOR_INLINE int __all_sync(unsigned mask, int predicate) {
    return int(tim::emulator::vote(tim::emulator::Vote::kAll, mask, predicate != 0));
}
TIM_EMULATOR_INLINE int __any_sync(unsigned mask, int predicate) {
    return int(tim::emulator::vote(tim::emulator::Vote::kAny, mask, predicate != 0));
}

template <class Word>
TIM_EMULATOR_INLINE Word __ldg(const Word* p) {
    tim::emulator::read_constant(p, sizeof(Word));
    return *p;
}

TIM_EMULATOR_INLINE float __fdividef(float a, float b) { return a / b; }
TIM_EMULATOR_INLINE float rsqrtf(float x) { return 1.0f / sqrtf(x); }
TIM_EMULATOR_INLINE float __int_as_float(int bits) {
    float value;
    memcpy(&value, &bits, sizeof(value));
    return value;
}

using cudaStream_t = void*;
enum cudaError_t : int {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorLaunchFailure = 719,
};
enum cudaDeviceAttr {
    cudaDevAttrMaxGridDimY = 6,
    cudaDevAttrMultiProcessorCount = 16,
    cudaDevAttrComputeCapabilityMajor = 75,
    cudaDevAttrComputeCapabilityMinor = 76,
    cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
    cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
enum cudaFuncAttribute {
    cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
    cudaFuncAttributePreferredSharedMemoryCarveout = 9,
};
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
};

enum cudaDriverEntryPointQueryResult {
    cudaDriverEntryPointSuccess = 0,
    cudaDriverEntryPointSymbolNotFound = 1,
};
constexpr int cudaEnableDefault = 0;
#define CUDART_VERSION 13000

cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned version,
                                             uint64_t flags,
                                             cudaDriverEntryPointQueryResult* result);
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);

namespace tim::emulator {

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, const void* arguments,
                   size_t argument_bytes,
                   void (*invoke)(const void* kernel, const void* arguments));
cudaError_t set_attribute(const void* kernel, cudaFuncAttribute attribute, int value);

template <class... Parameters>
void invoke(const void* kernel, const void* arguments) {
    const auto& tuple = *static_cast<const std::tuple<Parameters...>*>(arguments);
    std::apply(reinterpret_cast<void (*)(Parameters...)>(const_cast<void*>(kernel)), tuple);
}

}  // namespace tim::emulator

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
    const std::tuple<Parameters...> tuple(arguments...);
    return tim::emulator::launch(*config, reinterpret_cast<const void*>(kernel), &tuple,
                                 sizeof(tuple), tim::emulator::invoke<Parameters...>);
}

template <class... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute attribute,
                                 int value) {
    return tim::emulator::set_attribute(reinterpret_cast<const void*>(kernel), attribute, value);
}
