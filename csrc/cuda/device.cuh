// All that the kernels use of CUDA beyond plain C++, in one file: with another <cuda_runtime.h> the
// same sources run where there is no GPU.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

#define TIM_DEVICE static __device__ __forceinline__

namespace tim::cuda {

constexpr int kWarp = 32;

TIM_DEVICE int lane() { return threadIdx.x % kWarp; }

// The same index, of which the compiler does not know that it is the same every time: what follows
// from it can be computed again instead of being kept in registers.
TIM_DEVICE unsigned renewed(unsigned index) {
#ifdef __CUDA_ARCH__
    asm volatile("" : "+r"(index));
#endif
    return index;
}

TIM_DEVICE unsigned block_index() { return renewed(blockIdx.x); }

TIM_DEVICE void barrier() { __syncthreads(); }

// The value of lane `source` modulo 32, or of the lane whose number differs by the bits of `mask`.
// All 32 lanes must take part.
TIM_DEVICE float shuffle(float value, int source) {
    return __shfl_sync(0xffffffffu, value, source);
}

TIM_DEVICE float shuffle_xor(float value, int mask) {
    return __shfl_xor_sync(0xffffffffu, value, mask);
}

// Of how many lanes the predicate is true, and whether it is of any. All 32 must take part.
TIM_DEVICE int count_lanes(bool predicate) {
    const unsigned lanes = __ballot_sync(0xffffffffu, predicate);
#ifdef __CUDACC__
    return __popc(lanes);
#else
    return __builtin_popcount(lanes);
#endif
}

TIM_DEVICE bool any_lane(bool predicate) { return __any_sync(0xffffffffu, predicate); }

// The block's dynamic shared memory, aligned to 16 bytes.
TIM_DEVICE float* shared_memory() {
#ifdef __CUDACC__
    extern __shared__ float4 tim_shared_memory[];
    return reinterpret_cast<float*>(tim_shared_memory);
#else
    return static_cast<float*>(emulator::dynamic_shared_memory());
#endif
}

// The block's array that `Name`, any type, stands for: the same one in all calls.
template <class Name, class T, int n>
TIM_DEVICE T* shared_array() {
#ifdef __CUDACC__
    __shared__ alignas(16) T array[n];
    return array;
#else
    static const char key = 0;
    return static_cast<T*>(emulator::static_shared_memory(&key, n * sizeof(T)));
#endif
}

// Through the read-only path, which lets the compiler move loads across stores: only for memory
// that no thread of the same launch writes.
template <class Word>
TIM_DEVICE Word load_global(const Word* p) {
    return __ldg(p);
}

// One store each, spelled out for the wide ones: the compiler now and then splits the store of a
// struct into its members.
template <class Word>
TIM_DEVICE void store_global(Word* p, Word word) {
#ifdef __CUDA_ARCH__
    if constexpr (sizeof(Word) == 16) {
        asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(word.x), "r"(word.y),
                     "r"(word.z), "r"(word.w)
                     : "memory");
        return;
    } else if constexpr (sizeof(Word) == 8) {
        asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(p), "r"(word.x), "r"(word.y)
                     : "memory");
        return;
    }
#endif
    *p = word;
}

// What an error message says of a call, and its stream.
struct Call {
    const char* op;
    int64_t shape[4];  // unused entries stay 0
    cudaStream_t stream;
};

[[noreturn]] void fail(const Call& call, cudaError_t error);
// A size of the call as the kernels count it; throws where it is larger than they can take.
int counted(const Call& call, const char* name, int64_t size, int64_t most);

inline void check(const Call& call, cudaError_t error) {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // clears it, so that the next check of the process does not report it
                         // again
    fail(call, error);
}

template <class... Parameters, class... Arguments>
void launch(const Call& call, void (*kernel)(Parameters...), dim3 grid, dim3 block,
            size_t shared_bytes, Arguments... arguments) {
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = call.stream;
    cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
    check(call, cudaGetLastError());
}

inline int device_attribute(const Call& call, cudaDeviceAttr attribute) {
    int device = 0, value = 0;
    check(call, cudaGetDevice(&device));
    check(call, cudaDeviceGetAttribute(&value, attribute, device));
    return value;
}

inline int multiprocessors(const Call& call) {
    return device_attribute(call, cudaDevAttrMultiProcessorCount);
}

// Rows of a grid for so many samples, of which a block takes every gridDim.y-th.
inline unsigned grid_rows(const Call& call, int64_t samples) {
    const int64_t most = device_attribute(call, cudaDevAttrMaxGridDimY);
    return unsigned(samples < most ? samples : most);
}

// Lets blocks of the kernel have more shared memory than the 48 KiB that all may take.
template <class... Parameters>
void allow_shared_memory(const Call& call, void (*kernel)(Parameters...), size_t bytes) {
    if (bytes <= 48 * 1024) return;
    check(call,
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)));
    check(call, cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, 100));
}

}  // namespace tim::cuda
