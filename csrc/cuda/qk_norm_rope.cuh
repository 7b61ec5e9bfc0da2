// Rows of one head, spread over neighbouring lanes, and the steps of qk_norm_rope on them.
#pragma once

#include <stdexcept>
#include <string>

#include "../math/qk_norm_rope.h"
#include "common.cuh"

namespace tim::cuda {
namespace {

constexpr int kHeadThreads = 128;

// How a lane holds its part of a head: kPacks packs of n values, moved in accesses of kWidth
// values. With one pack per lane a warp holds as many heads as fit.
template <class T_, int n_, int width, int packs>
struct Layout {
    using T = T_;
    static constexpr int n = n_, kWidth = width, kPacks = packs;
};

template <class T>
using Wide = Layout<T, 8, kAccessBytes / sizeof(T), 1>;
// For any alignment and head_dim: whole pairs, as the rotation needs them, value by value.
template <class T>
using Narrow = Layout<T, 2, 1, 4>;

// A lane's place: it is number `index` of the `lanes` of head `head` of the `heads` in its warp.
// Lanes left over at the end of the warp see a head beyond `heads`.
struct Place {
    int head_dim, lanes, heads, head, index;
    float inverse_dim;
};

template <class L>
TIM_HD int lanes_per_head(int head_dim) {
    return L::kPacks > 1 ? kWarp : head_dim / L::n;
}

template <class L>
TIM_DEVICE Place make_place(int head_dim) {
    const int lanes = lanes_per_head<L>(head_dim);
    return {head_dim, lanes, kWarp / lanes, lane() / lanes, lane() % lanes, 1.0f / head_dim};
}

// Sum over the lanes of a head; every one of them receives it. Always five steps: skipping those
// that a small head does not need would cost more in branches.
TIM_DEVICE float head_sum(float value, Place at) {
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2) {
        const float other = shuffle(value, lane() + step);
        if (at.index < step && at.index + step < at.lanes) value += other;
    }
    return shuffle(value, lane() - at.index);
}

template <class L>
struct Raw {
    Pack<typename L::T, L::n> packs[L::kPacks];
};

template <class L>
struct Row {
    float values[L::kPacks][L::n];
};

// Calls body(i, first channel) for the packs of a lane that lie within the head.
template <class L, class Body>
TIM_DEVICE void for_each_pack(Place at, const Body& body) {
#pragma unroll
    for (int i = 0; i < L::kPacks; ++i) {
        const int channel = (at.index + i * at.lanes) * L::n;
        if (L::kPacks == 1 || channel < at.head_dim) body(i, channel);
    }
}

template <class L, class Body>
TIM_DEVICE void for_each_value(Place at, const Body& body) {
    for_each_pack<L>(at, [&](int i, int) {
#pragma unroll
        for (int j = 0; j < L::n; ++j) body(i, j);
    });
}

template <class L>
TIM_DEVICE Raw<L> read_raw(const typename L::T* p, Place at) {
    Raw<L> raw = {};
    for_each_pack<L>(
        at, [&](int i, int channel) { raw.packs[i] = read<L::n, L::kWidth>(p + channel); });
    return raw;
}

template <class L>
TIM_DEVICE void write_raw(typename L::T* p, const Raw<L>& raw, Place at) {
    for_each_pack<L>(at, [&](int i, int channel) { write<L::kWidth>(p + channel, raw.packs[i]); });
}

template <class L>
TIM_DEVICE Row<L> widen(const Raw<L>& raw) {
    Row<L> row;
#pragma unroll
    for (int i = 0; i < L::kPacks; ++i) {
#pragma unroll
        for (int j = 0; j < L::n; ++j) row.values[i][j] = load(raw.packs[i], j);
    }
    return row;
}

template <class L>
TIM_DEVICE void write_row(typename L::T* p, const Row<L>& row, Place at) {
    for_each_pack<L>(at, [&](int i, int channel) {
        write<L::kWidth>(p + channel, narrow<typename L::T>(row.values[i]));
    });
}

// A row of a float32 table or a parameter.
template <class L>
TIM_DEVICE Row<L> read_table(const float* p, Place at) {
    constexpr int kWidth = L::kWidth == 1 ? 1 : kAccessBytes / sizeof(float);
    Row<L> row = {};
    for_each_pack<L>(at, [&](int i, int channel) {
        const Pack<float, L::n> pack = read<L::n, kWidth>(p + channel);
#pragma unroll
        for (int j = 0; j < L::n; ++j) row.values[i][j] = load(pack, j);
    });
    return row;
}

// Replaces x by xhat and returns 1 / std.
template <class L>
TIM_DEVICE float normalise(Row<L>& x, Place at, float eps) {
    float sum = 0.0f;
    for_each_value<L>(at, [&](int i, int j) { sum += x.values[i][j]; });
    const float mean = head_sum(sum, at) * at.inverse_dim;
    float squares = 0.0f;
    for_each_value<L>(at, [&](int i, int j) {
        const float centred = x.values[i][j] - mean;
        squares += centred * centred;
    });
    const float rstd = math::inverse_std(head_sum(squares, at) * at.inverse_dim, eps);
    for_each_value<L>(
        at, [&](int i, int j) { x.values[i][j] = math::normalise(x.values[i][j], mean, rstd); });
    return rstd;
}

// Replaces v by J v, with J the Jacobian of xhat.
template <class L>
TIM_DEVICE void apply_jacobian(Row<L>& v, const Row<L>& xhat, float rstd, Place at) {
    float sum = 0.0f, sum_xhat = 0.0f;
    for_each_value<L>(at, [&](int i, int j) {
        sum += v.values[i][j];
        sum_xhat += v.values[i][j] * xhat.values[i][j];
    });
    const float mean = head_sum(sum, at) * at.inverse_dim;
    const float mean_xhat = head_sum(sum_xhat, at) * at.inverse_dim;
    for_each_value<L>(at, [&](int i, int j) {
        v.values[i][j] =
            math::layer_norm_jacobian(v.values[i][j], xhat.values[i][j], mean, mean_xhat, rstd);
    });
}

struct Size {
    int64_t batch, tokens;
    int heads, head_dim;
    float eps;
};

// The kernels count the numbers of a token in ints.
constexpr int kMaxHeads = 1 << 21;
constexpr int kMaxHeadDim = 256;

inline Size make_size(const Call& call, int64_t batch, int64_t tokens, int64_t heads,
                      int64_t head_dim, double eps) {
    if (head_dim % 2 != 0) {
        throw std::invalid_argument(std::string(call.op) + ": head_dim must be even, got " +
                                    std::to_string(head_dim));
    }
    return {batch, tokens, counted(call, "heads", heads, kMaxHeads),
            counted(call, "head_dim", head_dim, kMaxHeadDim), float(eps)};
}

// The packed projections: token n of sample b starts at data + b stride_b + n stride_n and holds
// [3, H, D] without gaps.
template <class T>
struct Packed {
    const T* data;
    int64_t stride_b, stride_n;
};

template <class T>
TIM_DEVICE const T* token_of(Packed<T> qkv, int64_t sample, int64_t token) {
    return qkv.data + sample * qkv.stride_b + token * qkv.stride_n;
}

struct Tables {
    const float* q_weight;
    const float* q_bias;
    const float* k_weight;
    const float* k_bias;
    const float* cos;
    const float* sin;
};

// Calls body with the layout for these arrays; cos, sin and the parameters are among the pointers.
template <class T, class Body>
void with_layout(std::initializer_list<const void*> pointers,
                 std::initializer_list<int64_t> strides, int64_t head_dim, const Body& body) {
    static_assert(kMaxHeadDim == kWarp * Narrow<T>::kPacks * Narrow<T>::n);
    with_width<T>(pointers, strides, [&](auto width) {
        constexpr bool kAligned = decltype(width)::kValue > 1;
        if constexpr (kAligned) {
            if (head_dim % Wide<T>::n == 0 && head_dim <= kWarp * Wide<T>::n)
                return body(Wide<T>{});
        }
        body(Narrow<T>{});
    });
}

}  // namespace
}  // namespace tim::cuda
