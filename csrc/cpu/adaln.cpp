#include "../math/adaln.h"

#include "kernel.h"
#include "rows.h"

namespace tim::cpu::TIM_ISA {
namespace {

struct Size {
    int64_t batch, tokens, channels;
};

inline void save(float* values, int64_t row, float value) {
    if (values != nullptr) values[row] = value;
}

template <bool gated, class T>
void forward(const T* xs, const T* ys, Rows<T> gates, Rows<T> shifts, Rows<T> scales, T* hs,
             T* outs, float* means, float* rstds, Size size, float eps, int64_t threads) {
    const int64_t n = size.channels;
    const Scratch scratch(threads * n);
    parallel_for(size.batch * size.tokens, n, threads, [&](int64_t begin, int64_t end, int64_t id) {
        float* const row = scratch.data + id * n;
        for (int64_t token = begin; token < end; ++token) {
            const int64_t sample = token / size.tokens;
            const T* x = xs + token * n;
            const T* y = gated ? ys + token * n : nullptr;
            const T* gate = gated ? row_of(gates, sample) : nullptr;
            T* h = gated ? hs + token * n : nullptr;
            float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
            for (int64_t i = 0; i < n; ++i) {
                float value = load(x + i);
                if (gated) {
                    store(h + i, math::gated_residual(value, load(gate + i), load(y + i)));
                    value = load(h + i);
                }
                row[i] = value;
                sum += value;
            }
            const float mean = sum / n;
            const float rstd = math::inverse_std(centred_squares(row, n, mean), n, eps);
            save(means, token, mean);
            save(rstds, token, rstd);
            const T* scale = row_of(scales, sample);
            const T* shift = row_of(shifts, sample);
            T* out = outs + token * n;
#pragma omp simd
            for (int64_t i = 0; i < n; ++i) {
                const float xhat = math::normalise(row[i], mean, rstd);
                store(out + i, math::modulate(xhat, load(scale + i), load(shift + i)));
            }
        }
    });
}

// The gradients of one token; what it adds to dshift, dscale and dgate goes into `sums` [3, C].
template <bool gated, class T>
void backward_token(const T* dout, const T* dres, const T* h, const T* y, const T* gate,
                    const T* scale, float mean, float rstd, T* dx, T* dy, float* sums, int64_t n) {
    float* const dshift = sums;
    float* const dscale = sums + n;
    float* const dgate = sums + 2 * n;
    float sum = 0.0f, sum_xhat = 0.0f;
#pragma omp simd reduction(+ : sum, sum_xhat)
    for (int64_t i = 0; i < n; ++i) {
        const float d = load(dout + i);
        const float xhat = math::normalise(load(h + i), mean, rstd);
        const float g = math::modulate_gradient(d, load(scale + i));
        sum += g;
        sum_xhat += g * xhat;
        dshift[i] += d;
        dscale[i] += d * xhat;
    }
    const float mean_g = sum / n, mean_xhat_g = sum_xhat / n;
    // xhat and g once more from the first-level cache: storing them would be slower.
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
        const float xhat = math::normalise(load(h + i), mean, rstd);
        const float g = math::modulate_gradient(load(dout + i), load(scale + i));
        const float dh =
            load(dres + i) + math::layer_norm_jacobian(g, xhat, mean_g, mean_xhat_g, rstd);
        store(dx + i, dh);
        if (gated) {
            store(dy + i, load(gate + i) * dh);
            dgate[i] += load(y + i) * dh;
        }
    }
}

// Tokens whose contributions to dshift, dscale and dgate share a row of partial sums, see sum_rows.
constexpr int64_t kChunk = 32;

template <bool gated, class T>
void backward(const T* douts, Rows<T> dress, const T* hs, const T* ys, Rows<T> gates,
              Rows<T> scales, const float* means, const float* rstds, T* dxs, T* dys, T* dgates,
              T* dshifts, T* dscales, Size size, int64_t threads) {
    const int64_t n = size.channels;
    const int64_t chunks = size.tokens > 0 ? ceil_div(size.tokens, kChunk) : 1;
    const Scratch partial(size.batch * chunks * 3 * n);
    parallel_for(
        size.batch * chunks, kChunk * n, threads, [&](int64_t begin, int64_t end, int64_t) {
            for (int64_t chunk = begin; chunk < end; ++chunk) {
                float* const sums = partial.data + chunk * 3 * n;
                fill_zero(sums, 3 * n);
                const int64_t sample = chunk / chunks;
                const int64_t first = chunk % chunks * kChunk;
                const int64_t last = first + kChunk < size.tokens ? first + kChunk : size.tokens;
                for (int64_t i = first; i < last; ++i) {
                    const int64_t token = sample * size.tokens + i;
                    const int64_t at = token * n;
                    backward_token<gated>(
                        douts + at, row_of(dress, token), hs + at, gated ? ys + at : nullptr,
                        gated ? row_of(gates, sample) : nullptr, row_of(scales, sample),
                        means[token], rstds[token], dxs + at, gated ? dys + at : nullptr, sums, n);
                }
            }
        });
    parallel_for(size.batch, chunks * 3 * n, threads, [&](int64_t begin, int64_t end, int64_t) {
        for (int64_t sample = begin; sample < end; ++sample) {
            float* const sums = partial.data + sample * chunks * 3 * n;
            sum_rows(sums, chunks, 3 * n);
            convert(dshifts + sample * n, sums, n);
            convert(dscales + sample * n, sums + n, n);
            if (gated) convert(dgates + sample * n, sums + 2 * n, n);
        }
    });
}

template <bool gated, class T>
void tangent(const T* xs, const T* ys, Rows<T> gates, Rows<T> shifts, Rows<T> scales, Rows<T> txs,
             Rows<T> tys, Rows<T> tgates, Rows<T> tshifts, Rows<T> tscales, T* hs, T* outs, T* ths,
             T* touts, float* means, float* rstds, Size size, float eps, int64_t threads) {
    const int64_t n = size.channels;
    const Scratch scratch(threads * 2 * n);
    parallel_for(size.batch * size.tokens, n, threads, [&](int64_t begin, int64_t end, int64_t id) {
        float* const row = scratch.data + id * 2 * n;
        float* const trow = row + n;
        for (int64_t token = begin; token < end; ++token) {
            const int64_t sample = token / size.tokens;
            const T* x = xs + token * n;
            const T* tx = row_of(txs, token);
            float sum = 0.0f, tsum = 0.0f;
            if (gated) {
                const T* y = ys + token * n;
                const T* ty = row_of(tys, token);
                const T* gate = row_of(gates, sample);
                const T* tgate = row_of(tgates, sample);
                T* h = hs + token * n;
                T* th = ths + token * n;
#pragma omp simd reduction(+ : sum, tsum)
                for (int64_t i = 0; i < n; ++i) {
                    const float y_i = load(y + i), gate_i = load(gate + i);
                    store(h + i, math::gated_residual(load(x + i), gate_i, y_i));
                    const float t = math::gated_residual_tangent(load(tx + i), gate_i, y_i,
                                                                 load(tgate + i), load(ty + i));
                    store(th + i, t);
                    row[i] = load(h + i);
                    trow[i] = t;
                    sum += row[i];
                    tsum += t;
                }
            } else {
#pragma omp simd reduction(+ : sum, tsum)
                for (int64_t i = 0; i < n; ++i) {
                    row[i] = load(x + i);
                    trow[i] = load(tx + i);
                    sum += row[i];
                    tsum += trow[i];
                }
            }
            const float mean = sum / n, tmean = tsum / n;
            float squares = 0.0f, products = 0.0f;
#pragma omp simd reduction(+ : squares, products)
            for (int64_t i = 0; i < n; ++i) {
                const float d = row[i] - mean;
                squares += d * d;
                products += d * (trow[i] - tmean);
            }
            const float rstd = math::inverse_std(squares, n, eps);
            const float mean_xhat_t = products * rstd / n;
            save(means, token, mean);
            save(rstds, token, rstd);
            const T* scale = row_of(scales, sample);
            const T* shift = row_of(shifts, sample);
            const T* tscale = row_of(tscales, sample);
            const T* tshift = row_of(tshifts, sample);
            T* out = outs + token * n;
            T* tout = touts + token * n;
#pragma omp simd
            for (int64_t i = 0; i < n; ++i) {
                const float xhat = math::normalise(row[i], mean, rstd);
                const float txhat =
                    math::layer_norm_jacobian(trow[i], xhat, tmean, mean_xhat_t, rstd);
                const float scale_i = load(scale + i);
                store(out + i, math::modulate(xhat, scale_i, load(shift + i)));
                store(tout + i, math::modulate_tangent(xhat, txhat, scale_i, load(tscale + i),
                                                       load(tshift + i)));
            }
        }
    });
}

template <class T>
const T* input(const void* data) {
    return static_cast<const T*>(data);
}

template <class T>
T* output(void* data) {
    return static_cast<T*>(data);
}

// Stands in for absent inputs: one row of zeros for all samples and tokens.
class Zeros {
  public:
    explicit Zeros(int64_t n) : row_(n) { memset(row_.data, 0, size_t(n) * sizeof(float)); }

