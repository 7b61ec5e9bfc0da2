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
using math::load;

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

// n neighbouring values.
template <class T, int n>
struct alignas(sizeof(T) * n) Pack {
    T values[n];
};

template <size_t bytes>
struct WordOf;
template <>
struct WordOf<2> {
    using Type = unsigned short;
};
template <>
struct WordOf<4> {
    using Type = unsigned int;
};
template <>
struct WordOf<8> {
    using Type = uint2;
};
template <>
struct WordOf<16> {
    using Type = uint4;
};

// Reads n values by accesses of `width` values, to which p must be aligned.
template <int n, int width = n, class T>
TIM_DEVICE Pack<T, n> read(const T* p) {
    using Word = typename WordOf<width * sizeof(T)>::Type;
    Pack<T, n> pack;
#pragma unroll
    for (int i = 0; i < n / width; ++i) {
        const Word word = load_global(reinterpret_cast<const Word*>(p) + i);
        memcpy(pack.values + i * width, &word, sizeof(word));
    }
    return pack;
}

template <int width, class T, int n>
TIM_DEVICE void write(T* p, const Pack<T, n>& pack) {
    using Word = typename WordOf<width * sizeof(T)>::Type;
#pragma unroll
    for (int i = 0; i < n / width; ++i) {
        Word word;
        memcpy(&word, pack.values + i * width, sizeof(word));
        store_global(reinterpret_cast<Word*>(p) + i, word);
    }
}

template <class T, int n>
TIM_DEVICE void write(T* p, const Pack<T, n>& pack) {
    write<n>(p, pack);
}

// Two values at once: the instruction rounds pairs, in the time that one value would take.
TIM_DEVICE void store_pair(float* p, float a, float b) {
    p[0] = a;
    p[1] = b;
}

TIM_DEVICE void store_pair(BFloat16* p, float a, float b) {
#ifdef __CUDA_ARCH__
    uint32_t bits;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(b), "f"(a));
    memcpy(p, &bits, sizeof(bits));
#else
    math::store(p, a);
    math::store(p + 1, b);
#endif
}

TIM_DEVICE void store_pair(Float16* p, float a, float b) {
#ifdef __CUDA_ARCH__
    uint32_t bits;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(b), "f"(a));
    memcpy(p, &bits, sizeof(bits));
#else
    math::store(p, a);
    math::store(p + 1, b);
#endif
}

template <class T, int n>
TIM_DEVICE Pack<T, n> narrow(const float (&values)[n]) {
    Pack<T, n> pack;
    if constexpr (n % 2 == 0) {
#pragma unroll
        for (int i = 0; i < n; i += 2) store_pair(pack.values + i, values[i], values[i + 1]);
    } else {
#pragma unroll
        for (int i = 0; i < n; ++i) math::store(pack.values + i, values[i]);
    }
    return pack;
}

// Sum over groups of `lanes` neighbouring lanes, a power of two; every lane receives it.
template <int lanes = kWarp>
TIM_DEVICE float warp_sum(float value) {
#pragma unroll
    for (int mask = lanes / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
    return value;
}

// Elementwise kernels see their data as rows of packs and cut each row into pieces of kUnroll packs
// per lane. A warp takes one piece at a time.
constexpr int kUnroll = 2;
constexpr int kPiece = kUnroll * kWarp;
constexpr int kPieceThreads = 256;
constexpr int kPieceBlocks = 8;  // per multiprocessor, which then is full

inline dim3 piece_grid(const Call& call, int64_t rows, int64_t packs) {
    const int64_t blocks = ceil_div(rows * ceil_div(packs, kPiece), kPieceThreads / kWarp);
    const int64_t resident = int64_t(multiprocessors(call)) * kPieceBlocks;
    return dim3(unsigned(blocks < resident ? blocks : resident));
}

// Calls body(row, first pack of this lane) for all pieces of this warp. Row and piece are carried
// along, as a division per piece would cost as much as the arithmetic on it.
template <class Body>
TIM_DEVICE void for_each_piece(int64_t rows, int64_t packs, const Body& body) {
    constexpr int kWarps = kPieceThreads / kWarp;
    const int64_t pieces = ceil_div(packs, kPiece);
    const int64_t step = int64_t(gridDim.x) * kWarps;
    const int64_t start = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
    const int64_t row_step = step / pieces, piece_step = step % pieces;
    int64_t row = start / pieces, piece = start % pieces;
    while (row < rows) {
        body(row, piece * kPiece + lane());
        row += row_step;
        piece += piece_step;
        if (piece >= pieces) {
            piece -= pieces;
            ++row;
        }
    }
}

}  // namespace tim::cuda
