#include "qk_norm_rope.cuh"

namespace tim::cuda {
namespace {

template <class T>
struct Outputs {
    T* q;
    T* k;
    T* v;
};

template <class T>
TIM_DEVICE Outputs<T> token_of(Outputs<T> out, int64_t offset) {
    return {out.q + offset, out.k + offset, out.v + offset};
}

template <class L>
TIM_DEVICE void rotate(Row<L>& y, const Row<L>& cos, const Row<L>& sin) {
#pragma unroll
    for (int i = 0; i < L::kPacks; ++i) {
#pragma unroll
        for (int j = 0; j < L::n; j += 2) {
            float* const pair = y.values[i] + j;
            math::rotate(pair[0], pair[1], cos.values[i] + j, sin.values[i] + j, pair, pair + 1);
        }
    }
}

template <class L>
TIM_DEVICE void forward_row(const Raw<L>& raw, const Row<L>& weight, const Row<L>& bias,
                            const Row<L>& cos, const Row<L>& sin, typename L::T* out, Place at,
                            float eps, bool active) {
    Row<L> y = widen(raw);
    normalise(y, at, eps);
    for_each_value<L>(at, [&](int i, int j) {
        y.values[i][j] = math::affine(y.values[i][j], weight.values[i][j], bias.values[i][j]);
    });
    rotate(y, cos, sin);
    if (active) write_row(out, y, at);
}

// One block per multiprocessor is asked for, as the compiler else gives up registers that some
// architectures then miss.
//
// A warp takes a token at a time: its rotation is read once for all heads, and q, k and v of a head
// are three independent loads. Lanes without a head read the first one again, as a branch would
// hold up the other loads, and write nothing.
template <class L>
__global__ void __launch_bounds__(kHeadThreads, 1)
    forward(Packed<typename L::T> qkv, Tables tables, Outputs<typename L::T> out, Size size) {
    const Place at = make_place<L>(size.head_dim);
    const int third = size.heads * size.head_dim;
    const Row<L> q_weight = read_table<L>(tables.q_weight, at);
    const Row<L> q_bias = read_table<L>(tables.q_bias, at);
    const Row<L> k_weight = read_table<L>(tables.k_weight, at);
    const Row<L> k_bias = read_table<L>(tables.k_bias, at);
    deal_to_warps(size.batch, size.tokens, [&](int64_t sample, int64_t token) {
        const Row<L> cos = read_table<L>(tables.cos + token * size.head_dim, at);
        const Row<L> sin = read_table<L>(tables.sin + token * size.head_dim, at);
        const typename L::T* const in = token_of(qkv, sample, token);
        const Outputs<typename L::T> to = token_of(out, (sample * size.tokens + token) * third);
        for (int first = 0; first < size.heads; first += at.heads) {
            const int head = first + at.head;
            const bool active = at.head < at.heads && head < size.heads;
            const int row = active ? head * size.head_dim : 0;
            const Raw<L> q = read_raw<L>(in + row, at);
            const Raw<L> k = read_raw<L>(in + third + row, at);
            const Raw<L> v = read_raw<L>(in + 2 * third + row, at);
            forward_row(q, q_weight, q_bias, cos, sin, to.q + row, at, size.eps, active);
            forward_row(k, k_weight, k_bias, cos, sin, to.k + row, at, size.eps, active);
            if (active) write_raw(to.v + row, v, at);
        }
    });
}

template <class L>
TIM_DEVICE void tangent_row(const Raw<L>& raw, const Raw<L>& traw, const Row<L>& weight,
                            const Row<L>& bias, const Row<L>& cos, const Row<L>& sin,
                            typename L::T* out, typename L::T* tout, Place at, float eps,
                            bool active) {
    Row<L> y = widen(raw), ty = widen(traw);
    const float rstd = normalise(y, at, eps);
    apply_jacobian(ty, y, rstd, at);
    for_each_value<L>(at, [&](int i, int j) {
        y.values[i][j] = math::affine(y.values[i][j], weight.values[i][j], bias.values[i][j]);
        ty.values[i][j] *= weight.values[i][j];
    });
    rotate(y, cos, sin);
    rotate(ty, cos, sin);
    if (!active) return;
    write_row(out, y, at);
    write_row(tout, ty, at);
}

template <class L>
__global__ void __launch_bounds__(kHeadThreads, 1)
    tangent(Packed<typename L::T> qkv, Packed<typename L::T> tqkv, Tables tables,
            Outputs<typename L::T> out, Outputs<typename L::T> tout, Size size) {
    const Place at = make_place<L>(size.head_dim);
    const int third = size.heads * size.head_dim;
    const Row<L> q_weight = read_table<L>(tables.q_weight, at);
    const Row<L> q_bias = read_table<L>(tables.q_bias, at);
    const Row<L> k_weight = read_table<L>(tables.k_weight, at);
    const Row<L> k_bias = read_table<L>(tables.k_bias, at);
    deal_to_warps(size.batch, size.tokens, [&](int64_t sample, int64_t token) {
        const Row<L> cos = read_table<L>(tables.cos + token * size.head_dim, at);
        const Row<L> sin = read_table<L>(tables.sin + token * size.head_dim, at);
        const typename L::T* const in = token_of(qkv, sample, token);
        const typename L::T* const tin = token_of(tqkv, sample, token);
        const int64_t offset = (sample * size.tokens + token) * third;
        const Outputs<typename L::T> to = token_of(out, offset), tto = token_of(tout, offset);
        for (int first = 0; first < size.heads; first += at.heads) {
            const int head = first + at.head;
            const bool active = at.head < at.heads && head < size.heads;
            const int row = active ? head * size.head_dim : 0;
            const Raw<L> q = read_raw<L>(in + row, at);
            const Raw<L> tq = read_raw<L>(tin + row, at);
            const Raw<L> k = read_raw<L>(in + third + row, at);
            const Raw<L> tk = read_raw<L>(tin + third + row, at);
            const Raw<L> v = read_raw<L>(in + 2 * third + row, at);
            const Raw<L> tv = read_raw<L>(tin + 2 * third + row, at);
            tangent_row(q, tq, q_weight, q_bias, cos, sin, to.q + row, tto.q + row, at, size.eps,
                        active);
            tangent_row(k, tk, k_weight, k_bias, cos, sin, to.k + row, tto.k + row, at, size.eps,
                        active);
            if (!active) continue;
            write_raw(to.v + row, v, at);
            write_raw(tto.v + row, tv, at);
        }
    });
}

Call make_call(const char* op, int64_t batch, int64_t tokens, int64_t heads, int64_t head_dim,
               int64_t where) {
    return {op, {batch, tokens, heads, head_dim}, reinterpret_cast<cudaStream_t>(where)};
}

// Registers let three or four blocks into a multiprocessor: a multiple of both leaves none idle.
dim3 token_grid(const Call& call, int64_t tokens) {
    return persistent_grid(call, tokens, kHeadThreads / kWarp, 12);
}

void qk_norm_rope(const void* qkv, const float* q_weight, const float* q_bias,
                  const float* k_weight, const float* k_bias, const float* cos, const float* sin,
                  void* q, void* k, void* v, int64_t batch, int64_t tokens, int64_t heads,
                  int64_t head_dim, int64_t stride_b, int64_t stride_n, double eps, int dtype,
                  int64_t where) {
    if (batch == 0 || tokens == 0 || heads == 0 || head_dim == 0) return;
    const Call call = make_call("qk_norm_rope", batch, tokens, heads, head_dim, where);
    const Tables tables{q_weight, q_bias, k_weight, k_bias, cos, sin};
    const Size size = make_size(call, batch, tokens, heads, head_dim, eps);
    with_dtype(dtype, [&](auto type) {
        using T = decltype(type);
        with_layout<T>({qkv, q_weight, q_bias, k_weight, k_bias, cos, sin, q, k, v},
                       {stride_b, stride_n}, head_dim, [&](auto layout) {
                           launch(call, forward<decltype(layout)>, token_grid(call, batch * tokens),
                                  kHeadThreads, 0, Packed<T>{array<T>(qkv), stride_b, stride_n},
                                  tables, Outputs<T>{array<T>(q), array<T>(k), array<T>(v)}, size);
                       });
    });
}

void qk_norm_rope_tangent(const void* qkv, const void* tqkv, const float* q_weight,
                          const float* q_bias, const float* k_weight, const float* k_bias,
                          const float* cos, const float* sin, void* q, void* k, void* v, void* tq,
                          void* tk, void* tv, int64_t batch, int64_t tokens, int64_t heads,
                          int64_t head_dim, int64_t stride_b, int64_t stride_n, int64_t tstride_b,
                          int64_t tstride_n, double eps, int dtype, int64_t where) {
    if (batch == 0 || tokens == 0 || heads == 0 || head_dim == 0) return;
    const Call call = make_call("qk_norm_rope_tangent", batch, tokens, heads, head_dim, where);
    const Tables tables{q_weight, q_bias, k_weight, k_bias, cos, sin};
    const Size size = make_size(call, batch, tokens, heads, head_dim, eps);
    with_dtype(dtype, [&](auto type) {
        using T = decltype(type);
        with_layout<T>(
            {qkv, tqkv, q_weight, q_bias, k_weight, k_bias, cos, sin, q, k, v, tq, tk, tv},
            {stride_b, stride_n, tstride_b, tstride_n}, head_dim, [&](auto layout) {
                launch(call, tangent<decltype(layout)>, token_grid(call, batch * tokens),
                       kHeadThreads, 0, Packed<T>{array<T>(qkv), stride_b, stride_n},
                       Packed<T>{array<T>(tqkv), tstride_b, tstride_n}, tables,
                       Outputs<T>{array<T>(q), array<T>(k), array<T>(v)},
                       Outputs<T>{array<T>(tq), array<T>(tk), array<T>(tv)}, size);
            });
    });
}

}  // namespace

void qk_norm_rope_backward(const void* gq, const void* gk, const void* gv, const void* qkv,
                           const float* q_weight, const float* k_weight, const float* cos,
                           const float* sin, void* dqkv, float* dq_weight, float* dq_bias,
                           float* dk_weight, float* dk_bias, int64_t batch, int64_t tokens,
                           int64_t heads, int64_t head_dim, int64_t stride_b, int64_t stride_n,
                           double eps, int dtype, int64_t where);

void add_qk_norm_rope(Kernels& kernels) {
    kernels.qk_norm_rope = qk_norm_rope;
    kernels.qk_norm_rope_backward = qk_norm_rope_backward;
    kernels.qk_norm_rope_tangent = qk_norm_rope_tangent;
}

}  // namespace tim::cuda
