// What the kernels share: storage types, wide memory accesses, reductions, division of the work.
//
// All kernels are stream-ordered and hold nothing beyond their launch: no allocation, no
// synchronisation with the host, no atomics. Sums have a fixed order, so that equal inputs give
// equal bits.
#pragma once

#include <initializer_list>

#include "../kernels.h"
#include "../math/common.h"
#include "../math/float16.h"
#include "device.cuh"

namespace tim::cuda {

using math::BFloat16;
using math::Float16;

[[noreturn]] void refuse_dtype(int dtype);

// Calls body with a value of the storage type that `dtype` names.
template <class Body>
void with_dtype(int dtype, const Body& body) {
    if (dtype == kFloat32) {
        body(float{});
    } else if (dtype == kBFloat16) {
        body(BFloat16{});
    } else if (dtype == kFloat16) {
        body(Float16{});
    } else {
        refuse_dtype(dtype);
    }
}

template <int value>
struct Constant {
    static constexpr int kValue = value;
};

// The widest access of a thread, and the one that coalesces best.
constexpr int kAccessBytes = 16;

// Calls body with the number of values of type T to move at once: as many as fit into 16 bytes
// where every address and every row stride (in values) allows it, else one.
template <class T, class Body>
void with_width(std::initializer_list<const void*> pointers, std::initializer_list<int64_t> strides,
                const Body& body) {
    constexpr int kWidth = kAccessBytes / sizeof(T);
    bool wide = true;
    for (const void* p : pointers)
        wide = wide && reinterpret_cast<uintptr_t>(p) % kAccessBytes == 0;
    for (int64_t stride : strides) wide = wide && stride % kWidth == 0;
    if (wide) {
        body(Constant<kWidth>{});
    } else {
        body(Constant<1>{});
    }
}

template <class T>
T* array(void* p) {
    return static_cast<T*>(p);
}

template <class T>
const T* array(const void* p) {
    return static_cast<const T*>(p);
}

TIM_HD int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// n neighbouring values, as they lie in memory. They stay whole words until they are used: a load
// that is taken apart at once is also waited for at once.
template <class T, int n>
struct Pack {
    static constexpr int kBytes = n * sizeof(T);
    uint32_t words[kBytes < 4 ? 1 : kBytes / 4];
};

// Value j of a pack, for constant j.
template <class T, int n>
TIM_DEVICE float load(const Pack<T, n>& pack, int j) {
    if constexpr (sizeof(T) == 4) {
        return math::from_bits(pack.words[j]);
    } else {
        const T value{uint16_t(pack.words[j / 2] >> j % 2 * 16)};
        return math::load(&value);
    }
}

// Two values in one word. The instruction rounds both in the time that one would take.
TIM_DEVICE uint32_t pair_bits(BFloat16, float a, float b) {
#ifdef __CUDA_ARCH__
    uint32_t bits;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(b), "f"(a));
    return bits;
#else
    BFloat16 low, high;
    math::store(&low, a);
    math::store(&high, b);
    return low.bits | uint32_t(high.bits) << 16;
#endif
}

TIM_DEVICE uint32_t pair_bits(Float16, float a, float b) {
#ifdef __CUDA_ARCH__
    uint32_t bits;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(b), "f"(a));
    return bits;
#else
    Float16 low, high;
    math::store(&low, a);
    math::store(&high, b);
    return low.bits | uint32_t(high.bits) << 16;
#endif
}

template <class T, int n>
TIM_DEVICE Pack<T, n> narrow(const float (&values)[n]) {
    Pack<T, n> pack;
    if constexpr (sizeof(T) == 4) {
#pragma unroll
        for (int i = 0; i < n; ++i) pack.words[i] = math::to_bits(values[i]);
    } else if constexpr (n % 2 == 0) {
#pragma unroll
        for (int i = 0; i < n; i += 2) pack.words[i / 2] = pair_bits(T{}, values[i], values[i + 1]);
    } else {
        pack.words[0] = pair_bits(T{}, values[0], 0.0f);
    }
    return pack;
}

