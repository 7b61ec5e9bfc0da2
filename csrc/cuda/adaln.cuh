// How the adaln kernels hold rows of tokens: in registers, one row per warp as long as it fits, so
// that a row is read once and most rows need no barrier.
#pragma once

#include "../math/adaln.h"
#include "common.cuh"

namespace tim::cuda {
namespace {

// Packs of a row per thread, as many as the registers hold of the tensors of the tangent.
template <int n>
constexpr int kRowPacks = n == 8 ? 5 : 32 / n;
constexpr int kMaxRowThreads = 256;
constexpr int kMaxChannels = 32 * kMaxRowThreads;

// Equally spaced rows; a null pointer stands for zeros.
template <class T>
struct Rows {
    const T* data;
    int64_t stride;
};

template <class T>
TIM_DEVICE const T* row_of(Rows<T> rows, int64_t index) {
    return rows.data == nullptr ? nullptr : rows.data + index * rows.stride;
}

template <class T>
Rows<T> make_rows(const void* data, int64_t stride) {
    return {array<T>(data), stride};
}

struct Shape {
    int64_t batch, tokens;
    int channels;
};

// Calls body(i, first channel) for the packs of this thread.
template <int n, int packs = kRowPacks<n>, class Body>
TIM_DEVICE void for_each_pack(int channels, const Body& body) {
    // Registers are short where the packs are many.
    const int thread = n == 1 ? renewed(threadIdx.x) : threadIdx.x;
#pragma unroll
    for (int i = 0; i < packs; ++i) {
        const int channel = (thread + i * blockDim.x) * n;
        if (channel < channels) body(i, channel);
    }
}

template <int n, class T>
TIM_DEVICE Pack<T, n> read_or_zero(const T* p, int64_t at) {
    return p == nullptr ? Pack<T, n>{} : read<n>(p + at);
}

// The first packs of one row, or zeros where p is null, all on their way at once. None are held,
// but read when they are used, where `count` is 0: single values would take a register each.
template <class T, int n, int count = n == 1 ? 0 : kRowPacks<n>>
struct RawRow {
    const T* p;
    Pack<T, n> packs[count == 0 ? 1 : count];
};

template <int n, int count = n == 1 ? 0 : kRowPacks<n>, class T>
TIM_DEVICE RawRow<T, n, count> read_row(const T* p, int channels) {
    RawRow<T, n, count> raw = {p};
    if (count == 0 || p == nullptr) return raw;
    for_each_pack<n, count>(channels,
                            [&](int i, int channel) { raw.packs[i] = read<n>(p + channel); });
    return raw;
}

// Pack i, which begins at `channel`.
template <class T, int n, int count>
TIM_DEVICE Pack<T, n> pack_of(const RawRow<T, n, count>& raw, int i, int channel) {
    if constexpr (count == 0) {
        return read_or_zero<n>(raw.p, channel);
    } else {
        return raw.packs[i];
    }
}

// Replaces every value by its sum over the threads of the row. A row of several warps meets in
// shared memory: [2, rows, warps, count] floats, used in turns, so that one barrier per sum is
// enough. All threads of the block must call it equally often.
template <int count>
TIM_DEVICE void row_sum(float (&values)[count], int* turn) {
#pragma unroll
    for (int i = 0; i < count; ++i) values[i] = warp_sum(values[i]);
    const int warps = blockDim.x / kWarp;
    if (warps == 1) return;
    float* const slots = shared_memory() + (*turn * blockDim.y + threadIdx.y) * warps * count;
    *turn ^= 1;
    if (lane() == 0) {
#pragma unroll
        for (int i = 0; i < count; ++i) slots[threadIdx.x / kWarp * count + i] = values[i];
    }
    barrier();
#pragma unroll
    for (int i = 0; i < count; ++i) {
        values[i] = 0.0f;
#pragma unroll 1
        for (int warp = 0; warp < warps; ++warp) values[i] += slots[warp * count + i];
    }
}

// Calls body(row, sample, active) for the rows of this group of threads. A block takes neighbouring
// rows, which share their modulation in its cache. Where the last rows are fewer than the groups,
// the others compute the last row again, for the barriers' sake, and must not write.
template <class Body>
TIM_DEVICE void for_each_row(Shape size, const Body& body) {
    const int64_t rows = size.batch * size.tokens;
    const int64_t units = ceil_div(rows, blockDim.y);
    const int64_t begin = units * blockIdx.x / gridDim.x;
    const int64_t end = units * (blockIdx.x + 1) / gridDim.x;
    int64_t row = begin * blockDim.y + threadIdx.y;
    int64_t sample = row / size.tokens, token = row - sample * size.tokens;
    for (int64_t unit = begin; unit < end; ++unit) {
        const bool active = row < rows;
        body(active ? row : rows - 1, active ? sample : size.batch - 1, active);
        row += blockDim.y;
        token += blockDim.y;
        while (token >= size.tokens) {
            token -= size.tokens;
            ++sample;
        }
    }
}

// Threads of a row, rows.
template <int n>
dim3 row_block(int64_t channels) {
    const int warps = int(ceil_div(channels, kWarp * kRowPacks<n> * n));
    return dim3(warps * kWarp, warps < 4 ? 4 / warps : 1);
}

inline dim3 row_grid(const Call& call, int64_t rows, dim3 block) {
    return persistent_grid(call, rows, block.y, 16 * kWarp / (block.x * block.y));
}

inline size_t row_bytes(dim3 block, int count) {
    return 2 * block.y * (block.x / kWarp) * count * sizeof(float);
}

inline Shape make_shape(const Call& call, int64_t batch, int64_t tokens, int64_t channels) {
    return {batch, tokens, counted(call, "channels", channels, kMaxChannels)};
}

}  // namespace
}  // namespace tim::cuda
