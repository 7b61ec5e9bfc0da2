// Attention and its tangent in one sweep: six products instead of seven, and eight tensors read or
// written instead of twelve.

#include "attention_pass.cuh"

namespace tim::cuda {

const Kernels& kernels();

namespace {

// Registers hold queries, sums and their tangents up to this width; from there on one pass follows
// the other.
constexpr int kMaxDualWidth = 96;

void attention_dual(const void* q, const void* k, const void* v, const void* t_q, const void* t_k,
                    const void* t_v, const int32_t* cu_seqlens_q, const int32_t* cu_seqlens_k,
                    void* out, float* lse, void* t_out, float* t_lse, Strides q_strides,
                    Strides k_strides, Strides v_strides, Strides t_q_strides, Strides t_k_strides,
                    Strides t_v_strides, int64_t batch, int64_t n, int64_t m, int64_t heads,
                    int64_t head_dim, int64_t sequences, int64_t max_n, int64_t max_m, double scale,
                    int dtype, int64_t where) {
    const Call call = make_call("attention_dual", batch, n, heads, head_dim, where);
    if (batch == 0 || n == 0 || heads == 0 || head_dim == 0) return;
    check_tangents(call, t_q, t_k, t_v);
    if (head_dim > kMaxDualWidth) {
        kernels().attention(q, k, v, cu_seqlens_q, cu_seqlens_k, out, lse, q_strides, k_strides,
                            v_strides, batch, n, m, heads, head_dim, sequences, max_n, max_m, scale,
                            dtype, where);
        kernels().attention_tangent(q, k, v, out, lse, t_q, t_k, t_v, cu_seqlens_q, cu_seqlens_k,
                                    t_out, t_lse, q_strides, k_strides, v_strides, t_q_strides,
                                    t_k_strides, t_v_strides, batch, n, m, heads, head_dim,
                                    sequences, max_n, max_m, scale, dtype, where);
        return;
    }
    Problem problem = make_problem(call, {cu_seqlens_q, n, max_n}, {cu_seqlens_k, m, max_m}, batch,
                                   heads, sequences, scale);
    with_type_and_width(call.op, dtype, head_dim, [&](auto type, auto width) {
        using T = decltype(type);
        constexpr int D = decltype(width)::kValue;
        const Inputs<T> x = make_inputs<T>(q, k, v, t_q, t_k, t_v, q_strides, k_strides, v_strides,
                                           t_q_strides, t_k_strides, t_v_strides);
        problem.aligned = are_aligned({out, t_out}) && are_aligned(x);
        with_subset(x, [&](auto subset) {
            if constexpr (D <= kMaxDualWidth)
                launch_pass<decltype(subset)::value, D>(call, x, out, lse, t_out, t_lse, problem);
        });
    });
}

}  // namespace

void add_attention_dual(Kernels& kernels) { kernels.attention_dual = attention_dual; }

}  // namespace tim::cuda
