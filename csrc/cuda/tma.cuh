// Copies of whole tiles by the tensor memory accelerator (sm_90), and the barriers in shared memory
// on which they arrive.
#pragma once

#include <cuda.h>

#include "mma.cuh"
#include "wgmma.cuh"

#ifndef __CUDACC__
#include "../emulator/transfers.h"
#endif

namespace tim::cuda {

// The address of a tensor of four dimensions, its strides and the box that one copy takes. A kernel
// has it as a parameter `const __grid_constant__`.
using TensorMap = CUtensorMap;

// A barrier in shared memory. Its phases are numbered from 0 on; a phase ends when the arrivals and
// the bytes that it expects are there.
struct Mbarrier {
    uint64_t state;
};

#ifdef __CUDACC__

TIM_DEVICE void init_mbarrier(Mbarrier* barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
                 "r"(arrivals)
                 : "memory");
}

// Makes initialised barriers known to copies. A barrier of the block has to follow.
TIM_DEVICE void publish_mbarriers() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

TIM_DEVICE void arrive(Mbarrier* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
                 : "memory");
}

// The same, with so many bytes more to come in this phase.
TIM_DEVICE void arrive_and_expect(Mbarrier* barrier, int bytes) {
    asm volatile(
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
        "r"(bytes)
        : "memory");
}

// Waits until the last phase that has ended is an even (0) or an odd (1) one. Of a new barrier that
// is 1. What was done before the arrivals is done for those who have waited.
TIM_DEVICE void wait_for_phase(Mbarrier* barrier, int parity) {
    uint32_t there;
    do {
        asm volatile(
            "{ .reg .pred there; mbarrier.try_wait.parity.shared::cta.b64 there, [%1], %2; "
            "selp.u32 %0, 1, 0, there; }"
            : "=r"(there)
            : "r"(shared_address(barrier)), "r"(parity)
            : "memory");
    } while (!there);
}

// Starts copying the box whose first element is (c0, c1, c2, c3), the innermost dimension first, to
// `to`, which is a multiple of 128. Elements outside the tensor become zeros. The copy's bytes, all
// of the box, arrive at `barrier`.
TIM_DEVICE void copy_box(void* to, const TensorMap& map, Mbarrier* barrier, int c0, int c1, int c2,
                         int c3) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(shared_address(to)),
        "l"(&map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
        : "memory");
}

#else  // for the emulator

TIM_DEVICE void init_mbarrier(Mbarrier* barrier, int arrivals) {
    emulator::mbarrier_init(barrier, arrivals);
}

TIM_DEVICE void publish_mbarriers() {}

TIM_DEVICE void arrive(Mbarrier* barrier) { emulator::mbarrier_arrive(barrier, 0); }

TIM_DEVICE void arrive_and_expect(Mbarrier* barrier, int bytes) {
    emulator::mbarrier_arrive(barrier, bytes);
}

TIM_DEVICE void wait_for_phase(Mbarrier* barrier, int parity) {
    emulator::mbarrier_wait(barrier, parity);
}

TIM_DEVICE void copy_box(void* to, const TensorMap& map, Mbarrier* barrier, int c0, int c1, int c2,
                         int c3) {
    emulator::copy_box(to, map, barrier, c0, c1, c2, c3);
}

#endif

// The driver's function that makes maps of tensors, or null where it has none. Asked for as the
// program runs, so that nothing has to be linked to the driver.
inline decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
    static const auto encoder = [] {
        void* function = nullptr;
        cudaDriverEntryPointQueryResult result{};
#if CUDART_VERSION >= 12050
        const cudaError_t error = cudaGetDriverEntryPointByVersion(
            "cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
#else
        const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function,
                                                          cudaEnableDefault, &result);
#endif
        const bool found = error == cudaSuccess && result == cudaDriverEntryPointSuccess;
        if (error != cudaSuccess) cudaGetLastError();  // clears it
        return found ? reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function) : nullptr;
    }();
    return encoder;
}

// The map of a tensor of halves for copies of boxes; the innermost dimension comes first, and its
// elements lie side by side. False where the driver cannot make it: addresses and strides must be
// multiples of 16 bytes.
template <class T>
bool make_tensor_map(TensorMap* map, const T* address, const int64_t (&sizes)[4],
                     const int64_t (&strides)[3], const int (&box)[4], Swizzle swizzle) {
    static_assert(std::is_same_v<T, BFloat16> || std::is_same_v<T, Float16>);
    const auto encode = tensor_map_encoder();
    if (encode == nullptr) return false;
    cuuint64_t dims[4], bytes[3];
    cuuint32_t boxes[4], steps[4];
    for (int i = 0; i < 4; ++i) {
        dims[i] = cuuint64_t(sizes[i]);
        boxes[i] = cuuint32_t(box[i]);
        steps[i] = 1;
    }
    // The stride of a single element says nothing, and may be anything.
    for (int i = 0; i < 3; ++i)
        bytes[i] = sizes[i + 1] == 1 ? 16 : cuuint64_t(strides[i]) * sizeof(T);
    return encode(map,
                  std::is_same_v<T, BFloat16> ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                              : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                  4, const_cast<T*>(address), dims, bytes, boxes, steps,
                  CU_TENSOR_MAP_INTERLEAVE_NONE,
                  swizzle == Swizzle::k128  ? CU_TENSOR_MAP_SWIZZLE_128B
                  : swizzle == Swizzle::k64 ? CU_TENSOR_MAP_SWIZZLE_64B
                  : swizzle == Swizzle::k32 ? CU_TENSOR_MAP_SWIZZLE_32B
                                            : CU_TENSOR_MAP_SWIZZLE_NONE,
                  CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                  CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace tim::cuda
