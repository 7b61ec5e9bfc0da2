#include "../math/qk_norm_rope.h"

#include "kernel.h"
#include "rows.h"

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

struct Tables {
    const float* cos;
    const float* sin;
};

inline Tables at(Tables tables, int64_t position, int64_t n) {
    return {tables.cos + position * n, tables.sin + position * n};
}

struct Affine {
    const float* weight;
    const float* bias;
};

// The q and k rows of one token, 2 H of D values. Every step runs over all of them before the next
// one starts: rows are short, and the latencies of one row's sums hide behind the other rows.
struct Token {
    int64_t rows, n;
    float* x;       // values, later normalised
    float* v;       // tangents or gradients
    float* mean;    // per row
    float* rstd;    // per row
    float* mean_v;  // per row
    float* mean_xhat_v;

    static int64_t floats(Size size) { return 4 * size.heads * size.head_dim + 8 * size.heads; }

    Token(float* memory, Size size) : rows(2 * size.heads), n(size.head_dim), x(memory) {
        v = x + rows * n;
        mean = v + rows * n;
        rstd = mean + rows;
        mean_v = rstd + rows;
        mean_xhat_v = mean_v + rows;
    }
};

template <class T>
void read(const T* x, float* out, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = load(x + i);
}

template <class T>
void copy(const T* x, T* out, int64_t n) {
    memcpy(out, x, size_t(n) * sizeof(T));
}

inline float sum(const float* x, int64_t n) {
    float total = 0.0f;
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < n; ++i) total += x[i];
    return total;
}

// Reads q and k of a token and replaces them by xhat.
template <class T>
void read_normalised(Token& token, const T* qkv, float eps) {
    const int64_t n = token.n;
    read(qkv, token.x, token.rows * n);
    for (int64_t r = 0; r < token.rows; ++r) token.mean[r] = sum(token.x + r * n, n) / n;
    for (int64_t r = 0; r < token.rows; ++r)
        token.rstd[r] = centred_squares(token.x + r * n, n, token.mean[r]);
#pragma omp simd
    for (int64_t r = 0; r < token.rows; ++r)
        token.rstd[r] = math::inverse_std(token.rstd[r], n, eps);
    for (int64_t r = 0; r < token.rows; ++r) {
        float* const x = token.x + r * n;
        const float mean = token.mean[r], rstd = token.rstd[r];
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) x[i] = math::normalise(x[i], mean, rstd);
    }
}

// mean_v and mean_xhat_v, the two sums in the Jacobian of the norm.
inline void project(Token& token) {
    const int64_t n = token.n;
    for (int64_t r = 0; r < token.rows; ++r) {
        const float* const x = token.x + r * n;
        const float* const v = token.v + r * n;
        float sum = 0.0f, sum_xhat = 0.0f;
#pragma omp simd reduction(+ : sum, sum_xhat)
        for (int64_t i = 0; i < n; ++i) {
            sum += v[i];
            sum_xhat += v[i] * x[i];
        }
        token.mean_v[r] = sum / n;
        token.mean_xhat_v[r] = sum_xhat / n;
    }
}

// out = rotation of row * weight + bias
template <class T>
void write_rotated(const float* row, const float* weight, const float* bias, Tables at, T* out,
                   int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; i += 2) {
        float a, b;
        math::rotate(math::affine(row[i], weight[i], bias[i]),
                     math::affine(row[i + 1], weight[i + 1], bias[i + 1]), at.cos + i, at.sin + i,
                     &a, &b);
        store(out + i, a);
        store(out + i + 1, b);
    }
}

// q and k from the normalised rows.
template <class T>
void write_outputs(const Token& token, Affine q_affine, Affine k_affine, Tables at, T* q, T* k) {
    const int64_t n = token.n, width = token.rows / 2 * n;
    for (int64_t i = 0; i < width; i += n) {
        write_rotated(token.x + i, q_affine.weight, q_affine.bias, at, q + i, n);
        write_rotated(token.x + width + i, k_affine.weight, k_affine.bias, at, k + i, n);
    }
}

template <class T>
void forward(Packed<T> qkv, Affine q_affine, Affine k_affine, Tables tables, T* q, T* k, T* v,
             Size size, float eps, int64_t threads) {
    const int64_t n = size.head_dim, width = size.heads * n;
    const Scratch scratch(threads * Token::floats(size));
    parallel_for(size.batch * size.tokens, 3 * width, threads,
                 [&](int64_t begin, int64_t end, int64_t id) {
                     Token token(scratch.data + id * Token::floats(size), size);
                     for (int64_t t = begin; t < end; ++t) {
                         const T* x = token_of(qkv, t, size.tokens);
                         const int64_t to = t * width;
                         read_normalised(token, x, eps);
                         write_outputs(token, q_affine, k_affine, at(tables, t % size.tokens, n),
                                       q + to, k + to);
                         copy(x + 2 * width, v + to, width);
                     }
                 });
}

