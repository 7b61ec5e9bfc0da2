#include "../math/qk_norm_rope.h"

#include <type_traits>

#include "kernel.h"
#include "rows.h"
#include "vector.h"

namespace tim::cpu::TIM_ISA {
namespace {

struct Size {
    int64_t batch, tokens, heads, head_dim;
};

// The packed projections: token n of sample b starts at data + b stride_b + n stride_n and holds
// [3, H, D] without gaps.
template <class T>
struct Packed {
    const T* data;
    int64_t stride_b, stride_n;
};

template <class T>
const T* token_of(Packed<T> qkv, int64_t token, int64_t tokens) {
    const int64_t sample = token / tokens;
    return qkv.data + sample * qkv.stride_b + (token - sample * tokens) * qkv.stride_n;
}

struct Angles {
    const float* cos;
    const float* sin;
};

struct Affine {
    const float* weight;
    const float* bias;
};

// What belongs to a channel, in scratch memory and split as vectors of pairs are: the angles of one
// position, weight and bias of q and of k.
class Tables {
  public:
    Tables(float* memory, int64_t n) : memory_(memory), n_(n) {}

    static int64_t floats(int64_t n) { return 6 * padded(n); }

    void set_angles(const float* cos, const float* sin, int64_t position) {
        set(0, cos + position * n_);
        set(1, sin + position * n_);
    }
    void set_affine(Affine q, Affine k) {
        set(2, q.weight);
        set(3, q.bias);
        set(4, k.weight);
        set(5, k.bias);
    }
    void set_weights(const float* q, const float* k) {
        set(2, q);
        set(4, k);
    }

    Vector cos(int64_t i) const { return get(0, i); }
    Vector sin(int64_t i) const { return get(1, i); }
    Vector weight(int part, int64_t i) const { return get(2 + 2 * part, i); }
    Vector bias(int part, int64_t i) const { return get(3 + 2 * part, i); }

  private:
    void set(int table, const float* values) {
        float* const row = memory_ + table * padded(n_);
        sweep(n_, [=](int64_t i, auto extent) {
            store(row + i, load_split(values + i, extent), Whole{});
        });
    }
    Vector get(int table, int64_t i) const {
        return load(memory_ + table * padded(n_) + i, Whole{});
    }

    float* const memory_;
    const int64_t n_;
};

inline Vector rotate(Vector x, Vector cos, Vector sin) {
    Vector out;
    math::rotate(x.low, x.high, cos.low, cos.high, sin.low, sin.high, &out.low, &out.high);
    return out;
}

inline Vector rotate_transposed(Vector grad, Vector cos, Vector sin) {
    Vector out;
    math::rotate_transposed(grad.low, grad.high, cos.low, cos.high, sin.low, sin.high, &out.low,
                            &out.high);
    return out;
}

// Heads of a token are worked on in groups: their sums do not wait for each other, and tables are
// read once for a group. Calls body(part, head, count) for those of q (part 0) and of k (part 1).
constexpr int kGroup = 4;

template <class Body>
void for_heads(int64_t heads, const Body& body) {
    for (int part = 0; part < 2; ++part) {
        int64_t head = 0;
        for (; head + kGroup <= heads; head += kGroup)
            body(part, head, std::integral_constant<int, kGroup>{});
        for (; head < heads; ++head) body(part, head, std::integral_constant<int, 1>{});
    }
}

// Mean and 1 / deviation of `count` rows of n values.
template <int count, class T>
struct Norm {
    float mean[count], rstd[count];

    Norm(const T* rows, int64_t n, float eps) {
        Vector sums[count], squares[count];
        for (int r = 0; r < count; ++r) sums[r] = squares[r] = 0.0f;
        sweep(n, [&](int64_t i, auto extent) {
            for (int r = 0; r < count; ++r) sums[r] += load(rows + r * n + i, extent);
        });
        for (int r = 0; r < count; ++r) mean[r] = sum(sums[r]) / float(n);
        sweep(n, [&](int64_t i, auto extent) {
            for (int r = 0; r < count; ++r) {
                const Vector d = keep<T>(load(rows + r * n + i, extent) - mean[r], extent);
                squares[r] += d * d;
            }
        });
        for (int r = 0; r < count; ++r) rstd[r] = math::inverse_std(sum(squares[r]), float(n), eps);
    }

