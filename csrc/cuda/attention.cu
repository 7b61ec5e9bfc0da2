#include "attention_pass.cuh"

namespace tim::cuda {
namespace {

void attention(const void* q, const void* k, const void* v, const int32_t* cu_seqlens_q,
               const int32_t* cu_seqlens_k, void* out, float* lse, Strides q_strides,
               Strides k_strides, Strides v_strides, int64_t batch, int64_t n, int64_t m,
               int64_t heads, int64_t head_dim, int64_t sequences, int64_t max_n, int64_t max_m,
               double scale, int dtype, int64_t where) {
    const Call call = make_call("attention", batch, n, heads, head_dim, where);
    if (batch == 0 || n == 0 || heads == 0 || head_dim == 0) return;
    Problem problem = make_problem(call, {cu_seqlens_q, n, max_n}, {cu_seqlens_k, m, max_m}, batch,
                                   heads, sequences, scale);
    with_type_and_width(call.op, dtype, head_dim, [&](auto type, auto width) {
        using T = decltype(type);
        constexpr int D = decltype(width)::kValue;
        const Inputs<T> x = make_inputs<T>(q, k, v, nullptr, nullptr, nullptr, q_strides, k_strides,
                                           v_strides, {}, {}, {});
        problem.aligned = are_aligned({out}) && are_aligned(x);
        launch_pass<Subset::kNone, D>(call, x, out, lse, nullptr, nullptr, problem);
    });
}

}  // namespace

void add_attention_hopper(Kernels&);
void add_attention_tangent(Kernels&);
void add_attention_tangent_hopper(Kernels&);
void add_attention_dual(Kernels&);
void add_attention_dual_hopper(Kernels&);
void add_attention_backward(Kernels&);

void add_attention(Kernels& kernels) {
    kernels.attention = attention;
    add_attention_hopper(kernels);
    add_attention_tangent(kernels);
    add_attention_tangent_hopper(kernels);
    add_attention_dual(kernels);
    add_attention_dual_hopper(kernels);
    add_attention_backward(kernels);
}

}  // namespace tim::cuda