// Reads n values by accesses of `width` values, to which p must be aligned.
template <int n, int width = n, class T>
TIM_DEVICE Pack<T, n> read(const T* p) {
    constexpr int kBytes = width * sizeof(T), kWords = kBytes / 4;
    Pack<T, n> pack = {};
#pragma unroll
    for (int i = 0; i < n / width; ++i) {
        if constexpr (kBytes == 16) {
            const uint4 access = load_global(reinterpret_cast<const uint4*>(p) + i);
            pack.words[i * kWords] = access.x;
            pack.words[i * kWords + 1] = access.y;
            pack.words[i * kWords + 2] = access.z;
            pack.words[i * kWords + 3] = access.w;
        } else if constexpr (kBytes == 8) {
            const uint2 access = load_global(reinterpret_cast<const uint2*>(p) + i);
            pack.words[i * kWords] = access.x;
            pack.words[i * kWords + 1] = access.y;
        } else if constexpr (kBytes == 4) {
            pack.words[i] = load_global(reinterpret_cast<const unsigned int*>(p) + i);
        } else {
            const uint32_t access = load_global(reinterpret_cast<const unsigned short*>(p) + i);
            pack.words[i / 2] |= access << i % 2 * 16;
        }
    }
    return pack;
}

template <int width, class T, int n>
TIM_DEVICE void write(T* p, const Pack<T, n>& pack) {
    constexpr int kBytes = width * sizeof(T), kWords = kBytes / 4;
#pragma unroll
    for (int i = 0; i < n / width; ++i) {
        if constexpr (kBytes == 16) {
            store_global(reinterpret_cast<uint4*>(p) + i,
                         uint4{pack.words[i * kWords], pack.words[i * kWords + 1],
                               pack.words[i * kWords + 2], pack.words[i * kWords + 3]});
        } else if constexpr (kBytes == 8) {
            store_global(reinterpret_cast<uint2*>(p) + i,
                         uint2{pack.words[i * kWords], pack.words[i * kWords + 1]});
        } else if constexpr (kBytes == 4) {
            store_global(reinterpret_cast<unsigned int*>(p) + i, pack.words[i]);
        } else {
            store_global(reinterpret_cast<unsigned short*>(p) + i,
                         uint16_t(pack.words[i / 2] >> i % 2 * 16));
        }
    }
}

template <class T, int n>
TIM_DEVICE void write(T* p, const Pack<T, n>& pack) {
    write<n>(p, pack);
}

// Sum over the warp; every lane receives it.
TIM_DEVICE float warp_sum(float value) {
#pragma unroll
    for (int mask = kWarp / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
    return value;
}

// Blocks of a grid that keeps every multiprocessor busy: one for each `block_items` items, but no
// more than `per_multiprocessor` on each.
inline dim3 persistent_grid(const Call& call, int64_t items, int block_items,
                            int per_multiprocessor) {
    const int64_t blocks = ceil_div(items, block_items);
    const int64_t resident = int64_t(multiprocessors(call)) * per_multiprocessor;
    return dim3(unsigned(blocks < resident ? blocks : resident));
}

// Deals the items of a rows x columns table to the warps of the grid and calls body(row, column)
// for those of this warp. Row and column are carried along, as a division per item would cost as
// much as the arithmetic on it.
template <class Body>
TIM_DEVICE void deal_to_warps(int64_t rows, int64_t columns, const Body& body) {
    const int warps = blockDim.x / kWarp;
    const int64_t step = int64_t(gridDim.x) * warps;
    const int64_t start = int64_t(blockIdx.x) * warps + threadIdx.x / kWarp;
    const int64_t row_step = step / columns, column_step = step % columns;
    int64_t row = start / columns, column = start % columns;
    while (row < rows) {
        body(row, column);
        row += row_step;
        column += column_step;
        if (column >= columns) {
            column -= columns;
            ++row;
        }
    }
}

// Elementwise kernels see their data as rows of packs and cut each row into pieces of kUnroll packs
// per lane. A warp takes one piece at a time.
constexpr int kUnroll = 2;
constexpr int kPiece = kUnroll * kWarp;
constexpr int kPieceThreads = 256;

inline dim3 piece_grid(const Call& call, int64_t rows, int64_t packs) {
    return persistent_grid(call, rows * ceil_div(packs, kPiece), kPieceThreads / kWarp, 8);
}

// Calls body(row, first pack of this lane) for all pieces of this warp.
template <class Body>
TIM_DEVICE void for_each_piece(int64_t rows, int64_t packs, const Body& body) {
    deal_to_warps(rows, ceil_div(packs, kPiece),
                  [&](int64_t row, int64_t piece) { body(row, piece * kPiece + lane()); });
}

}  // namespace tim::cuda