    template <class T>
    Rows<T> unless(const void* data, int64_t stride) const {
        return data != nullptr ? make_rows<T>(data, stride) : make_rows<T>(row_.data, 0);
    }

  private:
    Scratch row_;
};

void adaln(const void* x, const void* y, const void* gate, const void* shift, const void* scale,
           void* res, void* out, float* mean, float* rstd, int64_t batch, int64_t tokens,
           int64_t channels, int64_t gate_stride, int64_t shift_stride, int64_t scale_stride,
           double eps, int dtype, int64_t where) {
    with_dtype(dtype, where, [&](auto type) {
        using T = decltype(type);
        const auto run = y == nullptr ? forward<false, T> : forward<true, T>;
        run(input<T>(x), input<T>(y), make_rows<T>(gate, gate_stride),
            make_rows<T>(shift, shift_stride), make_rows<T>(scale, scale_stride), output<T>(res),
            output<T>(out), mean, rstd, {batch, tokens, channels}, float(eps), where);
    });
}

void adaln_backward(const void* dout, const void* dres, const void* res, const void* y,
                    const void* gate, const void* scale, const float* mean, const float* rstd,
                    void* dx, void* dy, void* dgate, void* dshift, void* dscale, int64_t batch,
                    int64_t tokens, int64_t channels, int64_t gate_stride, int64_t scale_stride,
                    double, int dtype, int64_t where) {
    const Zeros zeros(channels);
    with_dtype(dtype, where, [&](auto type) {
        using T = decltype(type);
        const auto run = dgate == nullptr ? backward<false, T> : backward<true, T>;
        run(input<T>(dout), zeros.unless<T>(dres, channels), input<T>(res), input<T>(y),
            make_rows<T>(gate, gate_stride), make_rows<T>(scale, scale_stride), mean, rstd,
            output<T>(dx), output<T>(dy), output<T>(dgate), output<T>(dshift), output<T>(dscale),
            {batch, tokens, channels}, where);
    });
}

void adaln_tangent(const void* x, const void* y, const void* gate, const void* shift,
                   const void* scale, const void* tx, const void* ty, const void* tgate,
                   const void* tshift, const void* tscale, void* res, void* out, void* tres,
                   void* tout, float* mean, float* rstd, int64_t batch, int64_t tokens,
                   int64_t channels, int64_t gate_stride, int64_t shift_stride,
                   int64_t scale_stride, int64_t tgate_stride, int64_t tshift_stride,
                   int64_t tscale_stride, double eps, int dtype, int64_t where) {
    const Zeros zeros(channels);
    with_dtype(dtype, where, [&](auto type) {
        using T = decltype(type);
        const auto run = y == nullptr ? tangent<false, T> : tangent<true, T>;
        run(input<T>(x), input<T>(y), make_rows<T>(gate, gate_stride),
            make_rows<T>(shift, shift_stride), make_rows<T>(scale, scale_stride),
            zeros.unless<T>(tx, channels), zeros.unless<T>(ty, channels),
            zeros.unless<T>(tgate, tgate_stride), zeros.unless<T>(tshift, tshift_stride),
            zeros.unless<T>(tscale, tscale_stride), output<T>(res), output<T>(out), output<T>(tres),
            output<T>(tout), mean, rstd, {batch, tokens, channels}, float(eps), where);
    });
}

}  // namespace

void add_adaln(Kernels& kernels) {
    kernels.adaln = adaln;
    kernels.adaln_backward = adaln_backward;
    kernels.adaln_tangent = adaln_tangent;
}

}  // namespace tim::cpu::TIM_ISA
