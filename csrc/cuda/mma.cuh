// Tensor cores and what feeds them: thin wrappers of the instructions, for sm_80 and later.
//
// Fragments, for lane 4 g + t: a register holds, of an 8 x 8 tile of A, the columns 2 t (low half)
// and 2 t + 1 of row g; of a tile of B, the rows 2 t and 2 t + 1 of column g. A [16, 16] is the
// tiles (rows 0-7, columns 0-7), (8-15, 0-7), (0-7, 8-15), (8-15, 8-15), in this order; B [16, 8]
// is the tiles (rows 0-7), (8-15). D holds (g, 2 t), (g, 2 t + 1), (g + 8, 2 t), (g + 8, 2 t + 1),
// so that two D of neighbouring columns, rounded to pairs, are an A.
//
// All lanes of a warp must take part in the products and in the loads of matrices.
#pragma once

#include <type_traits>

#include "common.cuh"

#ifndef __CUDACC__
#include "../emulator/instructions.h"
#endif

namespace tim::cuda {

#ifdef __CUDACC__

TIM_DEVICE uint32_t shared_address(const void* p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// d += a b with A [16, 16] and B [16, 8] of type T.
template <class T>
TIM_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    static_assert(std::is_same_v<T, BFloat16> || std::is_same_v<T, Float16>);
    if constexpr (std::is_same_v<T, BFloat16>) {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    } else {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
}

// d += a b with A [16, 8] and B [8, 8] of type T.
template <class T>
TIM_DEVICE void mma_m16n8k8(float (&d)[4], const uint32_t (&a)[2], const uint32_t (&b)[1]) {
    static_assert(std::is_same_v<T, BFloat16> || std::is_same_v<T, Float16>);
    if constexpr (std::is_same_v<T, BFloat16>) {
        asm volatile(
            "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 "
            "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(b[0]));
    } else {
        asm volatile(
            "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
            "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(b[0]));
    }
}

// Loads 8 x 8 tiles of halves from shared memory as an A has them: rows of 16 aligned bytes, to row
// i of tile j points lane 8 j + i; the pointers of further lanes are not read. A row-major B^T,
// that is the keys of q k^T, loads as a B this way.
template <int tiles>
TIM_DEVICE void load_tiles(uint32_t (&to)[tiles], const void* row) {
    static_assert(tiles == 1 || tiles == 2 || tiles == 4);
    const uint32_t address = shared_address(row);
    if constexpr (tiles == 1) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
                     : "=r"(to[0])
                     : "r"(address));
    } else if constexpr (tiles == 2) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                     : "=r"(to[0]), "=r"(to[1])
                     : "r"(address));
    } else {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                     : "r"(address));
    }
}

// The same, each tile transposed: a row-major B, as the values of P v, loads as a B this way.
template <int tiles>
TIM_DEVICE void load_tiles_transposed(uint32_t (&to)[tiles], const void* row) {
    static_assert(tiles == 1 || tiles == 2 || tiles == 4);
    const uint32_t address = shared_address(row);
    if constexpr (tiles == 1) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
                     : "=r"(to[0])
                     : "r"(address));
    } else if constexpr (tiles == 2) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                     : "=r"(to[0]), "=r"(to[1])
                     : "r"(address));
    } else {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                     : "r"(address));
    }
}

// Starts copying 16 aligned bytes into shared memory, past the registers and the first level of
// cache. Only the first `bytes` are read, the others become zeros; with 0 `from` is not read at
// all. The copy has arrived for this thread after wait_for_copies, for others after a barrier too.
TIM_DEVICE void copy_async(void* to, const void* from, int bytes = 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
                 "l"(from), "r"(bytes)
                 : "memory");
}

// Ends a group of copies, which may be empty.
TIM_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most the last `groups` groups of this thread are under way.
template <int groups>
TIM_DEVICE void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(groups) : "memory");
}

#else  // for the emulator

TIM_DEVICE uint32_t shared_address(const void* p) { return emulator::shared_address(p); }

template <class T>
constexpr emulator::Half kHalf =
    std::is_same_v<T, BFloat16> ? emulator::Half::kBFloat16 : emulator::Half::kFloat16;

template <class T>
TIM_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    static_assert(std::is_same_v<T, BFloat16> || std::is_same_v<T, Float16>);
    emulator::mma_m16n8(kHalf<T>, 16, d, a, b);
}

template <class T>
TIM_DEVICE void mma_m16n8k8(float (&d)[4], const uint32_t (&a)[2], const uint32_t (&b)[1]) {
    static_assert(std::is_same_v<T, BFloat16> || std::is_same_v<T, Float16>);
    emulator::mma_m16n8(kHalf<T>, 8, d, a, b);
}

template <int tiles>
TIM_DEVICE void load_tiles(uint32_t (&to)[tiles], const void* row) {
    static_assert(tiles == 1 || tiles == 2 || tiles == 4);
    emulator::ldmatrix(tiles, false, to, row);
}

template <int tiles>
TIM_DEVICE void load_tiles_transposed(uint32_t (&to)[tiles], const void* row) {
    static_assert(tiles == 1 || tiles == 2 || tiles == 4);
    emulator::ldmatrix(tiles, true, to, row);
}

TIM_DEVICE void copy_async(void* to, const void* from, int bytes = 16) {
    emulator::cp_async(to, from, bytes);
}

TIM_DEVICE void commit_copies() { emulator::cp_async_commit(); }

template <int groups>
TIM_DEVICE void wait_for_copies() {
    emulator::cp_async_wait(groups);
}

#endif

}  // namespace tim::cuda