// token.v = gradient of xhat; dweight and dbias of q and of k ([4, D] in `sums`) are added to.
template <class T>
void pull_back(Token& token, const T* grads, int64_t first, const float* weight, Tables at,
               float* dweight, float* dbias) {
    const int64_t n = token.n;
    for (int64_t r = 0; r < token.rows / 2; ++r) {
        const T* const grad = grads + r * n;
        const float* const x = token.x + (first + r) * n;
        float* const g = token.v + (first + r) * n;
#pragma omp simd
        for (int64_t i = 0; i < n; i += 2) {
            float a, b;
            math::rotate_transposed(load(grad + i), load(grad + i + 1), at.cos + i, at.sin + i, &a,
                                    &b);
            g[i] = a;
            g[i + 1] = b;
        }
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) {
            dbias[i] += g[i];
            dweight[i] += g[i] * x[i];
            g[i] *= weight[i];
        }
    }
}

template <class T>
void write_gradient(const Token& token, T* dx) {
    const int64_t n = token.n;
    for (int64_t r = 0; r < token.rows; ++r) {
        const float mean_v = token.mean_v[r], mean_xhat_v = token.mean_xhat_v[r];
        const float rstd = token.rstd[r];
#pragma omp simd
        for (int64_t i = r * n; i < (r + 1) * n; ++i)
            store(dx + i,
                  math::layer_norm_jacobian(token.v[i], token.x[i], mean_v, mean_xhat_v, rstd));
    }
}

// Tokens whose contributions to the gradients of the weights share a row of partial sums, see
// sum_rows. Few, as each adds one term per head.
constexpr int64_t kChunk = 4;

template <class T>
void backward(const T* gq, const T* gk, const T* gv, Packed<T> qkv, const float* q_weight,
              const float* k_weight, Tables tables, T* dqkv, float* dq_weight, float* dq_bias,
              float* dk_weight, float* dk_bias, Size size, float eps, int64_t threads) {
    const int64_t n = size.head_dim, width = size.heads * n;
    const int64_t count = size.batch * size.tokens;
    const int64_t chunks = count > 0 ? ceil_div(count, kChunk) : 1;
    const Scratch scratch(threads * Token::floats(size));
    const Scratch partial(chunks * 4 * n);
    fill_zero(partial.data, chunks * 4 * n);
    parallel_for(chunks, kChunk * 3 * width, threads, [&](int64_t begin, int64_t end, int64_t id) {
        Token token(scratch.data + id * Token::floats(size), size);
        const int64_t last = end * kChunk < count ? end * kChunk : count;
        for (int64_t t = begin * kChunk; t < last; ++t) {
            float* const sums = partial.data + t / kChunk * 4 * n;
            const Tables here = at(tables, t % size.tokens, n);
            const int64_t from = t * width;
            T* dx = dqkv + 3 * from;
            read_normalised(token, token_of(qkv, t, size.tokens), eps);
            pull_back(token, gq + from, 0, q_weight, here, sums, sums + n);
            pull_back(token, gk + from, size.heads, k_weight, here, sums + 2 * n, sums + 3 * n);
            project(token);
            write_gradient(token, dx);
            copy(gv + from, dx + 2 * width, width);
        }
    });
    sum_rows(partial.data, chunks, 4 * n);
    copy(partial.data, dq_weight, n);
    copy(partial.data + n, dq_bias, n);
    copy(partial.data + 2 * n, dk_weight, n);
    copy(partial.data + 3 * n, dk_bias, n);
}

// out = rotation of weight * (tangent of the normalised row)
template <class T>
void write_tangent(const Token& token, int64_t row, const float* weight, Tables at, T* out) {
    const int64_t n = token.n;
    const float* const x = token.x + row * n;
    const float* const v = token.v + row * n;
    const float mean_v = token.mean_v[row], mean_xhat_v = token.mean_xhat_v[row];
    const float rstd = token.rstd[row];
#pragma omp simd
    for (int64_t i = 0; i < n; i += 2) {
        float a = math::layer_norm_jacobian(v[i], x[i], mean_v, mean_xhat_v, rstd);
        float b = math::layer_norm_jacobian(v[i + 1], x[i + 1], mean_v, mean_xhat_v, rstd);
        math::rotate(a * weight[i], b * weight[i + 1], at.cos + i, at.sin + i, &a, &b);
        store(out + i, a);
        store(out + i + 1, b);
    }
}

template <class T>
void tangent(Packed<T> qkv, Packed<T> tqkv, Affine q_affine, Affine k_affine, Tables tables, T* q,
             T* k, T* v, T* tq, T* tk, T* tv, Size size, float eps, int64_t threads) {
    const int64_t n = size.head_dim, width = size.heads * n;
    const Scratch scratch(threads * Token::floats(size));
    parallel_for(
        size.batch * size.tokens, 3 * width, threads, [&](int64_t begin, int64_t end, int64_t id) {
            Token token(scratch.data + id * Token::floats(size), size);
            for (int64_t t = begin; t < end; ++t) {
                const T* x = token_of(qkv, t, size.tokens);
                const T* tx = token_of(tqkv, t, size.tokens);
                const Tables here = at(tables, t % size.tokens, n);
                const int64_t to = t * width;
                read_normalised(token, x, eps);
                read(tx, token.v, 2 * width);
                project(token);
                write_outputs(token, q_affine, k_affine, here, q + to, k + to);
                for (int64_t h = 0; h < size.heads; ++h) {
                    write_tangent(token, h, q_affine.weight, here, tq + to + h * n);
                    write_tangent(token, size.heads + h, k_affine.weight, here, tk + to + h * n);
                }
                copy(x + 2 * width, v + to, width);
                copy(tx + 2 * width, tv + to, width);
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
