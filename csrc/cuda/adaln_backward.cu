#include <algorithm>
#include <stdexcept>
#include <string>

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

// A block walks the tokens of a chunk, kTokens at a time, and each of its threads keeps the same
// channels throughout, so that dshift, dscale and dgate are sums in its registers: no tensor is
// read twice. Rows of up to 4096 channels take few values per thread, as do all that are read value
// by value, by more threads.
constexpr int kFewValues = 8;
constexpr int kManyValues = 16;

template <int n>
constexpr int kMaxWalkers = n == 1 ? 1024 : 512;

template <int n, int packs>
constexpr int kTokens = n > 1 && n* packs == kFewValues ? 2 : 1;

// Sums that are written at once.
template <int n>
constexpr int kSumWidth = n < 4 ? n : 4;

template <bool gated>
constexpr int kSums = gated ? 3 : 2;  // of dshift, dscale, dgate

template <bool gated, class T, int n, int packs>
__global__ void __launch_bounds__(kMaxWalkers<n>, 1)
    tokens_backward(Inputs<T> in, Gradients<T> to, float* chunk_sums, int64_t chunks, Shape size,
                    float inverse) {
    constexpr int tokens = kTokens<n, packs>;
    constexpr int held = n == 1 ? 0 : packs;
    // Where a thread has many values, y is read when it is used, and the modulation for each token.
    constexpr int modulation = n * packs == kFewValues ? held : 0;
    using Row = RawRow<T, n, held>;
    const int channels = size.channels;
    const auto read_token = [&](const T* p, int64_t at, bool exists) {
        return read_row<n, held>(exists && p != nullptr ? p + at : nullptr, channels);
    };
    int turn = 0;
    for (int64_t item = blockIdx.x; item < size.batch * chunks; item += gridDim.x) {
        const int64_t sample = item / chunks, chunk = item - sample * chunks;
        const int64_t end = sample * size.tokens + size.tokens * (chunk + 1) / chunks;
        const auto scales = read_row<n, modulation>(row_of(in.scale, sample), channels);
        const auto gates =
            read_row<n, modulation>(gated ? row_of(in.gate, sample) : nullptr, channels);
        float sums[kSums<gated>][packs][n] = {};
        // Tokens beyond the end are zeros, which add nothing.
        for (int64_t first = sample * size.tokens + size.tokens * chunk / chunks; first < end;
             first += tokens) {
            Row douts[tokens], hs[tokens], dress[tokens];
            RawRow<T, n, modulation> ys[tokens];
            float mean[tokens], rstd[tokens], row_sums[2 * tokens] = {};
#pragma unroll
            for (int t = 0; t < tokens; ++t) {
                const bool exists = t == 0 || first + t < end;
                const int64_t at = (first + t) * channels;
                douts[t] = read_token(in.dout, at, exists);
                hs[t] = read_token(in.h, at, exists);
                dress[t] = read_token(in.dres, at, exists);
                ys[t] = read_row<n, modulation>(gated && exists ? in.y + at : nullptr, channels);
                mean[t] = exists ? load_global(in.mean + first + t) : 0.0f;
                rstd[t] = exists ? load_global(in.rstd + first + t) : 0.0f;
            }
#pragma unroll
            for (int t = 0; t < tokens; ++t) {
                for_each_pack<n, packs>(channels, [&](int i, int channel) {
                    const Pack<T, n> dout = pack_of(douts[t], i, channel);
                    const Pack<T, n> h = pack_of(hs[t], i, channel);
                    const Pack<T, n> scale = pack_of(scales, i, channel);
#pragma unroll
                    for (int j = 0; j < n; ++j) {
                        const float xhat = math::normalise(load(h, j), mean[t], rstd[t]);
                        const float g = math::modulate_gradient(load(dout, j), load(scale, j));
                        row_sums[2 * t] += g;
                        row_sums[2 * t + 1] += g * xhat;
                        sums[0][i][j] += load(dout, j);
                        sums[1][i][j] += load(dout, j) * xhat;
                    }
                });
            }
            row_sum(row_sums, &turn);
#pragma unroll
            for (int t = 0; t < tokens; ++t) {
                if (t > 0 && first + t >= end) break;
                const float mean_g = row_sums[2 * t] * inverse;
                const float mean_xhat_g = row_sums[2 * t + 1] * inverse;
                const int64_t at = (first + t) * channels;
                for_each_pack<n, packs>(channels, [&](int i, int channel) {
                    const Pack<T, n> dout = pack_of(douts[t], i, channel);
                    const Pack<T, n> h = pack_of(hs[t], i, channel);
                    const Pack<T, n> dres = pack_of(dress[t], i, channel);
                    const Pack<T, n> y = pack_of(ys[t], i, channel);
                    const Pack<T, n> scale = pack_of(scales, i, channel);
                    const Pack<T, n> gate = pack_of(gates, i, channel);
                    float dh[n], dy[n];
#pragma unroll
                    for (int j = 0; j < n; ++j) {
                        const float xhat = math::normalise(load(h, j), mean[t], rstd[t]);
                        const float g = math::modulate_gradient(load(dout, j), load(scale, j));
                        dh[j] = load(dres, j) +
                                math::layer_norm_jacobian(g, xhat, mean_g, mean_xhat_g, rstd[t]);
                        if (gated) {
                            dy[j] = load(gate, j) * dh[j];
                            sums[kSums<gated> - 1][i][j] += load(y, j) * dh[j];
                        }
                    }
                    write(to.dx + at + channel, narrow<T>(dh));
                    if (gated) write(to.dy + at + channel, narrow<T>(dy));
                });
            }
        }
#pragma unroll
        for (int k = 0; k < kSums<gated>; ++k) {
            float* const row = chunk_sums + (item * kSums<gated> + k) * channels;
            for_each_pack<n, packs>(channels, [&](int i, int channel) {
                write<kSumWidth<n>>(row + channel, narrow<float>(sums[k][i]));
            });
        }
    }
}

