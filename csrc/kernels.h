// The kernels' signatures: the one list that CPU code, CUDA code and Python bindings share.
#pragma once

#include <stdint.h>

namespace tim {

enum DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// Distances, in elements, from one sample, token and head of a [B, N, H, D] tensor to the next; the
// numbers of a head lie side by side.
struct Strides {
    int64_t batch, token, head;
};

// One back end's kernels; an entry that stays null does not exist in Python either.
//
// `const float*` and `float*` are float32 whatever the dtype; `void*` are of type `dtype`
// (`data_dtype` where a kernel has two). `where` is the number of threads on a CPU and the stream
// handle on a GPU. Shapes and formulas stand in the docstrings of tim.ops.
struct Kernels {
    void (*interpolate)(const void* x, const void* z, const float* coefficients, void* a, void* b,
                        int64_t batch, int64_t n, int dtype, int64_t where);

    void (*swiglu)(const void* gate, int64_t gate_stride, const void* up, int64_t up_stride,
                   void* out, int64_t rows, int64_t cols, int dtype, int64_t where);
    void (*swiglu_backward)(const void* grad, const void* gate, int64_t gate_stride, const void* up,
                            int64_t up_stride, void* dgate, void* dup, int64_t rows, int64_t cols,
                            int dtype, int64_t where);
    void (*swiglu_tangent)(const void* gate, int64_t gate_stride, const void* up, int64_t up_stride,
                           const void* tgate, int64_t tgate_stride, const void* tup,
                           int64_t tup_stride, void* out, void* tout, int64_t rows, int64_t cols,
                           int dtype, int64_t where);

    void (*adaln)(const void* x, const void* y, const void* gate, const void* shift,
                  const void* scale, void* res, void* out, float* mean, float* rstd, int64_t batch,
                  int64_t tokens, int64_t channels, int64_t gate_stride, int64_t shift_stride,
                  int64_t scale_stride, double eps, int dtype, int64_t where);
    // sums [batch, chunks, 2 (3 with dgate), channels] is scratch memory for the sums over the
    // tokens of a chunk, which a CPU does not need.
    void (*adaln_backward)(const void* dout, const void* dres, const void* res, const void* y,
                           const void* gate, const void* scale, const float* mean,
                           const float* rstd, void* dx, void* dy, void* dgate, void* dshift,
                           void* dscale, float* sums, int64_t batch, int64_t tokens,
                           int64_t channels, int64_t chunks, int64_t gate_stride,
                           int64_t scale_stride, double eps, int dtype, int64_t where);
    void (*adaln_tangent)(const void* x, const void* y, const void* gate, const void* shift,
                          const void* scale, const void* tx, const void* ty, const void* tgate,
                          const void* tshift, const void* tscale, void* res, void* out, void* tres,
                          void* tout, float* mean, float* rstd, int64_t batch, int64_t tokens,
                          int64_t channels, int64_t gate_stride, int64_t shift_stride,
                          int64_t scale_stride, int64_t tgate_stride, int64_t tshift_stride,
                          int64_t tscale_stride, double eps, int dtype, int64_t where);

    void (*qk_norm_rope)(const void* qkv, const float* q_weight, const float* q_bias,
                         const float* k_weight, const float* k_bias, const float* cos,
                         const float* sin, void* q, void* k, void* v, int64_t batch, int64_t tokens,
                         int64_t heads, int64_t head_dim, int64_t stride_b, int64_t stride_n,
                         double eps, int dtype, int64_t where);
    void (*qk_norm_rope_backward)(const void* gq, const void* gk, const void* gv, const void* qkv,
                                  const float* q_weight, const float* k_weight, const float* cos,
                                  const float* sin, void* dqkv, float* dq_weight, float* dq_bias,
                                  float* dk_weight, float* dk_bias, int64_t batch, int64_t tokens,
                                  int64_t heads, int64_t head_dim, int64_t stride_b,
                                  int64_t stride_n, double eps, int dtype, int64_t where);
    void (*qk_norm_rope_tangent)(const void* qkv, const void* tqkv, const float* q_weight,
                                 const float* q_bias, const float* k_weight, const float* k_bias,
                                 const float* cos, const float* sin, void* q, void* k, void* v,
                                 void* tq, void* tk, void* tv, int64_t batch, int64_t tokens,
                                 int64_t heads, int64_t head_dim, int64_t stride_b,
                                 int64_t stride_n, int64_t tstride_b, int64_t tstride_n, double eps,
                                 int dtype, int64_t where);

