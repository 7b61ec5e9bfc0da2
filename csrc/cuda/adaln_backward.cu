#include "adaln.cuh"

namespace tim::cuda {
namespace {

// y, gate, dy and dgate belong to the gated form; dres may be null there too.
template <class T>
struct Inputs {
    const T* dout;
    const T* dres;
    const T* h;  // the tensor that was normalised
    const T* y;
    Rows<T> gate, scale;
    const float* mean;
    const float* rstd;
};

template <class T>
struct Gradients {
    T* dx;
    T* dy;
    T* dgate;
    T* dshift;
    T* dscale;
};

template <bool gated, class T, int n>
__global__ void __launch_bounds__(kMaxRowThreads, 1)
    tokens_backward(Inputs<T> in, Gradients<T> to, Shape size) {
    const int channels = size.channels;
    const float inverse = 1.0f / channels;
    int turn = 0;
    for_each_row(size, [&](int64_t row, int64_t sample, bool active) {
        const int64_t at = row * channels;
        const RawRow<T, n> douts = read_row<n>(in.dout + at, channels);
        const RawRow<T, n> hs = read_row<n>(in.h + at, channels);
        const RawRow<T, n> dress =
            read_row<n>(in.dres != nullptr ? in.dres + at : nullptr, channels);
        const float mean = load_global(in.mean + row), rstd = load_global(in.rstd + row);
        const T* const scales = row_of(in.scale, sample);
        const T* const gates = row_of(in.gate, sample);
        float g[kRowPacks<n>][n], xhat[kRowPacks<n>][n];
        float sums[2] = {};
        for_each_pack<n>(channels, [&](int i, int channel) {
            const Pack<T, n> dout = pack_of(douts, i, channel), h = pack_of(hs, i, channel);
            const Pack<T, n> scale = read<n>(scales + channel);
#pragma unroll
            for (int j = 0; j < n; ++j) {
                xhat[i][j] = math::normalise(load(h, j), mean, rstd);
                g[i][j] = load(dout, j) * (1.0f + load(scale, j));
                sums[0] += g[i][j];
                sums[1] += g[i][j] * xhat[i][j];
            }
        });
        row_sum(sums, &turn);
        const float mean_g = sums[0] * inverse;
        const float mean_xhat_g = sums[1] * inverse;
        for_each_pack<n>(active ? channels : 0, [&](int i, int channel) {
            const Pack<T, n> dres = pack_of(dress, i, channel);
#pragma unroll
            for (int j = 0; j < n; ++j)
                g[i][j] = load(dres, j) +
                          math::layer_norm_jacobian(g[i][j], xhat[i][j], mean_g, mean_xhat_g, rstd);
            write(to.dx + at + channel, narrow<T>(g[i]));
            if (gated) {
                const Pack<T, n> gate = read<n>(gates + channel);
                float dy[n];
#pragma unroll
                for (int j = 0; j < n; ++j) dy[j] = load(gate, j) * g[i][j];
                write(to.dy + at + channel, narrow<T>(dy));
            }
        });
    });
}

// The sums over tokens read their tensors again, in place of keeping partial sums, for which there
// is no memory. A block adds up some columns of a sample: kColumnLanes packs wide, its other
// threads take every kColumnTokens-th token.
constexpr int kColumnLanes = 8;
constexpr int kColumnThreads = 256;
constexpr int kColumnTokens = kColumnThreads / kColumnLanes;
constexpr int kColumnWarps = kColumnThreads / kWarp;

template <bool gated, int n>
struct ColumnSums {
    static constexpr int kCount = gated ? 3 : 2;  // of dshift, dscale, dgate
    static constexpr int kColumns = kColumnLanes * n;
    float values[kCount][n];
};

template <bool gated, class T, int n>
__global__ void __launch_bounds__(kColumnThreads)
    columns_backward(Inputs<T> in, Gradients<T> to, Shape size) {
    using Sums = ColumnSums<gated, n>;
    const int channels = size.channels, warp = threadIdx.x / kWarp;
    const int channel = (blockIdx.x * kColumnLanes + lane() % kColumnLanes) * n;
    const int safe_channel = channel < channels ? channel : 0;
    float* const slots = shared_memory();  // [warps, kCount, kColumns]
    for (int64_t sample = blockIdx.y; sample < size.batch; sample += gridDim.y) {
        Sums sums = {};
#pragma unroll 2
        for (int64_t token = threadIdx.x / kColumnLanes; token < size.tokens;
             token += kColumnTokens) {
            const int64_t row = sample * size.tokens + token;
            const int64_t at = row * channels + safe_channel;
            const Pack<T, n> dout = read<n>(in.dout + at), h = read<n>(in.h + at);
            const Pack<T, n> y = read_or_zero<n>(gated ? in.y : nullptr, at);
            const Pack<T, n> dh = read_or_zero<n>(gated ? to.dx : nullptr, at);
            const float mean = load_global(in.mean + row), rstd = load_global(in.rstd + row);
#pragma unroll
            for (int j = 0; j < n; ++j) {
                const float dout_j = load(dout, j);
                sums.values[0][j] += dout_j;
                sums.values[1][j] += dout_j * math::normalise(load(h, j), mean, rstd);
                if (gated) sums.values[Sums::kCount - 1][j] += load(y, j) * load(dh, j);
            }
        }
#pragma unroll
        for (int k = 0; k < Sums::kCount; ++k) {
#pragma unroll
            for (int j = 0; j < n; ++j) {
                float& value = sums.values[k][j];
#pragma unroll
                for (int mask = kColumnLanes; mask < kWarp; mask *= 2)
                    value += shuffle_xor(value, mask);
                if (lane() < kColumnLanes)
                    slots[(warp * Sums::kCount + k) * Sums::kColumns + lane() * n + j] = value;
            }
        }
        barrier();
        constexpr int kEntries = Sums::kCount * Sums::kColumns;
        const int k = threadIdx.x / Sums::kColumns;
        const int column = blockIdx.x * Sums::kColumns + threadIdx.x % Sums::kColumns;
        if (threadIdx.x < kEntries && column < channels) {
            float sum[1] = {};
            for (int w = 0; w < kColumnWarps; ++w) sum[0] += slots[w * kEntries + threadIdx.x];
            T* const outputs = k == 0 ? to.dshift : k == 1 ? to.dscale : to.dgate;
            write(outputs + sample * channels + column, narrow<T>(sum));
        }
        barrier();  // the slots are written again for the next sample
    }
}

}  // namespace

void adaln_backward(const void* dout, const void* dres, const void* res, const void* y,
                    const void* gate, const void* scale, const float* mean, const float* rstd,
                    void* dx, void* dy, void* dgate, void* dshift, void* dscale, int64_t batch,
                    int64_t tokens, int64_t channels, int64_t gate_stride, int64_t scale_stride,
                    double, int dtype, int64_t where) {
    if (batch == 0 || tokens == 0 || channels == 0) return;
    const Call call{
        "adaln_backward", {batch, tokens, channels}, reinterpret_cast<cudaStream_t>(where)};
    check_channels(call, channels);
    with_dtype(dtype, [&](auto type) {
        using T = decltype(type);
        const Inputs<T> in{array<T>(dout),
                           array<T>(dres),
                           array<T>(res),
                           array<T>(y),
                           make_rows<T>(gate, gate_stride),
                           make_rows<T>(scale, scale_stride),
                           mean,
                           rstd};
        const Gradients<T> to{array<T>(dx), array<T>(dy), array<T>(dgate), array<T>(dshift),
                              array<T>(dscale)};
        const Shape size{batch, tokens, int(channels)};
        with_width<T>(
            {dout, dres, res, y, gate, scale, dx, dy}, {channels, gate_stride, scale_stride},
            [&](auto width) {
                constexpr int n = decltype(width)::kValue;
                const bool gated = y != nullptr;
                const dim3 block = row_block<n>(channels);
                launch(call, gated ? tokens_backward<true, T, n> : tokens_backward<false, T, n>,
                       row_grid(call, batch * tokens, block), block, row_bytes(block, 2), in, to,
                       size);
                const dim3 grid(unsigned(ceil_div(channels, kColumnLanes * n)),
                                grid_rows(call, batch));
                const int sums = gated ? 3 : 2;
                launch(call, gated ? columns_backward<true, T, n> : columns_backward<false, T, n>,
                       grid, kColumnThreads, kColumnWarps * sums * kColumnLanes * n * sizeof(float),
                       in, to, size);
            });
    });
}

}  // namespace tim::cuda