// The sums of a sample's chunks, added in the same order on every device: the threads of a column
// take every kColumnGroups-th chunk, and meet in shared memory.
constexpr int kColumns = 64;
constexpr int kColumnGroups = 4;

template <int count, class T>
__global__ void __launch_bounds__(kColumns* kColumnGroups)
    add_chunks(const float* chunk_sums, int64_t chunks, Gradients<T> to, Shape size) {
    const int channels = size.channels;
    const int column = blockIdx.x * kColumns + threadIdx.x;
    float* const slots = shared_memory() + threadIdx.x;  // [groups, count, columns]
    for (int64_t sample = blockIdx.y; sample < size.batch; sample += gridDim.y) {
        float sums[count] = {};
        const float* const first = chunk_sums + sample * chunks * count * channels + column;
#pragma unroll 4
        for (int64_t chunk = threadIdx.y; chunk < chunks; chunk += kColumnGroups) {
#pragma unroll
            for (int k = 0; k < count; ++k) {
                if (column < channels)
                    sums[k] += load_global(first + (chunk * count + k) * channels);
            }
        }
#pragma unroll
        for (int k = 0; k < count; ++k) slots[(threadIdx.y * count + k) * kColumns] = sums[k];
        barrier();
        const int k = threadIdx.y;
        if (k < count && column < channels) {
            float sum[1] = {};
#pragma unroll
            for (int group = 0; group < kColumnGroups; ++group)
                sum[0] += slots[(group * count + k) * kColumns];
            T* const outputs = k == 0 ? to.dshift : k == 1 ? to.dscale : to.dgate;
            write(outputs + sample * channels + column, narrow<T>(sum));
        }
        barrier();  // the slots are written again for the next sample
    }
}

template <bool gated, int n, int packs, class T>
void run(const Call& call, const Inputs<T>& in, const Gradients<T>& to, float* chunk_sums,
         int64_t chunks, const Shape& size) {
    const dim3 walkers(unsigned(ceil_div(size.channels, kWarp * packs * n)) * kWarp);
    const int resident = std::max(1, 2048 / int(walkers.x));
    launch(call, tokens_backward<gated, T, n, packs>,
           persistent_grid(call, size.batch * chunks, 1, 4 * resident), walkers,
           row_bytes(walkers, 2 * kTokens<n, packs>), in, to, chunk_sums, chunks, size,
           1.0f / size.channels);
    constexpr int count = kSums<gated>;
    const dim3 grid(unsigned(ceil_div(size.channels, kColumns)), grid_rows(call, size.batch));
    launch(call, add_chunks<count, T>, grid, dim3(kColumns, kColumnGroups),
           kColumnGroups * count * kColumns * sizeof(float), chunk_sums, chunks, to, size);
}

}  // namespace

void adaln_backward(const void* dout, const void* dres, const void* res, const void* y,
                    const void* gate, const void* scale, const float* mean, const float* rstd,
                    void* dx, void* dy, void* dgate, void* dshift, void* dscale, float* sums,
                    int64_t batch, int64_t tokens, int64_t channels, int64_t chunks,
                    int64_t gate_stride, int64_t scale_stride, double, int dtype, int64_t where) {
    if (batch == 0 || tokens == 0 || channels == 0) return;
    const Call call{
        "adaln_backward", {batch, tokens, channels}, reinterpret_cast<cudaStream_t>(where)};
    const Shape size = make_shape(call, batch, tokens, channels);
    if (sums == nullptr || chunks < 1 || chunks > tokens) {
        throw std::invalid_argument("adaln_backward: chunks must be 1 to " +
                                    std::to_string(tokens) +
                                    " (tokens), with memory for their sums, got " +
                                    std::to_string(sums == nullptr ? 0 : chunks));
    }
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
        with_width<T>({dout, dres, res, y, gate, scale, dx, dy, sums},
                      {channels, gate_stride, scale_stride}, [&](auto width) {
                          constexpr int n = decltype(width)::kValue;
                          constexpr int few = kFewValues / n;
                          constexpr int many = n == 1 ? few : kManyValues / n;
                          const bool fits = channels <= kMaxWalkers<n> * kFewValues;
                          const auto start =
                              y == nullptr ? fits ? run<false, n, few, T> : run<false, n, many, T>
                              : fits       ? run<true, n, few, T>
                                           : run<true, n, many, T>;
                          start(call, in, to, sums, chunks, size);
                      });
    });
}

}  // namespace tim::cuda