    // Attention. q and t_q are [batch, n, heads, head_dim], k, v, t_k and t_v [batch, m, heads,
    // head_dim], all with strides; out, dout, t_out, dq, dk and dv are contiguous in these shapes;
    // lse, t_lse and delta are contiguous [batch, heads, n].
    //
    // Packed: sequences > 0, batch = 1, and cu_seqlens_q, cu_seqlens_k [sequences + 1] in the
    // device's memory are the first rows of the sequences, which see only themselves. They ascend
    // from 0 to n and m. max_n and max_m are upper bounds of the sequences' lengths (n and m where
    // nobody knows better). Otherwise sequences = 0, cu_seqlens are null, and max_n = n, max_m = m.
    //
    // A query without keys has out = 0, lse = -infinity and tangents of zero.
    void (*attention)(const void* q, const void* k, const void* v, const int32_t* cu_seqlens_q,
                      const int32_t* cu_seqlens_k, void* out, float* lse, Strides q_strides,
                      Strides k_strides, Strides v_strides, int64_t batch, int64_t n, int64_t m,
                      int64_t heads, int64_t head_dim, int64_t sequences, int64_t max_n,
                      int64_t max_m, double scale, int dtype, int64_t where);
    // delta is scratch memory for rowsum(dout * out), which a CPU does not need. Bit for bit the
    // same on every call.
    void (*attention_backward)(const void* dout, const void* q, const void* k, const void* v,
                               const void* out, const float* lse, const int32_t* cu_seqlens_q,
                               const int32_t* cu_seqlens_k, float* delta, void* dq, void* dk,
                               void* dv, Strides q_strides, Strides k_strides, Strides v_strides,
                               int64_t batch, int64_t n, int64_t m, int64_t heads, int64_t head_dim,
                               int64_t sequences, int64_t max_n, int64_t max_m, double scale,
                               int dtype, int64_t where);
    // From out and lse, whoever computed them. A null t_q, t_k or t_v is zero and costs nothing; at
    // least one is there. t_lse, the tangent of lse, is written where it is not null.
    void (*attention_tangent)(const void* q, const void* k, const void* v, const void* out,
                              const float* lse, const void* t_q, const void* t_k, const void* t_v,
                              const int32_t* cu_seqlens_q, const int32_t* cu_seqlens_k, void* t_out,
                              float* t_lse, Strides q_strides, Strides k_strides, Strides v_strides,
                              Strides t_q_strides, Strides t_k_strides, Strides t_v_strides,
                              int64_t batch, int64_t n, int64_t m, int64_t heads, int64_t head_dim,
                              int64_t sequences, int64_t max_n, int64_t max_m, double scale,
                              int dtype, int64_t where);
    // The same results as those of attention and attention_tangent by instructions that only GPUs
    // of compute capability 9.0 have. On others, and for calls that these do not fit, they call
    // those.
    void (*attention_hopper)(const void* q, const void* k, const void* v,
                             const int32_t* cu_seqlens_q, const int32_t* cu_seqlens_k, void* out,
                             float* lse, Strides q_strides, Strides k_strides, Strides v_strides,
                             int64_t batch, int64_t n, int64_t m, int64_t heads, int64_t head_dim,
                             int64_t sequences, int64_t max_n, int64_t max_m, double scale,
                             int dtype, int64_t where);
    void (*attention_tangent_hopper)(const void* q, const void* k, const void* v, const void* out,
                                     const float* lse, const void* t_q, const void* t_k,
                                     const void* t_v, const int32_t* cu_seqlens_q,
                                     const int32_t* cu_seqlens_k, void* t_out, float* t_lse,
                                     Strides q_strides, Strides k_strides, Strides v_strides,
                                     Strides t_q_strides, Strides t_k_strides, Strides t_v_strides,
                                     int64_t batch, int64_t n, int64_t m, int64_t heads,
                                     int64_t head_dim, int64_t sequences, int64_t max_n,
                                     int64_t max_m, double scale, int dtype, int64_t where);
    // attention and attention_tangent in one pass. Optional: a back end without it is called twice.
    void (*attention_dual)(const void* q, const void* k, const void* v, const void* t_q,
                           const void* t_k, const void* t_v, const int32_t* cu_seqlens_q,
                           const int32_t* cu_seqlens_k, void* out, float* lse, void* t_out,
                           float* t_lse, Strides q_strides, Strides k_strides, Strides v_strides,
                           Strides t_q_strides, Strides t_k_strides, Strides t_v_strides,
                           int64_t batch, int64_t n, int64_t m, int64_t heads, int64_t head_dim,
                           int64_t sequences, int64_t max_n, int64_t max_m, double scale, int dtype,
                           int64_t where);
    // The same for GPUs of compute capability 9.0, as above.
    void (*attention_dual_hopper)(const void* q, const void* k, const void* v, const void* t_q,
                                  const void* t_k, const void* t_v, const int32_t* cu_seqlens_q,
                                  const int32_t* cu_seqlens_k, void* out, float* lse, void* t_out,
                                  float* t_lse, Strides q_strides, Strides k_strides,
                                  Strides v_strides, Strides t_q_strides, Strides t_k_strides,
                                  Strides t_v_strides, int64_t batch, int64_t n, int64_t m,
                                  int64_t heads, int64_t head_dim, int64_t sequences, int64_t max_n,
                                  int64_t max_m, double scale, int dtype, int64_t where);

    // The positions of a sample are cut into parts for a GPU of which samples alone would fill too
    // little; sums [batch, parts, 2] is scratch memory for several. A CPU needs neither.
    void (*transition_loss)(const void* F, const void* x, const void* z, const void* d,
                            const void* d_minus, const void* cond, const void* null,
                            const float* coefficients, double epsilon, const float* time_weight,
                            int64_t first, void* target, float* loss, float* denoising,
                            float* weight, float* sums, int64_t batch, int64_t channels,
                            int64_t positions, int64_t parts, bool cosine, int dtype,
                            int data_dtype, int64_t where);
    void (*transition_loss_backward)(const float* scale, const void* F, const void* target,
                                     void* dF, int64_t batch, int64_t channels, int64_t positions,
                                     bool cosine, int dtype, int data_dtype, int64_t where);
};

namespace cpu {
const Kernels& kernels();
const char* isa();
}  // namespace cpu

#ifdef TIM_HAS_CUDA
namespace cuda {
const Kernels& kernels();
}
#endif

}  // namespace tim
