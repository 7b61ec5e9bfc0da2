// Products of a warpgroup on Hopper (sm_90a): thin wrappers of wgmma, the left operand in
// registers, the right one in shared memory.
//
// A warpgroup is four warps, from a multiple of four on; warp w has the rows 16 w to 16 w + 15 of
// the 64 of a product, with the fragments of mma.cuh: A [16, 16] is four registers, D [16, columns]
// four for each 8 columns. All threads of the warpgroup must take part.
//
// Products run on while the threads do something else. Between fence_products and wait_for_products
// nobody may touch their registers or write to what they read from shared memory.
#pragma once

#include "mma.cuh"

#ifndef __CUDACC__
#include "../emulator/products.h"
#endif

namespace tim::cuda {

constexpr int kWarpgroup = 4 * kWarp;

#if !defined(__CUDACC__) || !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool kHasWarpgroupProducts = true;
#else
constexpr bool kHasWarpgroupProducts = false;  // kernels for this architecture have no body
#endif

// How 16-byte units of a row are permuted in shared memory, by the rows' addresses: within so many
// bytes, which are a row. Unit u of row r lies where unit u ^ (r * bytes / 128) would.
enum class Swizzle : int { kNone = 0, k128 = 1, k64 = 2, k32 = 3 };

// What tells wgmma where 16-byte units of its right operand lie. With rows of the permutation's
// width (16 bytes for none), eight to a group:
//
// - of columns of B (not `transposed`; keys of q k^T): groups of eight columns are `stride` bytes
//   apart. Without a permutation the two units of a column are `leading` bytes apart.
// - of rows of B (`transposed`; values of P v): groups of eight rows are `stride` bytes apart, or
//   `leading` ones without a permutation. The columns must not be more than those of a row.
//
// Groups start at multiples of eight rows' bytes; `address` may point at a unit of their first row.
TIM_HD uint64_t matrix_descriptor(uint32_t address, int leading, int stride, Swizzle swizzle) {
    return (address & 0x3ffff) >> 4 | uint64_t(leading >> 4) << 16 | uint64_t(stride >> 4) << 32 |
           uint64_t(swizzle) << 62;
}

#ifdef __CUDACC__

// d += a b, or d = a b unless `adds`, with A [64, 16] and B [16, columns] of type T.
template <class T, bool transposed, int units>
TIM_DEVICE void multiply(float (&d)[units][4], const uint32_t (&a)[4], uint64_t b, bool adds) {
    static_assert(std::is_same_v<T, BFloat16> || std::is_same_v<T, Float16>);
    static_assert(units == 1 || units == 4 || units == 8);
    constexpr bool kBrain = std::is_same_v<T, BFloat16>;
    if constexpr (units == 1 && kBrain) {
        asm volatile(
            "{ .reg .pred adds; setp.ne.b32 adds, %9, 0; "
            "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 "
            "{%0, %1, %2, %3}, "
            "{%4, %5, %6, %7}, %8, adds, 1, 1, %10; }"
            : "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(adds)),
              "n"(int(transposed)));
    } else if constexpr (units == 1 && !kBrain) {
        asm volatile(
            "{ .reg .pred adds; setp.ne.b32 adds, %9, 0; "
            "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 "
            "{%0, %1, %2, %3}, "
            "{%4, %5, %6, %7}, %8, adds, 1, 1, %10; }"
            : "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(adds)),
              "n"(int(transposed)));
    } else if constexpr (units == 4 && kBrain) {
        asm volatile(
            "{ .reg .pred adds; setp.ne.b32 adds, %21, 0; "
            "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 "
            "{%0, %1, %2, %3, %4, %5, %6, %7, "
            "%8, %9, %10, %11, %12, %13, %14, %15}, "
            "{%16, %17, %18, %19}, %20, adds, 1, 1, %22; }"
            : "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]), "+f"(d[1][0]),
              "+f"(d[1][1]), "+f"(d[1][2]), "+f"(d[1][3]), "+f"(d[2][0]), "+f"(d[2][1]),
              "+f"(d[2][2]), "+f"(d[2][3]), "+f"(d[3][0]), "+f"(d[3][1]), "+f"(d[3][2]),
              "+f"(d[3][3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(adds)),
              "n"(int(transposed)));
    } else if constexpr (units == 4 && !kBrain) {
        asm volatile(
            "{ .reg .pred adds; setp.ne.b32 adds, %21, 0; "
            "wgmma.mma_async.sync.aligned.m64n32k16.f32.f16.f16 "
            "{%0, %1, %2, %3, %4, %5, %6, %7, "
            "%8, %9, %10, %11, %12, %13, %14, %15}, "
            "{%16, %17, %18, %19}, %20, adds, 1, 1, %22; }"
            : "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]), "+f"(d[1][0]),
              "+f"(d[1][1]), "+f"(d[1][2]), "+f"(d[1][3]), "+f"(d[2][0]), "+f"(d[2][1]),
              "+f"(d[2][2]), "+f"(d[2][3]), "+f"(d[3][0]), "+f"(d[3][1]), "+f"(d[3][2]),
              "+f"(d[3][3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(adds)),
              "n"(int(transposed)));
    } else if constexpr (units == 8 && kBrain) {
        asm volatile(
            "{ .reg .pred adds; setp.ne.b32 adds, %37, 0; "
            "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
            "{%0, %1, %2, %3, %4, %5, %6, %7, "
            "%8, %9, %10, %11, %12, %13, %14, %15, "
            "%16, %17, %18, %19, %20, %21, %22, %23, "
            "%24, %25, %26, %27, %28, %29, %30, %31}, "
            "{%32, %33, %34, %35}, %36, adds, 1, 1, %38; }"
            : "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]), "+f"(d[1][0]),
              "+f"(d[1][1]), "+f"(d[1][2]), "+f"(d[1][3]), "+f"(d[2][0]), "+f"(d[2][1]),
              "+f"(d[2][2]), "+f"(d[2][3]), "+f"(d[3][0]), "+f"(d[3][1]), "+f"(d[3][2]),
              "+f"(d[3][3]), "+f"(d[4][0]), "+f"(d[4][1]), "+f"(d[4][2]), "+f"(d[4][3]),
              "+f"(d[5][0]), "+f"(d[5][1]), "+f"(d[5][2]), "+f"(d[5][3]), "+f"(d[6][0]),
              "+f"(d[6][1]), "+f"(d[6][2]), "+f"(d[6][3]), "+f"(d[7][0]), "+f"(d[7][1]),
              "+f"(d[7][2]), "+f"(d[7][3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(adds)),
              "n"(int(transposed)));
    } else if constexpr (units == 8 && !kBrain) {
        asm volatile(
            "{ .reg .pred adds; setp.ne.b32 adds, %37, 0; "
            "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 "
            "{%0, %1, %2, %3, %4, %5, %6, %7, "
            "%8, %9, %10, %11, %12, %13, %14, %15, "
            "%16, %17, %18, %19, %20, %21, %22, %23, "
            "%24, %25, %26, %27, %28, %29, %30, %31}, "
            "{%32, %33, %34, %35}, %36, adds, 1, 1, %38; }"
            : "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]), "+f"(d[1][0]),
              "+f"(d[1][1]), "+f"(d[1][2]), "+f"(d[1][3]), "+f"(d[2][0]), "+f"(d[2][1]),
              "+f"(d[2][2]), "+f"(d[2][3]), "+f"(d[3][0]), "+f"(d[3][1]), "+f"(d[3][2]),
              "+f"(d[3][3]), "+f"(d[4][0]), "+f"(d[4][1]), "+f"(d[4][2]), "+f"(d[4][3]),
              "+f"(d[5][0]), "+f"(d[5][1]), "+f"(d[5][2]), "+f"(d[5][3]), "+f"(d[6][0]),
              "+f"(d[6][1]), "+f"(d[6][2]), "+f"(d[6][3]), "+f"(d[7][0]), "+f"(d[7][1]),
              "+f"(d[7][2]), "+f"(d[7][3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(adds)),
              "n"(int(transposed)));
    }
}

// The registers of products were written, or the products waited for: neither the compiler nor the
// hardware moves accesses to them across.
template <int units>
TIM_DEVICE void fence_registers(float (&d)[units][4]) {
#pragma unroll
    for (int i = 0; i < units * 4; ++i) asm volatile("" : "+f"(d[i / 4][i % 4])::"memory");
}

TIM_DEVICE void fence_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Ends a group of products.
TIM_DEVICE void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most the last `groups` groups of this warp's products are under way.
template <int groups>
TIM_DEVICE void wait_for_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(groups) : "memory");
}

// From here on the threads of the warpgroup may have so many registers, fewer or more than before.
template <int registers>
TIM_DEVICE void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}

template <int registers>
TIM_DEVICE void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}

#else  // for the emulator

template <class T, bool transposed, int units>
TIM_DEVICE void multiply(float (&d)[units][4], const uint32_t (&a)[4], uint64_t b, bool adds) {
    static_assert(std::is_same_v<T, BFloat16> || std::is_same_v<T, Float16>);
    static_assert(units == 1 || units == 4 || units == 8);
    emulator::wgmma(kHalf<T>, units * 8, transposed, adds, d[0], a, b);
}

template <int units>
TIM_DEVICE void fence_registers(float (&)[units][4]) {}

TIM_DEVICE void fence_products() { emulator::wgmma_fence(); }

TIM_DEVICE void commit_products() { emulator::wgmma_commit(); }

template <int groups>
TIM_DEVICE void wait_for_products() {
    emulator::wgmma_wait(groups);
}

template <int registers>
TIM_DEVICE void give_registers() {}

template <int registers>
TIM_DEVICE void take_registers() {}

#endif

}  // namespace tim::cuda