    Vector operator()(Vector x, int r) const {
        return math::normalise<Vector>(x, mean[r], rstd[r]);
    }
};

// The Jacobian of the norm, for vectors v beside xhat.
template <int count>
struct Jacobian {
    Vector sums[count], sums_xhat[count];
    float mean[count], mean_xhat[count];

    Jacobian() {
        for (int r = 0; r < count; ++r) sums[r] = sums_xhat[r] = 0.0f;
    }
    // Zero beyond the row's end, as v is.
    void add(Vector v, Vector xhat, int r) {
        sums[r] += v;
        sums_xhat[r] += v * xhat;
    }
    void finish(int64_t n) {
        for (int r = 0; r < count; ++r) {
            mean[r] = sum(sums[r]) / float(n);
            mean_xhat[r] = sum(sums_xhat[r]) / float(n);
        }
    }
    Vector operator()(Vector v, Vector xhat, float rstd, int r) const {
        return math::layer_norm_jacobian<Vector>(v, xhat, mean[r], mean_xhat[r], rstd);
    }
};

template <class T>
void copy(const T* x, T* out, int64_t n) {
    memcpy(out, x, size_t(n) * sizeof(T));
}

template <class T>
void forward(Packed<T> qkv, Affine q_affine, Affine k_affine, Angles angles, T* q, T* k, T* v,
             Size size, float eps, int64_t threads) {
    const int64_t n = size.head_dim, width = size.heads * n;
    const Scratch scratch(threads * Tables::floats(n));
    parallel_for(
        size.batch * size.tokens, 3 * width, threads, [&](int64_t begin, int64_t end, int64_t id) {
            Tables tables(scratch.data + id * Tables::floats(n), n);
            tables.set_affine(q_affine, k_affine);
            for (int64_t token = begin; token < end; ++token) {
                tables.set_angles(angles.cos, angles.sin, token % size.tokens);
                const T* x = token_of(qkv, token, size.tokens);
                T* const outs[] = {q + token * width, k + token * width};
                for_heads(size.heads, [&](int part, int64_t head, auto count) {
                    const T* rows = x + part * width + head * n;
                    T* out = outs[part] + head * n;
                    const Norm<count, T> norm(rows, n, eps);
                    sweep(n, [&](int64_t i, auto extent) {
                        const Vector cos = tables.cos(i), sin = tables.sin(i);
                        const Vector weight = tables.weight(part, i), bias = tables.bias(part, i);
                        for (int r = 0; r < count; ++r) {
                            const int64_t at = r * n + i;
                            const Vector xhat = norm(load_split(rows + at, extent), r);
                            const Vector y = math::affine(xhat, weight, bias);
                            store_split(out + at, rotate(y, cos, sin), extent);
                        }
                    });
                });
                copy(x + 2 * width, v + token * width, width);
            }
        });
}

// Tokens whose contributions to the gradients of the weights share a row of partial sums, see
// sum_rows. Few, as each adds one term per head.
constexpr int64_t kChunk = 4;

template <class T>
void backward(const T* gq, const T* gk, const T* gv, Packed<T> qkv, const float* q_weight,
              const float* k_weight, Angles angles, T* dqkv, float* dq_weight, float* dq_bias,
              float* dk_weight, float* dk_bias, Size size, float eps, int64_t threads) {
    const int64_t n = size.head_dim, width = size.heads * n, row = padded(n);
    const int64_t tokens = size.batch * size.tokens;
    const int64_t chunks = tokens > 0 ? ceil_div(tokens, kChunk) : 1;
    const int64_t floats = Tables::floats(n) + kGroup * row;
    const Scratch scratch(threads * floats);
    const Scratch partial(chunks * 4 * row);  // of weight and bias of q, then of k
    fill_zero(partial.data, chunks * 4 * row);
    parallel_for(chunks, kChunk * 3 * width, threads, [&](int64_t begin, int64_t end, int64_t id) {
        float* const memory = scratch.data + id * floats;
        float* const gradients = memory + Tables::floats(n);
        Tables tables(memory, n);
        tables.set_weights(q_weight, k_weight);
        const int64_t last = end * kChunk < tokens ? end * kChunk : tokens;
        for (int64_t token = begin * kChunk; token < last; ++token) {
            tables.set_angles(angles.cos, angles.sin, token % size.tokens);
            const T* x = token_of(qkv, token, size.tokens);
            const T* const grads[] = {gq + token * width, gk + token * width};
            T* const dx = dqkv + 3 * token * width;
            for_heads(size.heads, [&](int part, int64_t head, auto count) {
                const T* rows = x + part * width + head * n;
                const T* grad = grads[part] + head * n;
                T* out = dx + part * width + head * n;
                float* const sums = partial.data + (token / kChunk * 4 + 2 * part) * row;
                const Norm<count, T> norm(rows, n, eps);
                Jacobian<count> jacobian;
                sweep(n, [&](int64_t i, auto extent) {
                    const Vector cos = tables.cos(i), sin = tables.sin(i);
                    const Vector weight = tables.weight(part, i);
                    Vector dweight = load(sums + i, Whole{});
                    Vector dbias = load(sums + row + i, Whole{});
                    for (int r = 0; r < count; ++r) {
                        const int64_t at = r * n + i;
                        const Vector xhat = norm(load_split(rows + at, extent), r);
                        Vector g = rotate_transposed(load_split(grad + at, extent), cos, sin);
                        dweight += g * xhat;
                        dbias += g;
                        g = g * weight;
                        jacobian.add(g, xhat, r);
                        store(gradients + r * row + i, g, Whole{});
                    }
                    store(sums + i, dweight, Whole{});
                    store(sums + row + i, dbias, Whole{});
                });
                jacobian.finish(n);
                sweep(n, [&](int64_t i, auto extent) {
                    for (int r = 0; r < count; ++r) {
                        const int64_t at = r * n + i;
                        const Vector xhat = norm(load_split(rows + at, extent), r);
                        const Vector g = load(gradients + r * row + i, Whole{});
                        store_split(out + at, jacobian(g, xhat, norm.rstd[r], r), extent);
                    }
                });
            });
            copy(gv + token * width, dx + 2 * width, width);
        }
    });
    sum_rows(partial.data, chunks, 4 * row);
    float* const outs[] = {dq_weight, dq_bias, dk_weight, dk_bias};
    for (int i = 0; i < 4; ++i) {
        const float* const total = partial.data + i * row;
        sweep(n, [&](int64_t j, auto extent) {
            store_split(outs[i] + j, load(total + j, Whole{}), extent);
        });
    }
}

template <class T>
void tangent(Packed<T> qkv, Packed<T> tqkv, Affine q_affine, Affine k_affine, Angles angles, T* q,
             T* k, T* v, T* tq, T* tk, T* tv, Size size, float eps, int64_t threads) {
    const int64_t n = size.head_dim, width = size.heads * n;
    const Scratch scratch(threads * Tables::floats(n));
    parallel_for(
        size.batch * size.tokens, 3 * width, threads, [&](int64_t begin, int64_t end, int64_t id) {
            Tables tables(scratch.data + id * Tables::floats(n), n);
            tables.set_affine(q_affine, k_affine);
            for (int64_t token = begin; token < end; ++token) {
                tables.set_angles(angles.cos, angles.sin, token % size.tokens);
                const T* x = token_of(qkv, token, size.tokens);
                const T* tx = token_of(tqkv, token, size.tokens);
                T* const outs[] = {q + token * width, k + token * width};
                T* const touts[] = {tq + token * width, tk + token * width};
                for_heads(size.heads, [&](int part, int64_t head, auto count) {
                    const int64_t from = part * width + head * n;
                    const T* rows = x + from;
                    const T* trows = tx + from;
                    T* out = outs[part] + head * n;
                    T* tout = touts[part] + head * n;
                    const Norm<count, T> norm(rows, n, eps);
                    Jacobian<count> jacobian;
                    sweep(n, [&](int64_t i, auto extent) {
                        for (int r = 0; r < count; ++r) {
                            const int64_t at = r * n + i;
                            jacobian.add(load(trows + at, extent), norm(load(rows + at, extent), r),
                                         r);
                        }
                    });
                    jacobian.finish(n);
                    sweep(n, [&](int64_t i, auto extent) {
                        const Vector cos = tables.cos(i), sin = tables.sin(i);
                        const Vector weight = tables.weight(part, i), bias = tables.bias(part, i);
                        for (int r = 0; r < count; ++r) {
                            const int64_t at = r * n + i;
                            const Vector xhat = norm(load_split(rows + at, extent), r);
                            const Vector txhat =
                                jacobian(load_split(trows + at, extent), xhat, norm.rstd[r], r);
                            const Vector y = math::affine(xhat, weight, bias);
                            store_split(out + at, rotate(y, cos, sin), extent);
                            store_split(tout + at, rotate(txhat * weight, cos, sin), extent);
                        }
                    });
                });
                copy(x + 2 * width, v + token * width, width);
                copy(tx + 2 * width, tv + token * width, width);
            }
        });
}

template <class T>
Packed<T> packed(const void* data, int64_t stride_b, int64_t stride_n) {
    return {static_cast<const T*>(data), stride_b, stride_n};
}

void check(int64_t head_dim) {
    if (head_dim % 2 != 0) refuse("qk_norm_rope: head_dim must be even");
}

void qk_norm_rope(const void* qkv, const float* q_weight, const float* q_bias,
                  const float* k_weight, const float* k_bias, const float* cos, const float* sin,
                  void* q, void* k, void* v, int64_t batch, int64_t tokens, int64_t heads,
                  int64_t head_dim, int64_t stride_b, int64_t stride_n, double eps, int dtype,
                  int64_t where) {
    check(head_dim);
    with_dtype(dtype, where, [&](auto type) {
        using T = decltype(type);
        forward<T>(packed<T>(qkv, stride_b, stride_n), {q_weight, q_bias}, {k_weight, k_bias},
                   {cos, sin}, static_cast<T*>(q), static_cast<T*>(k), static_cast<T*>(v),
                   {batch, tokens, heads, head_dim}, float(eps), where);
    });
}

void qk_norm_rope_backward(const void* gq, const void* gk, const void* gv, const void* qkv,
                           const float* q_weight, const float* k_weight, const float* cos,
                           const float* sin, void* dqkv, float* dq_weight, float* dq_bias,
                           float* dk_weight, float* dk_bias, int64_t batch, int64_t tokens,
                           int64_t heads, int64_t head_dim, int64_t stride_b, int64_t stride_n,
                           double eps, int dtype, int64_t where) {
    check(head_dim);
    with_dtype(dtype, where, [&](auto type) {
        using T = decltype(type);
        backward<T>(static_cast<const T*>(gq), static_cast<const T*>(gk), static_cast<const T*>(gv),
                    packed<T>(qkv, stride_b, stride_n), q_weight, k_weight, {cos, sin},
                    static_cast<T*>(dqkv), dq_weight, dq_bias, dk_weight, dk_bias,
                    {batch, tokens, heads, head_dim}, float(eps), where);
    });
}

void qk_norm_rope_tangent(const void* qkv, const void* tqkv, const float* q_weight,
                          const float* q_bias, const float* k_weight, const float* k_bias,
                          const float* cos, const float* sin, void* q, void* k, void* v, void* tq,
                          void* tk, void* tv, int64_t batch, int64_t tokens, int64_t heads,
                          int64_t head_dim, int64_t stride_b, int64_t stride_n, int64_t tstride_b,
                          int64_t tstride_n, double eps, int dtype, int64_t where) {
    check(head_dim);
    with_dtype(dtype, where, [&](auto type) {
        using T = decltype(type);
        tangent<T>(packed<T>(qkv, stride_b, stride_n), packed<T>(tqkv, tstride_b, tstride_n),
                   {q_weight, q_bias}, {k_weight, k_bias}, {cos, sin}, static_cast<T*>(q),
                   static_cast<T*>(k), static_cast<T*>(v), static_cast<T*>(tq), static_cast<T*>(tk),
                   static_cast<T*>(tv), {batch, tokens, heads, head_dim}, float(eps), where);
    });
}

}  // namespace

void add_qk_norm_rope(Kernels& kernels) {
    kernels.qk_norm_rope = qk_norm_rope;
    kernels.qk_norm_rope_backward = qk_norm_rope_backward;
    kernels.qk_norm_rope_tangent = qk_norm_rope_tangent;
}

}  // namespace tim::cpu::TIM_ISA
