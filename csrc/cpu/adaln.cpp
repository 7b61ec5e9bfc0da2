#include "../math/adaln.h"

#include <type_traits>

#include "kernel.h"
#include "rows.h"
#include "vector.h"

namespace tim::cpu::TIM_ISA {
namespace {

struct Size {
    int64_t batch, tokens, channels;
};

// Tokens are worked on in groups: their sums do not wait for each other, and what belongs to a
// channel is loaded once for the group. Calls body(first, count) for the groups of the tokens
// begin .. end - 1; `count` is a constant, `group` or 1.
template <int group, class Body>
void for_groups(int64_t begin, int64_t end, const Body& body) {
    int64_t i = begin;
    for (; i + group <= end; i += group) body(i, std::integral_constant<int, group>{});
    for (; i < end; ++i) body(i, std::integral_constant<int, 1>{});
}

// Calls body(first, sample, count) for groups of tokens of one sample, on all threads.
template <int group, class Body>
void parallel_groups(Size size, int64_t threads, const Body& body) {
    const int64_t tokens = size.batch * size.tokens;
    parallel_for(tokens, size.channels, threads, [&](int64_t begin, int64_t end, int64_t) {
        while (begin < end) {
            const int64_t sample = begin / size.tokens;
            const int64_t next = (sample + 1) * size.tokens;
            const int64_t stop = next < end ? next : end;
            for_groups<group>(begin, stop,
                              [&](int64_t first, auto count) { body(first, sample, count); });
            begin = stop;
        }
    });
}

inline void save(float* values, int64_t row, float value) {
    if (values != nullptr) values[row] = value;
}

template <bool gated, class T>
void forward(const T* xs, const T* ys, Rows<T> gates, Rows<T> shifts, Rows<T> scales, T* hs,
             T* outs, float* means, float* rstds, Size size, float eps, int64_t threads) {
    constexpr int kGroup = 8;
    const int64_t n = size.channels;
    parallel_groups<kGroup>(size, threads, [&](int64_t first, int64_t sample, auto count) {
        const T* x = xs + first * n;
        const T* row = x;  // what the norm is taken of
        Vector sums[count];
        for (int t = 0; t < count; ++t) sums[t] = 0.0f;
        if constexpr (gated) {
            const T* y = ys + first * n;
            const T* gate = row_of(gates, sample);
            T* h = hs + first * n;
            row = h;
            sweep(n, [&](int64_t i, auto extent) {
                const Vector gate_i = load(gate + i, extent);
                for (int t = 0; t < count; ++t) {
                    const int64_t at = t * n + i;
                    sums[t] += store_rounded(
                        h + at,
                        math::gated_residual(load(x + at, extent), gate_i, load(y + at, extent)),
                        extent);
                }
            });
        } else {
            sweep(n, [&](int64_t i, auto extent) {
                for (int t = 0; t < count; ++t) sums[t] += load(x + t * n + i, extent);
            });
        }
        float mean[count], rstd[count];
        Vector squares[count];
        for (int t = 0; t < count; ++t) {
            mean[t] = sum(sums[t]) / float(n);
            squares[t] = 0.0f;
        }
        sweep(n, [&](int64_t i, auto extent) {
            for (int t = 0; t < count; ++t) {
                const Vector d = keep<T>(load(row + t * n + i, extent) - mean[t], extent);
                squares[t] += d * d;
            }
        });
        for (int t = 0; t < count; ++t) {
            rstd[t] = math::inverse_std(sum(squares[t]), float(n), eps);
            save(means, first + t, mean[t]);
            save(rstds, first + t, rstd[t]);
        }
        const T* scale = row_of(scales, sample);
        const T* shift = row_of(shifts, sample);
        T* out = outs + first * n;
        sweep(n, [&](int64_t i, auto extent) {
            const Vector scale_i = load(scale + i, extent), shift_i = load(shift + i, extent);
            for (int t = 0; t < count; ++t) {
                const int64_t at = t * n + i;
                const Vector xhat =
                    math::normalise<Vector>(load(row + at, extent), mean[t], rstd[t]);
                store(out + at, math::modulate(xhat, scale_i, shift_i), extent);
            }
        });
    });
}

// The gradients of a group of tokens; what it adds to dshift, dscale and dgate goes into `sums`
// [3, width], in the order of T's vectors.
template <bool gated, class T, class Count>
void backward_group(Count count, const T* dout, Rows<T> dres, const T* h, const T* y, const T* gate,
                    const T* scale, const float* mean, const float* rstd, T* dx, T* dy, float* sums,
                    int64_t n) {
    const int64_t width = padded(n);
    Vector sums_g[count], sums_xhat_g[count];
    for (int t = 0; t < count; ++t) sums_g[t] = sums_xhat_g[t] = 0.0f;
    sweep(n, [&](int64_t i, auto extent) {
        const Vector scale_i = load(scale + i, extent);
        for (int t = 0; t < count; ++t) {
            const int64_t at = t * n + i;
            const Vector xhat = math::normalise<Vector>(load(h + at, extent), mean[t], rstd[t]);
            // Beyond the row's end dout is zero and xhat finite.
            const Vector g = math::modulate_gradient(load(dout + at, extent), scale_i);
            sums_g[t] += g;
            sums_xhat_g[t] += g * xhat;
        }
    });
    float mean_g[count], mean_xhat_g[count];
    for (int t = 0; t < count; ++t) {
        mean_g[t] = sum(sums_g[t]) / float(n);
        mean_xhat_g[t] = sum(sums_xhat_g[t]) / float(n);
    }
    // xhat and g once more from the cache: storing them would be slower.
    sweep(n, [&](int64_t i, auto extent) {
        const Vector scale_i = load(scale + i, extent);
        Vector dshift = load(sums + i, Whole{}), dscale = load(sums + width + i, Whole{});
        Vector gate_i, dgate;
        if constexpr (gated) {
            gate_i = load(gate + i, extent);
            dgate = load(sums + 2 * width + i, Whole{});
        }
        for (int t = 0; t < count; ++t) {
            const int64_t at = t * n + i;
            const Vector d = load(dout + at, extent);
            const Vector xhat = math::normalise<Vector>(load(h + at, extent), mean[t], rstd[t]);
            const Vector g = math::modulate_gradient(d, scale_i);
            dshift += d;
            dscale += d * xhat;
            Vector dh =
                math::layer_norm_jacobian<Vector>(g, xhat, mean_g[t], mean_xhat_g[t], rstd[t]);
            if constexpr (gated) {
                dh += load(row_of(dres, t) + i, extent);
                store(dy + at, gate_i * dh, extent);
                dgate += load(y + at, extent) * dh;
            }
            store(dx + at, dh, extent);
        }
        store(sums + i, dshift, Whole{});
        store(sums + width + i, dscale, Whole{});
        if constexpr (gated) store(sums + 2 * width + i, dgate, Whole{});
    });
}

// Tokens whose contributions to dshift, dscale and dgate share a row of partial sums, see sum_rows.
constexpr int64_t kChunk = 32;

template <bool gated, class T>
void backward(const T* douts, Rows<T> dress, const T* hs, const T* ys, Rows<T> gates,
              Rows<T> scales, const float* means, const float* rstds, T* dxs, T* dys, T* dgates,
              T* dshifts, T* dscales, Size size, int64_t threads) {
    constexpr int kGroup = 4;
    const int64_t n = size.channels, width = padded(n);
    const int64_t chunks = size.tokens > 0 ? ceil_div(size.tokens, kChunk) : 1;
    const int64_t floats = (gated ? 3 : 2) * width;
    const Scratch partial(size.batch * chunks * floats);
    parallel_for(
        size.batch * chunks, kChunk * n, threads, [&](int64_t begin, int64_t end, int64_t) {
            for (int64_t chunk = begin; chunk < end; ++chunk) {
                float* const sums = partial.data + chunk * floats;
                fill_zero(sums, floats);
                const int64_t sample = chunk / chunks;
                const int64_t from = sample * size.tokens + chunk % chunks * kChunk;
                const int64_t next = (sample + 1) * size.tokens;
                const int64_t to = from + kChunk < next ? from + kChunk : next;
                for_groups<kGroup>(from, to, [&](int64_t token, auto count) {
                    const int64_t at = token * n;
                    const Rows<T> dres = rows_from(dress, token);
                    backward_group<gated>(count, douts + at, dres, hs + at,
                                          gated ? ys + at : nullptr,
                                          gated ? row_of(gates, sample) : nullptr,
                                          row_of(scales, sample), means + token, rstds + token,
                                          dxs + at, gated ? dys + at : nullptr, sums, n);
                });
            }
        });
    parallel_for(size.batch, chunks * floats, threads, [&](int64_t begin, int64_t end, int64_t) {
        for (int64_t sample = begin; sample < end; ++sample) {
            float* const sums = partial.data + sample * chunks * floats;
            sum_rows(sums, chunks, floats);
            write_row(dshifts + sample * n, sums, n);
            write_row(dscales + sample * n, sums + width, n);
            if (gated) write_row(dgates + sample * n, sums + 2 * width, n);
        }
    });
}

template <bool gated, class T>
void tangent(const T* xs, const T* ys, Rows<T> gates, Rows<T> shifts, Rows<T> scales, Rows<T> txs,
             Rows<T> tys, Rows<T> tgates, Rows<T> tshifts, Rows<T> tscales, T* hs, T* outs, T* ths,
             T* touts, float* means, float* rstds, Size size, float eps, int64_t threads) {
    constexpr int kGroup = 4;
    const int64_t n = size.channels;
    parallel_groups<kGroup>(size, threads, [&](int64_t first, int64_t sample, auto count) {
        const T* x = xs + first * n;
        const Rows<T> tx = rows_from(txs, first);
        const T* row = x;  // what the norm is taken of, and its tangent
        Rows<T> trow = tx;
        Vector sums[count], tsums[count];
        for (int t = 0; t < count; ++t) sums[t] = tsums[t] = 0.0f;
        if constexpr (gated) {
            const T* y = ys + first * n;
            const Rows<T> ty = rows_from(tys, first);
            const T* gate = row_of(gates, sample);
            const T* tgate = row_of(tgates, sample);
            T* h = hs + first * n;
            T* th = ths + first * n;
            row = h;
            trow = {th, n};
            sweep(n, [&](int64_t i, auto extent) {
                const Vector gate_i = load(gate + i, extent), tgate_i = load(tgate + i, extent);
                for (int t = 0; t < count; ++t) {
                    const int64_t at = t * n + i;
                    const Vector y_i = load(y + at, extent);
                    sums[t] += store_rounded(
                        h + at, math::gated_residual(load(x + at, extent), gate_i, y_i), extent);
                    tsums[t] += store_rounded(
                        th + at,
                        math::gated_residual_tangent(load(row_of(tx, t) + i, extent), gate_i, y_i,
                                                     tgate_i, load(row_of(ty, t) + i, extent)),
                        extent);
                }
            });
        } else {
            sweep(n, [&](int64_t i, auto extent) {
                for (int t = 0; t < count; ++t) {
                    sums[t] += load(x + t * n + i, extent);
                    tsums[t] += load(row_of(tx, t) + i, extent);
                }
            });
        }
        float mean[count], tmean[count];
        Vector squares[count], products[count];
        for (int t = 0; t < count; ++t) {
            mean[t] = sum(sums[t]) / float(n);
            tmean[t] = sum(tsums[t]) / float(n);
            squares[t] = products[t] = 0.0f;
        }
        sweep(n, [&](int64_t i, auto extent) {
            for (int t = 0; t < count; ++t) {
                const Vector d = keep<T>(load(row + t * n + i, extent) - mean[t], extent);
                squares[t] += d * d;
                products[t] += d * (load(row_of(trow, t) + i, extent) - tmean[t]);
            }
        });
        float rstd[count], mean_xhat_t[count];
        for (int t = 0; t < count; ++t) {
            rstd[t] = math::inverse_std(sum(squares[t]), float(n), eps);
            mean_xhat_t[t] = sum(products[t]) * rstd[t] / float(n);
            save(means, first + t, mean[t]);
            save(rstds, first + t, rstd[t]);
        }
        const T* scale = row_of(scales, sample);
        const T* shift = row_of(shifts, sample);
        const T* tscale = row_of(tscales, sample);
        const T* tshift = row_of(tshifts, sample);
        T* out = outs + first * n;
        T* tout = touts + first * n;
        sweep(n, [&](int64_t i, auto extent) {
            const Vector scale_i = load(scale + i, extent), shift_i = load(shift + i, extent);
            const Vector tscale_i = load(tscale + i, extent), tshift_i = load(tshift + i, extent);
            for (int t = 0; t < count; ++t) {
                const int64_t at = t * n + i;
                const Vector xhat =
                    math::normalise<Vector>(load(row + at, extent), mean[t], rstd[t]);
                const Vector txhat = math::layer_norm_jacobian<Vector>(
                    load(row_of(trow, t) + i, extent), xhat, tmean[t], mean_xhat_t[t], rstd[t]);
                store(out + at, math::modulate(xhat, scale_i, shift_i), extent);
                store(tout + at, math::modulate_tangent(xhat, txhat, scale_i, tscale_i, tshift_i),
                      extent);
            }
        });
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
                    void* dx, void* dy, void* dgate, void* dshift, void* dscale, float*,
                    int64_t batch, int64_t tokens, int64_t channels, int64_t, int64_t gate_stride,
                    int64_t scale_stride, double, int dtype, int64_t where) {
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
