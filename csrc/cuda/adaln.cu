#include "adaln.cuh"

namespace tim::cuda {
namespace {

// y, gate and res belong to the gated form.
template <class T>
struct Inputs {
    const T* x;
    const T* y;
    Rows<T> gate, shift, scale;
};

template <class T>
struct Outputs {
    T* res;
    T* out;
};

TIM_DEVICE void save(float* values, int64_t row, float value, bool active) {
    if (values != nullptr && active && threadIdx.x == 0) values[row] = value;
}

template <bool gated, class T, int n>
__global__ void __launch_bounds__(kMaxRowThreads, 1)
    forward(Inputs<T> in, Outputs<T> to, float* means, float* rstds, Shape size, float eps) {
    const int channels = size.channels;
    const float inverse = 1.0f / channels;
    int turn = 0;
    for_each_row(size, [&](int64_t row, int64_t sample, bool active) {
        const int64_t at = row * channels;
        const RawRow<T, n> xs = read_row<n>(in.x + at, channels);
        const RawRow<T, n> ys = read_row<n>(gated ? in.y + at : nullptr, channels);
        float h[kRowPacks<n>][n];
        float sum[1] = {};
        const T* const gates = row_of(in.gate, sample);
        for_each_pack<n>(channels, [&](int i, int channel) {
            const Pack<T, n> x = pack_of(xs, i, channel);
#pragma unroll
            for (int j = 0; j < n; ++j) h[i][j] = load(x, j);
            if (gated) {
                const Pack<T, n> y = pack_of(ys, i, channel), gate = read<n>(gates + channel);
#pragma unroll
                for (int j = 0; j < n; ++j)
                    h[i][j] = math::gated_residual(h[i][j], load(gate, j), load(y, j));
                // The norm sees the stored sum, rounded to its dtype, as the backward pass will.
                const Pack<T, n> res = narrow<T>(h[i]);
                if (active) write(to.res + at + channel, res);
#pragma unroll
                for (int j = 0; j < n; ++j) h[i][j] = load(res, j);
            }
#pragma unroll
            for (int j = 0; j < n; ++j) sum[0] += h[i][j];
        });
        row_sum(sum, &turn);
        const float mean = sum[0] * inverse;
        float squares[1] = {};
        for_each_pack<n>(channels, [&](int i, int) {
#pragma unroll
            for (int j = 0; j < n; ++j) {
                h[i][j] -= mean;
                squares[0] += h[i][j] * h[i][j];
            }
        });
        row_sum(squares, &turn);
        const float rstd = math::inverse_std(squares[0] * inverse, eps);
        save(means, row, mean, active);
        save(rstds, row, rstd, active);
        const T* const shifts = row_of(in.shift, sample);
        const T* const scales = row_of(in.scale, sample);
        for_each_pack<n>(active ? channels : 0, [&](int i, int channel) {
            const Pack<T, n> shift = read<n>(shifts + channel), scale = read<n>(scales + channel);
            float out[n];
#pragma unroll
            for (int j = 0; j < n; ++j)
                out[j] = math::modulate(math::normalise(h[i][j], 0.0f, rstd), load(scale, j),
                                        load(shift, j));
            write(to.out + at + channel, narrow<T>(out));
        });
    });
}

// Every tangent may be absent, which counts as zero.
template <bool gated, class T, int n>
__global__ void __launch_bounds__(kMaxRowThreads, 1)
    tangent(Inputs<T> in, Inputs<T> tin, Outputs<T> to, Outputs<T> tto, float* means, float* rstds,
            Shape size, float eps) {
    const int channels = size.channels;
    const float inverse = 1.0f / channels;
    int turn = 0;
    for_each_row(size, [&](int64_t row, int64_t sample, bool active) {
        const int64_t at = row * channels;
        const RawRow<T, n> xs = read_row<n>(in.x + at, channels);
        const RawRow<T, n> txs = read_row<n>(tin.x != nullptr ? tin.x + at : nullptr, channels);
        const RawRow<T, n> ys = read_row<n>(gated ? in.y + at : nullptr, channels);
        const RawRow<T, n> tys =
            read_row<n>(gated && tin.y != nullptr ? tin.y + at : nullptr, channels);
        float h[kRowPacks<n>][n], th[kRowPacks<n>][n];
        float sums[2] = {};
        const T* const gates = row_of(in.gate, sample);
        const T* const tgates = row_of(tin.gate, sample);
        for_each_pack<n>(channels, [&](int i, int channel) {
            const Pack<T, n> x = pack_of(xs, i, channel), tx = pack_of(txs, i, channel);
#pragma unroll
            for (int j = 0; j < n; ++j) {
                h[i][j] = load(x, j);
                th[i][j] = load(tx, j);
            }
            if (gated) {
                const Pack<T, n> y = pack_of(ys, i, channel), ty = pack_of(tys, i, channel);
                const Pack<T, n> gate = read<n>(gates + channel);
                const Pack<T, n> tgate = read_or_zero<n>(tgates, channel);
#pragma unroll
                for (int j = 0; j < n; ++j) {
                    h[i][j] = math::gated_residual(h[i][j], load(gate, j), load(y, j));
                    th[i][j] = math::gated_residual_tangent(th[i][j], load(gate, j), load(y, j),
                                                            load(tgate, j), load(ty, j));
                }
                const Pack<T, n> res = narrow<T>(h[i]);
                if (active) {
                    write(to.res + at + channel, res);
                    write(tto.res + at + channel, narrow<T>(th[i]));
                }
#pragma unroll
                for (int j = 0; j < n; ++j) h[i][j] = load(res, j);
            }
#pragma unroll
            for (int j = 0; j < n; ++j) {
                sums[0] += h[i][j];
                sums[1] += th[i][j];
            }
        });
        row_sum(sums, &turn);
        const float mean = sums[0] * inverse;
        const float tmean = sums[1] * inverse;
        float products[2] = {};
        for_each_pack<n>(channels, [&](int i, int) {
#pragma unroll
            for (int j = 0; j < n; ++j) {
                h[i][j] -= mean;
                products[0] += h[i][j] * h[i][j];
                products[1] += h[i][j] * (th[i][j] - tmean);
            }
        });
        row_sum(products, &turn);
        const float rstd = math::inverse_std(products[0] * inverse, eps);
        const float mean_xhat_t = products[1] * inverse * rstd;
        save(means, row, mean, active);
        save(rstds, row, rstd, active);
        const T* const shifts = row_of(in.shift, sample);
        const T* const scales = row_of(in.scale, sample);
        const T* const tshifts = row_of(tin.shift, sample);
        const T* const tscales = row_of(tin.scale, sample);
        for_each_pack<n>(active ? channels : 0, [&](int i, int channel) {
            const Pack<T, n> shift = read<n>(shifts + channel), scale = read<n>(scales + channel);
            const Pack<T, n> tshift = read_or_zero<n>(tshifts, channel);
            const Pack<T, n> tscale = read_or_zero<n>(tscales, channel);
            float out[n], tout[n];
#pragma unroll
            for (int j = 0; j < n; ++j) {
                const float xhat = math::normalise(h[i][j], 0.0f, rstd);
                const float txhat =
                    math::layer_norm_jacobian(th[i][j], xhat, tmean, mean_xhat_t, rstd);
                out[j] = math::modulate(xhat, load(scale, j), load(shift, j));
                tout[j] = math::modulate_tangent(xhat, txhat, load(scale, j), load(tscale, j),
                                                 load(tshift, j));
            }
            write(to.out + at + channel, narrow<T>(out));
            write(tto.out + at + channel, narrow<T>(tout));
        });
    });
}

Call make_call(const char* op, int64_t batch, int64_t tokens, int64_t channels, int64_t where) {
    return {op, {batch, tokens, channels}, reinterpret_cast<cudaStream_t>(where)};
}

void adaln(const void* x, const void* y, const void* gate, const void* shift, const void* scale,
           void* res, void* out, float* mean, float* rstd, int64_t batch, int64_t tokens,
           int64_t channels, int64_t gate_stride, int64_t shift_stride, int64_t scale_stride,
           double eps, int dtype, int64_t where) {
    if (batch == 0 || tokens == 0 || channels == 0) return;
    const Call call = make_call("adaln", batch, tokens, channels, where);
    const Shape size = make_shape(call, batch, tokens, channels);
    with_dtype(dtype, [&](auto type) {
        using T = decltype(type);
        with_width<T>(
            {x, y, gate, shift, scale, res, out},
            {channels, gate_stride, shift_stride, scale_stride}, [&](auto width) {
                constexpr int n = decltype(width)::kValue;
                const auto kernel = y == nullptr ? forward<false, T, n> : forward<true, T, n>;
                const dim3 block = row_block<n>(channels);
                launch(
                    call, kernel, row_grid(call, batch * tokens, block), block, row_bytes(block, 1),
                    Inputs<T>{array<T>(x), array<T>(y), make_rows<T>(gate, gate_stride),
                              make_rows<T>(shift, shift_stride), make_rows<T>(scale, scale_stride)},
                    Outputs<T>{array<T>(res), array<T>(out)}, mean, rstd, size, float(eps));
            });
    });
}

void adaln_tangent(const void* x, const void* y, const void* gate, const void* shift,
                   const void* scale, const void* tx, const void* ty, const void* tgate,
                   const void* tshift, const void* tscale, void* res, void* out, void* tres,
                   void* tout, float* mean, float* rstd, int64_t batch, int64_t tokens,
                   int64_t channels, int64_t gate_stride, int64_t shift_stride,
                   int64_t scale_stride, int64_t tgate_stride, int64_t tshift_stride,
                   int64_t tscale_stride, double eps, int dtype, int64_t where) {
    if (batch == 0 || tokens == 0 || channels == 0) return;
    const Call call = make_call("adaln_tangent", batch, tokens, channels, where);
    const Shape size = make_shape(call, batch, tokens, channels);
    with_dtype(dtype, [&](auto type) {
        using T = decltype(type);
        with_width<T>(
            {x, y, gate, shift, scale, tx, ty, tgate, tshift, tscale, res, out, tres, tout},
            {channels, gate_stride, shift_stride, scale_stride, tgate_stride, tshift_stride,
             tscale_stride},
            [&](auto width) {
                constexpr int n = decltype(width)::kValue;
                const auto kernel = y == nullptr ? tangent<false, T, n> : tangent<true, T, n>;
                const dim3 block = row_block<n>(channels);
                launch(
                    call, kernel, row_grid(call, batch * tokens, block), block, row_bytes(block, 2),
                    Inputs<T>{array<T>(x), array<T>(y), make_rows<T>(gate, gate_stride),
                              make_rows<T>(shift, shift_stride), make_rows<T>(scale, scale_stride)},
                    Inputs<T>{array<T>(tx), array<T>(ty), make_rows<T>(tgate, tgate_stride),
                              make_rows<T>(tshift, tshift_stride),
                              make_rows<T>(tscale, tscale_stride)},
                    Outputs<T>{array<T>(res), array<T>(out)},
                    Outputs<T>{array<T>(tres), array<T>(tout)}, mean, rstd, size, float(eps));
            });
    });
}

}  // namespace

void adaln_backward(const void* dout, const void* dres, const void* res, const void* y,
                    const void* gate, const void* scale, const float* mean, const float* rstd,
                    void* dx, void* dy, void* dgate, void* dshift, void* dscale, float* sums,
                    int64_t batch, int64_t tokens, int64_t channels, int64_t chunks,
                    int64_t gate_stride, int64_t scale_stride, double eps, int dtype,
                    int64_t where);

void add_adaln(Kernels& kernels) {
    kernels.adaln = adaln;
    kernels.adaln_backward = adaln_backward;
    kernels.adaln_tangent = adaln_tangent;
}

}  // namespace tim::cuda
